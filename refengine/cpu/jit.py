"""How this folder's functions are compiled: one decorator for inner functions, one for loops.

Numba's disk cache asks only whether the file that holds a function has changed. Functions here are
inlined into others across files, so a stale caller would keep an old callee. ``_stamp`` therefore
covers the file and every file of this folder that it imports.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core.ccallback import CFunc

F = TypeVar("F", bound=Callable[..., Any])

_FOLDER = Path(__file__).parent
_IMPORT = re.compile(
    r"^from refengine\.cpu\.(\w+) import|^from refengine\.cpu import ([\w, ]+)", re.M
)

# No fast-math flags: they would let the compiler pick another order of summation wherever a
# function is inlined, and the same row would give other bits alone than in a batch. Sums are
# vectorised by hand instead (simd.py).
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
_CALLBACK_OPTIONS: dict[str, Any] = {"nopython": True, "error_model": "numpy"}


def inner(function: F) -> F:
    """Compile work on one item (a row, a token, a tile), to be called from compiled loops."""
    return _compile(function, **_OPTIONS)


def inlined(function: F) -> F:
    """Compile a few instructions that must become part of the loop that calls them.

    A call in the middle of a product would save and restore every register that holds a sum.
    """
    return _compile(function, forceinline=True, **_OPTIONS)


def parallel(function: F) -> F:
    """Compile a loop over items, whose ``numba.prange`` is spread over the threads."""
    return _compile(function, parallel=True, **_OPTIONS)


def compiled_address(function: Callable[..., Any], signature: Any) -> int:
    """Compile a function of pointers and integers; return the address of its code.

    A call through an address keeps a large function out of its callers: LLVM would optimise what is
    linked in once more in each of them.
    """
    callback = CFunc(function, (signature.args, signature.return_type), {}, dict(_CALLBACK_OPTIONS))
    try:
        callback.enable_caching()
        _use_stamp(callback, function)
    except RuntimeError:
        pass
    callback.compile()
    _CALLBACKS.append(callback)
    return cast(int, callback.address)


_CALLBACKS: list[CFunc] = []  # compiled code lives as long as its CFunc


def _compile(function: F, **options: Any) -> F:
    try:
        dispatcher = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(**options)(function)  # type: ignore[no-any-return]
    _use_stamp(dispatcher, function)
    return dispatcher  # type: ignore[no-any-return]


def _use_stamp(compiled: Any, function: Callable[..., Any]) -> None:
    """Let the disk cache look at all the files that a function is made from."""
    cache_file: Any = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    if hasattr(cache_file, "_source_stamp"):
        cache_file._source_stamp = _stamp(Path(function.__code__.co_filename))


@cache
def _stamp(path: Path) -> str:
    """A hash of a file's text and of the files of this folder that it imports, directly or not."""
    seen: set[Path] = set()
    waiting = [path, Path(__file__)]
    while waiting:
        current = waiting.pop()
        if current in seen or not current.exists():
            continue
        seen.add(current)
        for module, names in _IMPORT.findall(current.read_text(encoding="utf-8")):
            for name in [module] if module else names.split(","):
                waiting.append(_FOLDER / f"{name.strip()}.py")
    digest = hashlib.sha256()
    for current in sorted(seen):
        digest.update(current.read_bytes())
    return digest.hexdigest()
