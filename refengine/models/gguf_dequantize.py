"""GGML's storage formats to floating point.

The ``gguf`` package undoes every format. The three that small models mostly come in are repeated
here because writing straight into the result, a cache-sized piece at a time, is three times faster
and gives the same bits (a test compares them).
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize

# Blocks of 32 elements handled at once: 256 KiB of float32, which a core's cache holds.
_PIECE = 2048

_PLAIN: dict[GGMLQuantizationType, npt.DTypeLike] = {
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.BF16: ml_dtypes.bfloat16,
}


def dequantize(
    raw: npt.NDArray[np.uint8], kind: GGMLQuantizationType, shape: tuple[int, ...]
) -> npt.NDArray[np.generic]:
    """Stored bytes to a tensor.

    Args:
        raw: the tensor's bytes, ``[num_bytes]`` uint8.
        kind: how it is stored.
        shape: its shape, row-major.

    Returns:
        ``shape``: float32, float16 and bfloat16 as they are (a view), everything else float32.

    Raises:
        NotImplementedError: where the ``gguf`` package does not undo this format either.
    """
    if kind in _PLAIN:
        return raw.view(_PLAIN[kind]).reshape(shape)
    if kind == GGMLQuantizationType.Q8_0:
        return _q8_0(raw.reshape(-1, 34)).reshape(shape)
    if kind == GGMLQuantizationType.Q4_0:
        return _q4(raw.reshape(-1, 18), has_minimum=False).reshape(shape)
    if kind == GGMLQuantizationType.Q4_1:
        return _q4(raw.reshape(-1, 20), has_minimum=True).reshape(shape)
    rows = raw.reshape(math.prod(shape[:-1]), -1)
    result: npt.NDArray[np.float32] = gguf_dequantize(rows, kind)
    return result.reshape(shape)


def _q8_0(blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """``[n, 34]`` bytes (a float16 scale, 32 int8) to ``[n, 32]``: scale * q."""
    out = np.empty((len(blocks), 32), np.float32)
    for start in range(0, len(blocks), _PIECE):
        piece = blocks[start : start + _PIECE]
        scale = piece[:, :2].copy().view(np.float16).astype(np.float32)  # [n, 1]
        np.multiply(piece[:, 2:].view(np.int8), scale, out=out[start : start + _PIECE])
    return out


def _q4(blocks: npt.NDArray[np.uint8], *, has_minimum: bool) -> npt.NDArray[np.float32]:
    """Blocks of 4-bit numbers to ``[n, 32]``.

    Each block is a float16 scale, with ``has_minimum`` (Q4_1) a float16 minimum, then 16 bytes:
    the low halves are elements 0 to 15, the high halves 16 to 31. Q4_1 is scale * q + minimum,
    Q4_0 is scale * (q - 8).
    """
    header = 4 if has_minimum else 2
    out = np.empty((len(blocks), 2, 16), np.float32)
    for start in range(0, len(blocks), _PIECE):
        piece = blocks[start : start + _PIECE]
        target = out[start : start + _PIECE]  # [n, 2, 16]
        scales = piece[:, :header].copy().view(np.float16).astype(np.float32)  # [n, 1 or 2]
        packed = piece[:, header:]  # [n, 16]
        low, high = packed & 15, packed >> 4
        if not has_minimum:
            low, high = low.view(np.int8) - np.int8(8), high.view(np.int8) - np.int8(8)
        np.multiply(low, scales[:, :1], out=target[:, 0])
        np.multiply(high, scales[:, :1], out=target[:, 1])
        if has_minimum:
            target += scales[:, 1:, None]
    return out.reshape(len(blocks), 32)
