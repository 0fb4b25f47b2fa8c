"""Gated activations (Shazeer 2020, arXiv 2002.05202) and the soft cap of logits."""

from __future__ import annotations

import numpy as np

from .bfloat16 import Array, Float32, narrow, widen
from .validation import check_gated, check_soft_cap


def silu_and_mul(x: Array, out: Array) -> None:
    """``out = silu(x[:, :d]) * x[:, d:]``, where ``silu(a) = a / (1 + exp(-a))``.

    Args:
        x: ``[num_tokens, 2 * d]``: gate and what it gates, side by side, as one product gives them.
        out: ``[num_tokens, d]``.

    Raises:
        ValueError: where a shape does not fit.
    """
    check_gated(x, out)
    gate, up = _halves(x)  # [num_tokens, d] each
    with np.errstate(over="ignore"):  # exp of a large number is infinity, and a / infinity is 0
        silu = gate / (np.exp(-gate) + np.float32(1))
    out[...] = narrow(silu * up, out.dtype)


def gelu_tanh_and_mul(x: Array, out: Array) -> None:
    """``out = gelu(x[:, :d]) * x[:, d:]``, gelu in its tanh form.

    ``gelu(a) = a / 2 * (1 + tanh(sqrt(2 / pi) * (a + 0.044715 * a ** 3)))`` (Hendrycks and Gimpel
    2016, arXiv 1606.08415, section 2).

    Args:
        x: ``[num_tokens, 2 * d]``.
        out: ``[num_tokens, d]``.

    Raises:
        ValueError: where a shape does not fit.
    """
    check_gated(x, out)
    gate, up = _halves(x)  # [num_tokens, d] each
    inside = (gate + gate**3 * np.float32(0.044715)) * np.float32(np.sqrt(2 / np.pi))
    gelu = gate * np.float32(0.5) * (np.tanh(inside) + np.float32(1))
    out[...] = narrow(gelu * up, out.dtype)


def _halves(x: Array) -> tuple[Float32, Float32]:
    wide, half = widen(x), x.shape[1] // 2
    return wide[:, :half], wide[:, half:]


def soft_cap(x: Array, cap: float) -> None:
    """``x = cap * tanh(x / cap)``, in place: nearly x where it is small, never beyond the cap.

    Args:
        x: any shape.
        cap: positive.

    Raises:
        ValueError: where cap is not positive.
    """
    check_soft_cap(x, cap)
    x[...] = narrow(np.float32(cap) * np.tanh(widen(x) / np.float32(cap)), x.dtype)
