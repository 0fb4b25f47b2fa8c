"""Number formats: what one rounding costs, and rounding to them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
_FORMATS: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
}

# What `--dtype` takes: the dtype of activations, and that of the KV cache.
DTYPES = {
    "float32": ("float32", "float32"),
    "float16": ("float16", "float16"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "float16-cache": ("float32", "float16"),
    "bfloat16-cache": ("float32", "bfloat16"),
}

# The largest relative error of rounding to nearest.
UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# The largest absolute error where numbers are too small for that: kernels may flush float32 and
# bfloat16 subnormals to zero; float16 keeps them.
TINY = {"float32": 2.0**-126, "float16": 2.0**-25, "bfloat16": 2.0**-126}
SINGLE = UNIT_ROUNDOFF["float32"]


def format_name(dtype: npt.DTypeLike) -> str:
    """The format of an array's dtype: float32, float16 or bfloat16, as a text."""
    return np.dtype(dtype).name


def storage(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a format's name."""
    return _FORMATS[name]


def activation_dtype(dtype: str) -> np.dtype[Any]:
    """The dtype of activations, of a ``--dtype``."""
    return _FORMATS[DTYPES[dtype][0]]


def cache_dtype(dtype: str) -> np.dtype[Any]:
    """The dtype of the KV cache, of a ``--dtype``."""
    return _FORMATS[DTYPES[dtype][1]]


def is_low(dtype: npt.DTypeLike) -> bool:
    """Whether a format has 16 bits."""
    return np.dtype(dtype).itemsize == 2


def wide(array: Array) -> Float64:
    """The same numbers as float64."""
    return array.astype(np.float64)


def single(array: Array) -> npt.NDArray[np.float32]:
    """The same numbers as float32."""
    return array.astype(np.float32)


def rounded(values: Array, dtype: npt.DTypeLike) -> Array:
    """Values of a wider format, rounded to nearest even."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(dtype)


def bits(array: Array) -> Array:
    """The elements' bits as unsigned integers, so that NaN equals itself."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def budget_unit(name: str, exact: Float64) -> Float64:
    """What storing ``exact`` in the format costs: an element's share of any budget."""
    unit: Float64 = UNIT_ROUNDOFF[name] * np.abs(exact) + TINY[name]
    return unit
