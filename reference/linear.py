"""Products with a weight matrix, and where weights are kept."""

from __future__ import annotations

import numpy as np

from .bfloat16 import Array, narrow, storage_dtype, widen
from .validation import check_linear, check_shape


def allocate_weights(count: int, out_features: int, in_features: int, dtype: str) -> Array:
    """Room for ``count`` matrices: ``[count, out_features, in_features]``, plain rows.

    Args:
        count: how many, usually one a layer.
        out_features: rows.
        in_features: columns.
        dtype: "float32", "float16" or "bfloat16" (kept as uint16).

    Raises:
        ValueError: for another dtype.
    """
    return np.empty((count, out_features, in_features), storage_dtype(dtype))


def store_weight(weights: Array, index: int, weight: Array) -> None:
    """Put one ``[out_features, in_features]`` matrix into its place, rounded to what is kept.

    Raises:
        ValueError: where the shape does not fit.
    """
    check_shape("weight", weight, weights.shape[1:], "as allocated")
    weights[index] = narrow(widen(weight), weights.dtype)


def store_vector(vector: Array) -> Array:
    """A norm weight, bias or table of any shape, as float32."""
    return np.array(widen(vector))


def embedding(token_ids: Array, weight: Array, out: Array) -> None:
    """``out[t] = weight[token_ids[t]]``.

    Args:
        token_ids: ``[num_tokens]`` int64.
        weight: ``[vocab_size, width]``.
        out: ``[num_tokens, width]``.

    Raises:
        ValueError: where a shape does not fit or a token id has no row.
    """
    check_shape("weight", weight, ("vocab_size", "width"))
    check_shape("token_ids", token_ids, ("num_tokens",))
    check_shape("out", out, (token_ids.shape[0], weight.shape[1]), "tokens, width of weight")
    wrong = np.flatnonzero((token_ids < 0) | (token_ids >= weight.shape[0]))
    if wrong.size:
        raise ValueError(
            f"token_ids[{wrong[0]}] must be 0 to {weight.shape[0] - 1}, a row of weight, "
            f"got {token_ids[wrong[0]]}"
        )
    out[...] = narrow(widen(weight[token_ids]), out.dtype)


def linear(x: Array, weight: Array, bias: Array | None, out: Array) -> None:
    """``out[t, o] = bias[o] + sum_i x[t, i] * weight[o, i]``.

    Sums are float32. With low-precision weights x is rounded to their dtype first: that is what
    hardware multiplies.

    Args:
        x: ``[num_tokens, in_features]``.
        weight: ``[out_features, in_features]``, one matrix of ``allocate_weights``.
        bias: ``[out_features]``, or None.
        out: ``[num_tokens, out_features]``.

    Raises:
        ValueError: where a shape does not fit.
    """
    check_linear(x, weight, bias, out)
    rounded = widen(narrow(widen(x), weight.dtype))  # [num_tokens, in_features]
    result = rounded @ widen(weight).T  # [num_tokens, out_features]
    if bias is not None:
        result += widen(bias)
    out[...] = narrow(result, out.dtype)
