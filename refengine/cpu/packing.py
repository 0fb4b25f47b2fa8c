"""Weights as the matrix product reads them: panels of outputs, one step after another.

A panel holds ``PANEL`` rows of ``[out, in]``. What the product needs in one step lies together, and
the steps in their order, so that reading a matrix is one pass through memory:

    float32:   step i holds weight[o, i] of the panel's outputs o
    bfloat16:  step i holds weight[o, 2 i], weight[o, 2 i + 1] of the panel's outputs

Outputs are filled up to whole panels, and bfloat16 inputs to an even number, with zeros. How large
a panel is depends on the processor (tile_kernels.py); packed weights are never written to disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numba import types

from refengine.cpu.arrays import BFLOAT16, Array, aligned_empty, bits
from refengine.cpu.jit import inner, parallel
from refengine.cpu.simd import F32, I32, LANES, intrinsic
from refengine.cpu.simd_memory import flat, load_first, store
from refengine.cpu.tile_kernels import PANEL
from refengine.reference.validation import check_shape


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """One ``[out_features, in_features]`` matrix.

    Attributes:
        panels: ``[num_panels, steps, PANEL, inputs a step]``; uint16 for bfloat16, or float32.
        no_bias: ``[num_panels * PANEL]`` float32 zeros, the bias of a product without one.
    """

    panels: Array
    out_features: int
    in_features: int
    no_bias: Array

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32 or ``ml_dtypes.bfloat16``."""
        return BFLOAT16 if self.panels.dtype == np.uint16 else self.panels.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return self.out_features, self.in_features

    def unpack(self) -> Array:
        """The matrix as it was, ``[out_features, in_features]``."""
        num_panels, steps, panel, width = self.panels.shape
        rows = self.panels.transpose(0, 2, 1, 3).reshape(num_panels * panel, steps * width)
        return rows[: self.out_features, : self.in_features].view(self.dtype)


@dataclass(frozen=True, slots=True)
class PackedStack:
    """Matrices of one shape behind each other; indexing gives one of them, as a view.

    Attributes:
        panels: ``[count, num_panels, steps, PANEL, inputs a step]``.
    """

    panels: Array
    out_features: int
    in_features: int
    no_bias: Array

    def __len__(self) -> int:
        return len(self.panels)

    def __getitem__(self, index: int) -> PackedWeight:
        return PackedWeight(self.panels[index], self.out_features, self.in_features, self.no_bias)


def allocate_weights(count: int, out_features: int, in_features: int, dtype: str) -> PackedStack:
    """Room for ``count`` matrices; ``store_weight`` fills it.

    Args:
        count: matrices.
        out_features: rows of each.
        in_features: columns of each.
        dtype: "float32" or "bfloat16".

    Raises:
        ValueError: where the dtype is another one or a size is not positive.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"CPU weights are float32 or bfloat16, got {dtype!r}")
    if min(count, out_features, in_features) < 1:
        raise ValueError(
            "count, out_features and in_features must be at least 1, "
            f"got {count}, {out_features} and {in_features}"
        )
    width = 2 if dtype == "bfloat16" else 1
    storage = np.uint16 if dtype == "bfloat16" else np.float32
    num_panels, steps = -(-out_features // PANEL), -(-in_features // width)
    panels = aligned_empty((count, num_panels, steps, PANEL, width), storage)
    return PackedStack(panels, out_features, in_features, np.zeros(num_panels * PANEL, np.float32))


def store_weight(weights: PackedStack, index: int, weight: Array) -> None:
    """Put one ``[out, in]`` matrix into its place.

    Args:
        weights: what ``allocate_weights`` gave.
        index: which of its matrices.
        weight: floating point; rounded to nearest even where the stack is bfloat16. uint16 is
            taken for the bits of bfloat16.

    Raises:
        ValueError: where the matrix has another shape or dtype.
    """
    wanted = (weights.out_features, weights.in_features)
    check_shape("weight", weight, wanted, "as allocated")
    if weight.dtype not in (BFLOAT16, np.uint16, np.float32, np.float16, np.float64):
        raise ValueError(f"weight must be a floating-point array, got {weight.dtype}")
    source = bits(weight)
    if source.dtype not in (np.uint16, np.float32):
        source = source.astype(np.float32)
    _pack(np.ascontiguousarray(source), weights.panels[index])


def store_vector(vector: Array) -> Array:
    """A norm weight, bias or table of any shape, as float32."""
    return np.array(vector.view(BFLOAT16) if vector.dtype == np.uint16 else vector, np.float32)


def prepare_weight(weight: Array) -> PackedWeight:
    """One ``[out, in]`` matrix on its own; float16 becomes float32."""
    dtype = "bfloat16" if weight.dtype in (BFLOAT16, np.uint16) else "float32"
    weights = allocate_weights(1, weight.shape[0], weight.shape[1], dtype)
    store_weight(weights, 0, weight)
    return weights[0]


def embedding(token_ids: Array, weight: PackedWeight, out: Array) -> None:
    """``out[t] = weight[token_ids[t]]``, read from the panels.

    Args:
        token_ids: ``[num_tokens]`` int64.
        weight: ``[vocab_size, width]``, packed.
        out: ``[num_tokens, width]`` float32.

    Raises:
        ValueError: where a shape does not fit or a token id has no row.
    """
    check_shape("token_ids", token_ids, ("num_tokens",))
    wanted = (token_ids.shape[0], weight.in_features)
    check_shape("out", out, wanted, "tokens, width of weight")
    wrong = np.flatnonzero((token_ids < 0) | (token_ids >= weight.out_features))
    if wrong.size:
        raise ValueError(
            f"token_ids[{wrong[0]}] must be 0 to {weight.out_features - 1}, a row of weight, "
            f"got {token_ids[wrong[0]]}"
        )
    _embedding(token_ids, weight.panels, weight.in_features, out)


@intrinsic
def as_float32(typing_context: Any, value: Any) -> Any:
    """A stored element, bfloat16 bits or float32, as float32."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if signature.args[0] == types.float32:
            return args[0]
        upper = builder.shl(builder.zext(args[0], I32), I32(16))
        return builder.bitcast(upper, F32)

    return types.float32(value), code


@parallel
def _pack(source: Any, panels: Any) -> None:
    """``source [out, in]`` into ``panels [num_panels, steps, PANEL, width]``."""
    out_features, in_features = source.shape
    num_panels, steps, _, width = panels.shape
    padded = (in_features // LANES + 2) * LANES  # room for whole loads past a row's end
    for panel in numba.prange(num_panels):
        # 1 The panel's rows in the panel's dtype, zeros where the matrix has ended.
        rows = np.zeros((PANEL, padded), panels.dtype)
        for lane in range(min(PANEL, out_features - panel * PANEL)):
            source_at = (panel * PANEL + lane) * in_features
            for i in range(0, in_features, LANES):
                value = load_first(flat(source), source_at + i, in_features - i)
                store(flat(rows), lane * padded + i, value)
        # 2 Side by side.
        for step in range(steps):
            for lane in range(PANEL):
                for i in range(width):
                    panels[panel, step, lane, i] = rows[lane, step * width + i]


@inner
def unpack_row(panels: Any, row: Any, steps: Any, width: Any, out: Any, out_at: Any) -> None:
    """One row of a packed matrix, widened to float32.

    Args:
        panels: flat; uint16 or float32.
        row: which row.
        steps: of a panel.
        width: inputs a step, 2 for bfloat16 and 1 for float32.
        out: flat, float32.
        out_at: where the row begins in it; ``steps * width`` elements are written.
    """
    at = ((row // PANEL) * steps * PANEL + row % PANEL) * width
    for step in range(steps):
        for i in range(width):
            line = at + step * PANEL * width + i
            out[out_at + step * width + i] = as_float32(panels[line])


@parallel
def _embedding(token_ids: Any, panels: Any, in_features: Any, out: Any) -> None:
    _, steps, _, width = panels.shape
    for t in numba.prange(token_ids.shape[0]):
        row = np.empty(steps * width, np.float32)  # an odd row is one longer than out's
        unpack_row(flat(panels), token_ids[t], steps, width, row, 0)
        for i in range(in_features):
            out[t, i] = row[i]
