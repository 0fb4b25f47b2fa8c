"""How wrappers hand rows to compiled loops: as ``[outer, inner, width]`` views of float32.

Rows lie along the last axis, which must be contiguous; the axes before it may have any stride, so
that heads of one ``[tokens, heads, head_dim]`` product need not be copied out of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refengine.cpu.arrays import FLOAT32, Array
from refengine.cpu.jit import inner


def as_rows(name: str, array: Array) -> Array:
    """A 1-, 2- or 3-D float32 array as a 3-D view of its rows.

    Raises:
        ValueError: where the dtype, the number of axes or the last axis' stride does not fit.
    """
    if array.dtype != FLOAT32:
        raise ValueError(f"{name} must be float32, got {array.dtype}")
    contiguous = array.shape[-1:] == (1,) or array.strides[-1:] == (array.itemsize,)
    if array.size and not contiguous:
        raise ValueError(
            f"{name} must be contiguous along its last axis, "
            f"got shape {list(array.shape)} with strides {list(array.strides)} bytes"
        )
    if array.ndim == 3:
        return array
    if array.ndim == 2:
        return array[:, np.newaxis, :]
    if array.ndim == 1:
        return array[np.newaxis, np.newaxis, :]
    raise ValueError(f"{name} must have 1 to 3 axes, got shape {list(array.shape)}")


@inner
def row_start(rows: Any, outer: int, index: int) -> int:
    """Element offset of a row of a 3-D float32 array."""
    start: int = outer * (rows.strides[0] // 4) + index * (rows.strides[1] // 4)
    return start
