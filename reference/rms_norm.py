"""Root mean square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

import numpy as np

from .bfloat16 import Array, narrow, widen
from .validation import check_fused_add_rms_norm, check_rms_norm


def rms_norm(x: Array, weight: Array, eps: float, out: Array) -> None:
    """Normalise the last axis: ``out = x / sqrt(mean(x ** 2) + eps) * weight``.

    Args:
        x: ``[..., width]``: a token's hidden state, or one of its heads.
        weight: ``[width]``.
        eps: added to the mean of squares.
        out: like x; may be x.

    Raises:
        ValueError: where a shape does not fit.
    """
    check_rms_norm(x, weight, out)
    wide = widen(x)
    mean_of_squares = np.mean(wide * wide, axis=-1, keepdims=True)  # [..., 1]
    scale = np.float32(1) / np.sqrt(mean_of_squares + np.float32(eps))
    out[...] = narrow(wide * scale * widen(weight), out.dtype)


def fused_add_rms_norm(x: Array, residual: Array, weight: Array, eps: float, out: Array) -> None:
    """``residual += x``, then ``out = rms_norm(residual)``.

    Every sublayer ends with the first and the next begins with the second, so fast kernels do both
    while the row is at hand.

    Args:
        x: ``[..., width]``: a sublayer's result.
        residual: like x; receives the sum.
        weight: ``[width]``.
        eps: added to the mean of squares.
        out: like x; may be x.

    Raises:
        ValueError: where a shape does not fit.
    """
    check_fused_add_rms_norm(x, residual, weight, out)
    residual[...] = narrow(widen(residual) + widen(x), residual.dtype)
    rms_norm(residual, weight, eps, out)
