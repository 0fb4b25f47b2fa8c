"""Checks of a kernel's arguments: shapes, dtypes, memory layout; what is wrong, what is wanted.

Nothing here reads device memory, except in debug mode (``REFENGINE_CUDA_DEBUG=1``), which also
checks the values of block tables, lengths and slots, at the price of waiting for the device.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import ptx

Array = Any
DEBUG = os.environ.get("REFENGINE_CUDA_DEBUG", "0") not in ("", "0")
FLOATS = ("float32", "float16", "bfloat16")

_names: dict[Any, str] = {}


def dtype_name(array: Array) -> str:
    """``"bfloat16"``, ``"int32"`` ...; a NumPy uint16 array stands for bfloat16."""
    dtype = array.dtype
    name = _names.get(dtype)
    if name is None:
        name = str(dtype).removeprefix("torch.")
        _names[dtype] = name = "bfloat16" if name == "uint16" else name
    return name


def strides(array: Array) -> tuple[int, ...]:
    """Strides in elements."""
    if ptx.SIMULATED:
        return tuple(s // array.itemsize for s in array.strides)
    return tuple(array.stride())


def check_array(
    name: str,
    array: Array,
    shape: Sequence[int | None],
    dtypes: Sequence[str] = FLOATS,
    *,
    strided_rows: bool = False,
    pinned_host: bool = False,
) -> None:
    """Check one array.

    Args:
        name: what the caller knows the argument as.
        array: a torch CUDA tensor, or a NumPy array in the simulator.
        shape: wanted sizes; None takes any.
        dtypes: names of the dtypes taken.
        strided_rows: the first axis may have any stride (a slice of a wider array).
        pinned_host: page-locked host memory will do too.

    Raises:
        ValueError: with the argument, what came and what was wanted.
    """
    if ptx.SIMULATED:
        if not isinstance(array, np.ndarray):
            raise ValueError(
                f"{name}: got {type(array).__name__}; the simulator takes NumPy arrays"
            )
    elif not getattr(array, "is_cuda", False) and not (
        pinned_host and hasattr(array, "is_pinned") and array.is_pinned()
    ):
        where = getattr(array, "device", "host memory")
        raise ValueError(
            f"{name}: got {type(array).__name__} on {where}; wanted a CUDA tensor"
            f"{' or page-locked host memory' if pinned_host else ''}"
        )
    got = tuple(array.shape)
    if len(got) != len(shape) or any(
        want is not None and size != want for size, want in zip(got, shape, strict=True)
    ):
        wanted = "[" + ", ".join("any" if s is None else str(s) for s in shape) + "]"
        raise ValueError(f"{name}: got shape {list(got)}; wanted {wanted}")
    if dtype_name(array) not in dtypes:
        raise ValueError(f"{name}: got dtype {array.dtype}; wanted {' or '.join(dtypes)}")
    _check_layout(name, got, strides(array), strided_rows)


def _check_layout(
    name: str, shape: tuple[int, ...], steps: tuple[int, ...], strided_rows: bool
) -> None:
    want = 1
    if 0 in shape:
        return
    for axis in range(len(shape) - 1, -1, -1):
        free = strided_rows and axis == 0 and steps[0] >= want
        if shape[axis] > 1 and steps[axis] != want and not free:
            raise ValueError(
                f"{name}: got strides {list(steps)} for shape {list(shape)}; wanted a contiguous "
                f"array{' (its first axis may be strided)' if strided_rows else ''}: "
                "call .contiguous()"
            )
        want *= shape[axis]


def check_same_dtype(**arrays: Array) -> str:
    """All arrays share one dtype; returns its name."""
    names = {name: dtype_name(array) for name, array in arrays.items()}
    if len(set(names.values())) > 1:
        came = ", ".join(f"{name} {dtype}" for name, dtype in names.items())
        raise ValueError(f"mixed dtypes: got {came}; wanted one dtype for all")
    return next(iter(names.values()))


def check_range(name: str, array: Array, low: int, high: int) -> None:
    """In debug mode: every value lies in ``low <= value < high``."""
    if not DEBUG or 0 in array.shape:
        return
    least, most = int(array.min()), int(array.max())
    if least < low or most >= high:
        raise ValueError(f"{name}: got values {least}..{most}; wanted {low}..{high - 1}")


def check_sequences(
    num_tokens: int,
    num_blocks: int,
    block_size: int,
    block_tables: Array,
    seq_lens: Array,
    query_start_loc: Array,
    sliding_window: int | None,
) -> None:
    """In debug mode: what ``paged_attention`` would read exists (this waits for the device)."""
    tables, starts = block_tables.tolist(), query_start_loc.tolist()
    room = len(tables[0]) * block_size if tables else 0
    if starts[0] != 0 or starts[-1] > num_tokens or starts != sorted(starts):
        raise ValueError(
            f"query_start_loc: got {starts}; wanted numbers that rise from 0 to at most "
            f"{num_tokens}, query's tokens"
        )
    for i, (length, table) in enumerate(zip(seq_lens.tolist(), tables, strict=True)):
        new = starts[i + 1] - starts[i]
        if not 0 <= length <= room:
            raise ValueError(
                f"seq_lens[{i}]: got {length}; wanted 0 to {room}, what a row of block_tables holds"
            )
        if length and new > length:
            raise ValueError(
                f"query_start_loc: got {new} new tokens for sequence {i}; wanted at most its "
                f"{length} tokens"
            )
        seen = max(0, length - new - sliding_window + 1) if sliding_window else 0
        for column in range(seen // block_size, -(-length // block_size) if new else 0):
            if not 0 <= table[column] < num_blocks:
                raise ValueError(
                    f"block_tables[{i}, {column}]: got {table[column]}; wanted a block of the "
                    f"cache, 0 to {num_blocks - 1}"
                )


def is_wide(row_elements: int, itemsize: int, *steps_and_addresses: tuple[int, Any]) -> bool:
    """Whether rows can be moved 16 bytes at a time.

    Args:
        row_elements: elements of a row.
        itemsize: bytes of an element.
        steps_and_addresses: for each array, the elements from row to row and the array's address.
    """
    if row_elements * itemsize % 16:
        return False
    return all(
        step * itemsize % 16 == 0 and (ptx.SIMULATED or address % 16 == 0)
        for step, address in steps_and_addresses
    )
