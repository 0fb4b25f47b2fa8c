"""Reading and writing elements of any dtype as float32, 16 bytes at a time where rows allow it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from . import ptx
from .ptx import F32, U32


class Elements(NamedTuple):
    """How a kernel handles one dtype.

    ``load(pointer, index, values, at)`` reads ``width`` elements from ``pointer[index]`` into the
    float32 array ``values[at:]``; ``store`` writes them back, rounded to nearest even;
    ``round(values, at)`` rounds them in place as storing and loading would.
    """

    width: int
    pointer: Any
    load: Callable[..., Any]
    store: Callable[..., Any]
    round: Callable[..., Any]
    itemsize: int


_UNPACK = {"bfloat16": (ptx.bf16_lo, ptx.bf16_hi), "float16": (ptx.f16_lo, ptx.f16_hi)}
_PACK = {"bfloat16": ptx.pack_bf16, "float16": ptx.pack_f16}


@functools.cache
def elements(dtype: str, *, wide: bool) -> Elements:
    """The loads and stores for ``dtype``; ``wide`` asks for 16 bytes at once."""
    if dtype == "float32":
        return _wide_float32() if wide else _single_float32()
    return _wide_half(dtype) if wide else _single_half(dtype)


def _keep_float32(values: Any, at: Any) -> None:
    """float32 arithmetic is already float32."""


_keep = ptx.device(_keep_float32)


def _wide_float32() -> Elements:
    def load(pointer: Any, index: Any, values: Any, at: Any) -> None:
        x = ptx.load16(pointer, index)
        for i in range(4):
            values[at + i] = ptx.uint_as_float(x[i])

    def store(pointer: Any, index: Any, values: Any, at: Any) -> None:
        ptx.store16(
            pointer,
            index,
            ptx.float_as_uint(values[at]),
            ptx.float_as_uint(values[at + 1]),
            ptx.float_as_uint(values[at + 2]),
            ptx.float_as_uint(values[at + 3]),
        )

    return Elements(4, ptx.POINTER_F32, ptx.device(load), ptx.device(store), _keep, 4)


def _single_float32() -> Elements:
    def load(pointer: Any, index: Any, values: Any, at: Any) -> None:
        values[at] = pointer[index]

    def store(pointer: Any, index: Any, values: Any, at: Any) -> None:
        pointer[index] = values[at]

    return Elements(1, ptx.POINTER_F32, ptx.device(load), ptx.device(store), _keep, 4)


def _wide_half(dtype: str) -> Elements:
    lo, hi = _UNPACK[dtype]
    pack = _PACK[dtype]

    def load(pointer: Any, index: Any, values: Any, at: Any) -> None:
        x = ptx.load16(pointer, index)
        for i in range(4):
            values[at + 2 * i] = lo(x[i])
            values[at + 2 * i + 1] = hi(x[i])

    def store(pointer: Any, index: Any, values: Any, at: Any) -> None:
        ptx.store16(
            pointer,
            index,
            pack(values[at], values[at + 1]),
            pack(values[at + 2], values[at + 3]),
            pack(values[at + 4], values[at + 5]),
            pack(values[at + 6], values[at + 7]),
        )

    def round_to(values: Any, at: Any) -> None:
        for i in range(4):
            x = pack(values[at + 2 * i], values[at + 2 * i + 1])
            values[at + 2 * i] = lo(x)
            values[at + 2 * i + 1] = hi(x)

    functions = (ptx.device(load), ptx.device(store), ptx.device(round_to))
    return Elements(8, ptx.POINTER_U16, *functions, 2)


def _single_half(dtype: str) -> Elements:
    lo, pack = _UNPACK[dtype][0], _PACK[dtype]

    def load(pointer: Any, index: Any, values: Any, at: Any) -> None:
        values[at] = lo(U32(pointer[index]))

    def store(pointer: Any, index: Any, values: Any, at: Any) -> None:
        pointer[index] = ptx.U16(pack(values[at], F32(0.0)) & U32(0xFFFF))

    def round_to(values: Any, at: Any) -> None:
        values[at] = lo(pack(values[at], F32(0.0)))

    functions = (ptx.device(load), ptx.device(store), ptx.device(round_to))
    return Elements(1, ptx.POINTER_U16, *functions, 2)
