"""Arrays for kernels: NumPy in the simulator, torch tensors on a GPU; and attention problems."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")
DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
TOLERANCE = {"float32": 2e-6, "float16": 6e-4, "bfloat16": 4e-3}


def on_device(array: np.ndarray) -> Any:
    """The array where kernels can reach it."""
    if SIMULATED:
        return array
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).cuda()
    return torch.from_numpy(array).cuda()


def on_host(array: Any) -> np.ndarray:
    """A float32 (or integer) copy on the host."""
    if not SIMULATED:
        import torch

        array = array.float().cpu() if array.dtype == torch.bfloat16 else array.cpu()
        array = array.numpy()
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array.copy()


def bits_of(array: Any) -> bytes:
    """The array's bytes, to compare to the bit."""
    if SIMULATED:
        return np.ascontiguousarray(array).tobytes()
    import torch

    if array.numel() == 0:
        return b""
    return array.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """``|got - want| / |want|``; NaN anywhere gives NaN."""
    difference = np.linalg.norm(got.astype(np.float64) - want)
    return float(difference / max(np.linalg.norm(want), 1e-30))


@dataclass
class Problem:
    """One batch of attention; slots that no sequence owns hold NaN, and unused entries -1."""

    lens: list[int]
    news: list[int]
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 64
    block_size: int = 16
    dtype: str = "bfloat16"
    window: int | None = None
    cap: float | None = None
    magnitude: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        num_q, num_kv = self.heads
        dtype = DTYPES[self.dtype]
        counts = [-(-n // self.block_size) for n in self.lens]
        order = np.random.default_rng(0).permutation(sum(counts) + 2)
        shape = (len(order), self.block_size, num_kv, self.head_dim)
        self.keys = np.full(shape, np.nan, np.float32).astype(dtype)
        self.values = self.keys.copy()
        self.tables = np.full((len(self.lens), max([*counts, 1])), -1, np.int32)
        queries, first = [], 0
        for i, (length, new) in enumerate(zip(self.lens, self.news, strict=True)):
            # A sequence's numbers depend on it alone, so that it is the same in any batch.
            rng = np.random.default_rng((self.seed, length, new))
            blocks = order[first : first + counts[i]]
            first += counts[i]
            self.tables[i, : counts[i]] = blocks
            at = np.arange(length)
            row = blocks[at // self.block_size], at % self.block_size
            scale = self.magnitude
            self.keys[row] = scale * rng.standard_normal((length, num_kv, self.head_dim))
            self.values[row] = rng.standard_normal((length, num_kv, self.head_dim))
            queries.append(scale * rng.standard_normal((new, num_q, self.head_dim)))
        self.query = np.concatenate(queries).astype(dtype)
        self.seq_lens = np.array(self.lens, np.int32)
        self.starts = np.concatenate([[0], np.cumsum(self.news)]).astype(np.int32)

    def arguments(self) -> list[Any]:
        """The contract's arguments, on the device; the last is ``out``, full of NaN."""
        out = np.full(self.query.shape, np.nan, np.float32).astype(DTYPES[self.dtype])
        arrays = (self.query, self.keys, self.values, self.tables, self.seq_lens, self.starts)
        return [
            *(on_device(array) for array in arrays),
            *(self.head_dim**-0.5, self.window, self.cap, on_device(out)),
        ]

    def reference(self) -> np.ndarray:
        """What the twin makes of it, in float64 where it matters to the error."""
        num_q, num_kv = self.heads
        result = np.zeros(self.query.shape)
        for i, (length, new) in enumerate(zip(self.lens, self.news, strict=True)):
            at = np.arange(length)
            blocks = self.tables[i][at // self.block_size]
            keys = self.keys[blocks, at % self.block_size].astype(np.float64)
            values = self.values[blocks, at % self.block_size].astype(np.float64)
            for j in range(new if length else 0):
                position = length - new + j
                first = max(0, position + 1 - self.window) if self.window else 0
                row = self.starts[i] + j
                for h in range(num_q):
                    head = h // (num_q // num_kv)
                    query = self.query[row, h].astype(np.float64)
                    scores = keys[first : position + 1, head] @ query * self.head_dim**-0.5
                    if self.cap:
                        scores = self.cap * np.tanh(scores / self.cap)
                    weights = np.exp(scores - scores.max())
                    result[row, h] = weights / weights.sum() @ values[first : position + 1, head]
        return result
