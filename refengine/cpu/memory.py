"""Arrays for activations and for the KV cache; twin of reference/memory.py."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from refengine.cpu.arrays import Array, aligned_empty, aligned_zeros


def empty(shape: tuple[int, ...]) -> Array:
    """An uninitialised float32 array for activations, on a cache line's boundary."""
    return aligned_empty(shape, np.float32)


def allocate_cache(
    num_layers: int,
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: str,
) -> tuple[Array, Array]:
    """Key and value caches of all layers, zeroed, on cache lines' boundaries.

    Args:
        num_layers: of the model.
        num_blocks: blocks a layer.
        block_size: tokens a block.
        num_kv_heads: of the model.
        head_dim: elements of a head.
        dtype: "float32" or "bfloat16" (``ml_dtypes.bfloat16``).

    Returns:
        Two arrays ``[num_layers, num_blocks, block_size, num_kv_heads, head_dim]``.

    Raises:
        ValueError: for another dtype.
    """
    dtypes = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
    if dtype not in dtypes:
        raise ValueError(f"dtype must be one of {', '.join(dtypes)} on the CPU, got {dtype!r}")
    shape = (num_layers, num_blocks, block_size, num_kv_heads, head_dim)
    return aligned_zeros(shape, dtypes[dtype]), aligned_zeros(shape, dtypes[dtype])


def allocate_host_cache(
    num_layers: int,
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: str,
) -> tuple[Array, Array]:
    """Caches to swap blocks to: on a CPU, just more of the same memory.

    Arguments, result and errors are those of ``allocate_cache``.
    """
    return allocate_cache(num_layers, num_blocks, block_size, num_kv_heads, head_dim, dtype)
