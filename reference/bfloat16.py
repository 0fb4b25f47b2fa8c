"""Reading and writing low-precision arrays with NumPy alone.

A bfloat16 is the upper half of a float32: same sign and exponent, 7 instead of 23 bits of fraction.
NumPy has no such type of its own, so arrays hold it either as ``ml_dtypes.bfloat16`` or as the
uint16 that has the same bits; both are taken everywhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]


def is_bfloat16(dtype: npt.DTypeLike) -> bool:
    """Whether an array's elements are bfloat16, under either of its two names."""
    dtype = np.dtype(dtype)
    return dtype.name == "bfloat16" or dtype == np.uint16


def widen(array: Array) -> Float32:
    """The same numbers as float32; a float32 array comes back as it is."""
    if is_bfloat16(array.dtype):
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def narrow(values: Array, dtype: npt.DTypeLike) -> Array:
    """float32 numbers rounded to nearest, ties to even, as an array of ``dtype``."""
    dtype = np.dtype(dtype)
    if not is_bfloat16(dtype):
        with np.errstate(over="ignore"):  # too large for float16 is infinity
            return values.astype(dtype, copy=False)
    bits = np.ascontiguousarray(values).view(np.uint32)
    # Adding half of the last place that is kept, less one where that place is even, carries into
    # it exactly when rounding up is right.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # A NaN could carry into the sign; keep its sign and make it the quiet one.
    rounded = np.where(np.isnan(values), ((bits >> 16) & 0x8000) | 0x7FC0, rounded)
    return rounded.astype(np.uint16).view(dtype)


def storage_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype that holds "float32", "float16" or "bfloat16" (as uint16).

    Raises:
        ValueError: for another name.
    """
    dtypes = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
    if name not in dtypes:
        raise ValueError(f"dtype must be one of {', '.join(dtypes)}, got {name!r}")
    return np.dtype(dtypes[name])
