"""Copying whole cache blocks, on a device or to the host and back; twin of ``reference.blocks``."""

from __future__ import annotations

import functools
from typing import Any

from numba import cuda

from . import checks, launch, ptx
from .launch import Kernel
from .ptx import U32, U64

Array = Any
THREADS = 256
PIECES = 4  # 16-byte pieces that a thread has in flight
WORDS = 4 * PIECES


def copy_blocks(key_caches: Array, value_caches: Array, block_mapping: Array) -> None:
    """Copy blocks inside every layer's cache (copy-on-write).

    Args:
        key_caches: ``[num_layers, num_blocks, block_size, num_kv_heads, head_dim]``, written.
        value_caches: the same shape and dtype, written.
        block_mapping: ``[num_pairs, 2]`` int64: source and destination block. No block is a
            destination twice, nor both a source and a destination.

    Raises:
        ValueError: on shapes, dtypes or layouts that do not fit.
    """
    _check_caches("key_caches", key_caches, "value_caches", value_caches)
    _copy(key_caches, value_caches, key_caches, value_caches, block_mapping)


def swap_blocks(
    source_key_caches: Array,
    source_value_caches: Array,
    destination_key_caches: Array,
    destination_value_caches: Array,
    block_mapping: Array,
) -> None:
    """Copy blocks from one set of caches to another: device to host, or back.

    The host's caches must be page-locked (``torch.empty(..., pin_memory=True)``): the kernel reads
    and writes them over the bus, all layers and blocks in one launch. To swap beside computation,
    launch on a stream of its own (``launch.set_stream``).

    Args:
        source_key_caches: ``[num_layers, num_blocks, block_size, num_kv_heads, head_dim]``.
        source_value_caches: the same shape and dtype.
        destination_key_caches: the same but for ``num_blocks``, written.
        destination_value_caches: as ``destination_key_caches``, written.
        block_mapping: ``[num_pairs, 2]`` int64: source and destination block; on the device or
            page-locked.

    Raises:
        ValueError: on shapes, dtypes, layouts or memory that do not fit.
    """
    _check_caches(
        "source_key_caches", source_key_caches, "source_value_caches", source_value_caches
    )
    _check_caches(
        "destination_key_caches",
        destination_key_caches,
        "destination_value_caches",
        destination_value_caches,
    )
    got, want = tuple(destination_key_caches.shape), tuple(source_key_caches.shape)
    if got[:1] + got[2:] != want[:1] + want[2:]:
        raise ValueError(
            f"destination_key_caches: got shape {list(got)}; wanted that of source_key_caches, "
            f"{list(want)}, but for num_blocks"
        )
    checks.check_same_dtype(
        source_key_caches=source_key_caches, destination_key_caches=destination_key_caches
    )
    _copy(
        source_key_caches,
        source_value_caches,
        destination_key_caches,
        destination_value_caches,
        block_mapping,
    )


def _check_caches(key_name: str, keys: Array, value_name: str, values: Array) -> None:
    checks.check_array(key_name, keys, (None,) * 5, pinned_host=True)
    checks.check_array(value_name, values, keys.shape, pinned_host=True)
    checks.check_same_dtype(**{key_name: keys, value_name: values})


def _copy(
    source_keys: Array,
    source_values: Array,
    destination_keys: Array,
    destination_values: Array,
    block_mapping: Array,
) -> None:
    checks.check_array("block_mapping", block_mapping, (None, 2), ("int64",), pinned_host=True)
    num_layers, source_blocks = source_keys.shape[:2]
    destination_blocks = destination_keys.shape[1]
    checks.check_range("block_mapping[:, 0]", block_mapping[:, 0], 0, source_blocks)
    checks.check_range("block_mapping[:, 1]", block_mapping[:, 1], 0, destination_blocks)
    num_pairs = block_mapping.shape[0]
    if num_pairs == 0 or num_layers == 0:
        return
    itemsize = 4 if checks.dtype_name(source_keys) == "float32" else 2
    kind = ptx.POINTER_U32 if itemsize == 4 else ptx.POINTER_U16
    _, _, block_size, num_heads, head_dim = source_keys.shape
    arrays = (source_keys, source_values, destination_keys, destination_values)
    addresses = [launch.address(array, kind) for array in arrays]
    block = block_size * num_heads * head_dim
    wide = checks.is_wide(block, itemsize, *((block, at) for at in addresses))
    kernel, parts = _kernel(block, itemsize, wide)
    kernel(
        (num_pairs * parts, num_layers, 2),
        *addresses,
        launch.address(block_mapping, ptx.POINTER_I64),
        source_blocks,
        destination_blocks,
    )


@functools.cache
def _kernel(BLOCK: int, itemsize: int, wide: bool) -> tuple[Kernel, int]:
    """A thread block copies one part of one cache block, of one layer, of keys or of values."""
    WIDTH = 16 // itemsize if wide else 1
    PART = THREADS * PIECES * WIDTH
    PARTS = -(-BLOCK // PART)
    kind = ptx.POINTER_U32 if itemsize == 4 else ptx.POINTER_U16

    def copy(
        source: Any, destination: Any, source_block: Any, destination_block: Any, first: Any
    ) -> None:
        from_ = source_block * U64(BLOCK) + U64(first)
        to = destination_block * U64(BLOCK) + U64(first)
        words = cuda.local.array(WORDS, U32)
        for i in range(PIECES):
            if first + U32(i * THREADS * WIDTH) < U32(BLOCK):
                x = ptx.load16(source, from_ + U64(i * THREADS * WIDTH))
                for j in range(4):
                    words[4 * i + j] = x[j]
        for i in range(PIECES):
            if first + U32(i * THREADS * WIDTH) < U32(BLOCK):
                w = 4 * i
                at = to + U64(i * THREADS * WIDTH)
                ptx.store16(destination, at, words[w], words[w + 1], words[w + 2], words[w + 3])

    def copy_narrow(
        source: Any, destination: Any, source_block: Any, destination_block: Any, first: Any
    ) -> None:
        for i in range(PIECES):
            at = U64(first) + U64(i * THREADS)
            if at < U64(BLOCK):
                x = source[source_block * U64(BLOCK) + at]
                destination[destination_block * U64(BLOCK) + at] = x

    copy_part = ptx.device(copy if wide else copy_narrow)

    def kernel(
        source_keys: Any,
        source_values: Any,
        destination_keys: Any,
        destination_values: Any,
        block_mapping: Any,
        source_blocks: Any,
        destination_blocks: Any,
    ) -> None:
        ptx.wait_for_previous_kernel()
        ptx.let_next_kernel_start()
        pair = U32(cuda.blockIdx.x) // U32(PARTS)
        part = U32(cuda.blockIdx.x) % U32(PARTS)
        layer = U64(cuda.blockIdx.y)
        source_block = layer * U64(source_blocks) + U64(block_mapping[U64(pair) * U64(2)])
        destination_block = layer * U64(destination_blocks) + U64(
            block_mapping[U64(pair) * U64(2) + U64(1)]
        )
        first = U32(part * U32(PART)) + U32(U32(cuda.threadIdx.x) * U32(WIDTH))
        if cuda.blockIdx.z == 0:
            copy_part(source_keys, destination_keys, source_block, destination_block, first)
        else:
            copy_part(source_values, destination_values, source_block, destination_block, first)

    parameters = (kind, kind, kind, kind, ptx.POINTER_I64, ptx.U64, ptx.U64)
    return Kernel(kernel, parameters, threads=THREADS, blocks_per_sm=8), PARTS
