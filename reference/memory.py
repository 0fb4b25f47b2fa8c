"""Arrays for activations and for the KV cache."""

from __future__ import annotations

import numpy as np

from .bfloat16 import Array, storage_dtype


def empty(shape: tuple[int, ...]) -> Array:
    """An uninitialised float32 array for activations."""
    return np.empty(shape, np.float32)


def allocate_cache(
    num_layers: int,
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: str,
) -> tuple[Array, Array]:
    """Key and value caches of all layers, zeroed.

    Args:
        num_layers: of the model.
        num_blocks: blocks a layer.
        block_size: tokens a block.
        num_kv_heads: of the model.
        head_dim: elements of a head.
        dtype: "float32", "float16" or "bfloat16" (kept as uint16).

    Returns:
        Two arrays ``[num_layers, num_blocks, block_size, num_kv_heads, head_dim]``.

    Raises:
        ValueError: for another dtype.
    """
    shape = (num_layers, num_blocks, block_size, num_kv_heads, head_dim)
    return np.zeros(shape, storage_dtype(dtype)), np.zeros(shape, storage_dtype(dtype))


def allocate_host_cache(
    num_layers: int,
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: str,
) -> tuple[Array, Array]:
    """Caches to swap blocks to; where the cache itself is in host memory, just more of it.

    Arguments, result and errors are those of ``allocate_cache``.
    """
    return allocate_cache(num_layers, num_blocks, block_size, num_kv_heads, head_dim, dtype)
