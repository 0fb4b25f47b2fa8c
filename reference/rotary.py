"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from .bfloat16 import Array, Float32, narrow, widen
from .validation import check_positions, check_rotary_embedding


class Scaling(Protocol):
    """How frequencies are stretched for long contexts; ``refengine.config.RopeScaling`` is one."""

    @property
    def rope_type(self) -> str:
        """Which kind: "linear" or "llama3"."""

    @property
    def factor(self) -> float:
        """How many times longer the context becomes."""

    @property
    def low_freq_factor(self) -> float:
        """For llama3: waves that fit fewer times into the old context are stretched fully."""

    @property
    def high_freq_factor(self) -> float:
        """For llama3: waves that fit more often are left alone."""

    @property
    def original_max_position_embeddings(self) -> int:
        """For llama3: the old context, in tokens."""


def build_cos_sin_cache(
    head_dim: int, num_positions: int, theta: float, scaling: Scaling | None = None
) -> Float32:
    """Cosines and sines of every position's rotation angles.

    Pair i of a head's elements turns by ``position * theta ** (-2 i / head_dim)``. Everything is
    computed in float32, as the code that models are trained with does: at position 8,000 its
    rounding of the angles is visible, and part of what the model has learnt.

    Args:
        head_dim: elements of a head that are rotated; even.
        num_positions: rows of the table.
        theta: the base; larger turns slower.
        scaling: how frequencies are stretched, or None.

    Returns:
        ``[num_positions, head_dim]`` float32: ``head_dim / 2`` cosines, then as many sines.

    Raises:
        ValueError: where head_dim is odd, or the scaling is of another kind.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even and at least 2 to rotate pairs, got {head_dim}")
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.float32(theta) ** exponents  # [head_dim / 2]
    if scaling is not None:
        frequencies = _scaled(frequencies, scaling)
    positions = np.arange(num_positions, dtype=np.float32)
    angles = positions[:, np.newaxis] * frequencies  # [num_positions, head_dim / 2]
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def _scaled(frequencies: Float32, scaling: Scaling) -> Float32:
    """Frequencies stretched for a longer context.

    "linear" (Chen et al. 2023, arXiv 2306.15595) divides all by the factor. "llama3" (Llama 3.1)
    leaves fast waves alone, divides slow ones, and blends between the two.
    """
    factor = np.float32(scaling.factor)
    if scaling.rope_type == "linear":
        return frequencies / factor
    if scaling.rope_type != "llama3":
        raise ValueError(f"rope_type must be linear or llama3, got {scaling.rope_type!r}")
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    # How often a wave fits into the old context.
    turns = np.float32(scaling.original_max_position_embeddings / (2 * np.pi)) * frequencies
    # 0 up to low turns, 1 from high turns on.
    kept = np.clip((turns - low) / (high - low), 0, 1) if high != low else turns > high
    return ((1 - kept) * frequencies / factor + kept * frequencies).astype(np.float32)


def rotary_embedding(positions: Array, query: Array, key: Array, cos_sin_cache: Array) -> None:
    """Rotate query and key heads by their positions, in place.

    Element i of a head's first half and element i of its second half are a point in the plane
    (GPT-NeoX pairing; the original paper pairs neighbours). After the rotation, a product of query
    and key depends on the distance of their positions alone.

    Args:
        positions: ``[num_tokens]`` int64.
        query: ``[num_tokens, num_q_heads, head_dim]``.
        key: ``[num_tokens, num_kv_heads, head_dim]``.
        cos_sin_cache: ``[num_positions, rotary_dim]`` from ``build_cos_sin_cache``; elements of a
            head past ``rotary_dim`` stay as they are.

    Raises:
        ValueError: where a shape does not fit or a position has no row in the table.
    """
    check_rotary_embedding(positions, query, key, cos_sin_cache)
    check_positions(positions, cos_sin_cache)
    half = cos_sin_cache.shape[1] // 2
    rows = cos_sin_cache[positions][:, np.newaxis, :]  # [num_tokens, 1, rotary_dim]
    cos, sin = rows[..., :half], rows[..., half:]
    for heads in (query, key):
        first = widen(heads[..., :half])  # [num_tokens, num_heads, rotary_dim / 2]
        second = widen(heads[..., half : 2 * half])
        rotated = first * cos - second * sin, second * cos + first * sin
        heads[..., :half] = narrow(rotated[0], heads.dtype)
        heads[..., half : 2 * half] = narrow(rotated[1], heads.dtype)
