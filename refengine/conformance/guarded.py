"""Arrays between canaries: what a kernel writes where it should not, shows."""

from __future__ import annotations

from typing import Any

import numpy as np

from refengine.conformance.precision import Array

MARGIN = 4096  # bytes before and after
# Read as float32, float16 or bfloat16 this is NaN; as an integer a large negative number.
_CANARY = np.uint16(0xFFF7)


class Guarded:
    """One argument in memory of its own: margin, rows (with gaps between them), margin.

    Args:
        contents: what the array holds at first; its shape and dtype are the argument's.
        gap: elements between the rows of the first axis; 0 makes the array contiguous.
        kind: "numpy", "torch" or "cupy".
        device: "cpu" or "cuda".
    """

    def __init__(self, contents: Array, gap: int, kind: str, device: str) -> None:
        self.shape, self.dtype = contents.shape, contents.dtype
        strides = np.array(np.empty(self.shape, np.uint8).strides, np.int64)
        if gap and self.shape:
            strides[0] += gap
        self.strides = [int(s) for s in strides]
        span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        self.span = max(span, 0) if 0 not in self.shape else 0
        size = -(-self.span * self.dtype.itemsize // 64) * 64
        # On a cache line, as allocators give it.
        memory = np.empty(size + 2 * MARGIN + 64, np.uint8)
        start = -memory.ctypes.data % 64
        self.host = memory[start : start + size + 2 * MARGIN]
        self.host.view(np.uint16)[:] = _CANARY
        self.view = self._view_of(self.host)
        self.kind, self.device = kind, device
        self.foreign: Any = None
        self.fill(contents)
        self.argument = self._hand_over()

    def _view_of(self, host: Array) -> Array:
        flat = host[MARGIN : MARGIN + self.span * self.dtype.itemsize].view(self.dtype)
        strides = [s * self.dtype.itemsize for s in self.strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides)

    def fill(self, contents: Array | None) -> None:
        """Write contents, or canaries, which read as NaN; remembers everything as it now is."""
        if contents is None:
            words = np.full(self.host.size // 2, _CANARY)
            self.view[...] = self._view_of(words.view(np.uint8))
        else:
            self.view[...] = contents
        self.before = self.host.copy()
        if self.foreign is not None and self.device == "cuda":
            self._upload()

    def _upload(self) -> None:
        if self.kind == "torch":
            import torch

            self.foreign.copy_(torch.from_numpy(self.host))
        else:
            self.foreign.set(self.host)

    def _hand_over(self) -> Any:
        """The argument as the kernel gets it."""
        if self.kind == "numpy":
            return self.view
        if self.kind == "torch":
            import torch

            # Bytes cross by DLPack, so that formats which DLPack or NumPy lack cross as well.
            self.foreign = torch.from_dlpack(self.host)
            if self.device == "cuda":
                self.foreign = self.foreign.to("cuda")
            name = self.dtype.name if self.dtype.kind != "b" else "bool"
            flat = self.foreign[MARGIN : MARGIN + self.span * self.dtype.itemsize]
            return flat.view(getattr(torch, name)).as_strided(self.shape, self.strides)
        import cupy

        self.foreign = cupy.asarray(self.host)
        dtype = np.dtype(np.uint16) if self.dtype.name == "bfloat16" else self.dtype
        flat = self.foreign[MARGIN : MARGIN + self.span * dtype.itemsize].view(dtype)
        strides = [s * dtype.itemsize for s in self.strides]
        return cupy.lib.stride_tricks.as_strided(flat, self.shape, strides)

    def fetch(self) -> None:
        """Bring a device's memory back, so that ``view`` shows it."""
        if self.device != "cuda":
            return
        if self.kind == "torch":
            import torch

            torch.from_numpy(self.host).copy_(self.foreign)
        else:
            self.host[:] = self.foreign.get()

    def contents(self) -> Array:
        """A copy of the array as it now is."""
        return self.view.copy()

    def changed(self) -> int:
        """Elements that differ from when it was filled."""
        before, now = self._view_of(self.before), self.view
        word = f"u{self.dtype.itemsize}"
        same = np.ascontiguousarray(before).view(word) == np.ascontiguousarray(now).view(word)
        return int(same.size - same.sum())

    def written_outside(self) -> tuple[int, str] | None:
        """Bytes written around the array, and where: before, after or between its rows."""
        now = self.host.copy()
        self._view_of(now)[...] = self._view_of(self.before)
        wrong = np.flatnonzero(now != self.before)
        if wrong.size == 0:
            return None
        first, end = int(wrong[0]), MARGIN + self.span * self.dtype.itemsize
        if first < MARGIN:
            return int(wrong.size), f"{MARGIN - first} bytes before its first element"
        if first >= end:
            gap = f"{first - end} bytes" if first > end else "right"
            return int(wrong.size), f"{gap} after its last element"
        return int(wrong.size), "between its rows (its first axis is strided)"

    def untouched(self) -> bool:
        """Whether an output still is as it was handed over."""
        return self.changed() == 0


class Unguarded:
    """An argument too large to copy or compare: handed over as it is."""

    def __init__(self, contents: Array, blocks: Array, kind: str, device: str) -> None:
        self.view, self.blocks, self.kind, self.device = contents, blocks, kind, device
        if kind == "numpy":
            self.argument: Any = contents
        elif kind == "torch":
            import torch

            word = getattr(torch, contents.dtype.name)
            if device == "cuda":
                self.argument = torch.zeros(contents.shape, dtype=word, device="cuda")
                self._copy(to_device=True)
            else:
                raw = torch.from_numpy(contents.view(np.uint8).reshape(-1))
                self.argument = raw.view(word).reshape(contents.shape)
        else:
            raise MemoryError("caches of more than 2**31 elements are checked with numpy or torch")

    def _copy(self, to_device: bool) -> None:
        import torch

        for block in self.blocks.tolist():
            host = torch.from_numpy(self.view[block].view(np.uint8).reshape(-1))
            there = self.argument[block].view(torch.uint8).reshape(-1)
            if to_device:
                there.copy_(host)
            else:
                host.copy_(there)

    def fill(self, contents: Array | None) -> None:
        """Put the blocks that matter back."""
        if contents is not None and contents is not self.view:
            self.view[self.blocks] = contents[self.blocks]
        if self.device == "cuda":
            self._copy(to_device=True)

    def fetch(self) -> None:
        """Bring the blocks that matter back from the device."""
        if self.device == "cuda":
            self._copy(to_device=False)

    def contents(self) -> Array:
        """The blocks that matter."""
        out: Array = self.view[self.blocks].copy()
        return out

    def changed(self) -> int:
        """Not looked at."""
        return 0

    def written_outside(self) -> tuple[int, str] | None:
        """Not looked at."""
        return None

    def untouched(self) -> bool:
        """Not looked at."""
        return False
