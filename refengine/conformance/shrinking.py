"""From a failing case to the smallest that still fails: greedy, and the same every time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from refengine.conformance.case import Case

Values = dict[str, Any]


def shrink(
    case: Case,
    smaller: Callable[[Mapping[str, Any]], Iterator[Values]],
    fails: Callable[[Case], bool],
    *,
    max_tries: int = 200,
    seconds: float = 10.0,
) -> Case:
    """Take the first smaller case that still fails, and again, until none does.

    Args:
        case: one that fails.
        smaller: proposals, the boldest first.
        fails: whether a case fails in the same way.
        max_tries: cases tried at most.
        seconds: time at most.
    """
    began, tries = time.monotonic(), 0
    found = True
    while found:
        found = False
        for values in smaller(case.values):
            if tries >= max_tries or time.monotonic() - began > seconds:
                return case
            tries += 1
            candidate = case.with_values(values)
            if fails(candidate):
                case, found = candidate, True
                break
    return case


def smaller_lists(
    values: Mapping[str, Any],
    keys: tuple[str, ...],
    fits: Callable[[Mapping[str, Any]], bool] = lambda values: True,
) -> Iterator[Values]:
    """Lists that belong together entry by entry: half of them, one fewer, smaller entries."""
    lists = [list(values[key]) for key in keys]
    count = len(lists[0])
    parts = [slice(i, i + 1) for i in range(count)] if count > 1 else []
    if count > 3:
        parts = [slice(0, count // 2), slice(count // 2, count), *parts]
    for part in parts:
        yield {**values, **{key: entries[part] for key, entries in zip(keys, lists, strict=True)}}
    for i in range(count):
        for key, entries in zip(keys, lists, strict=True):
            for size in _below(entries[i]):
                changed = [*entries[:i], size, *entries[i + 1 :]]
                proposal = {**values, key: changed}
                if fits(proposal):
                    yield proposal
        together = [_below(entries[i]) for entries in lists]
        if len(keys) > 1 and all(together):
            step = [entries[i] - 1 for entries in lists]
            shorter = {
                key: [*entries[:i], size, *entries[i + 1 :]]
                for key, entries, size in zip(keys, lists, step, strict=True)
            }
            if fits({**values, **shorter}):
                yield {**values, **shorter}


def _below(size: int) -> list[int]:
    """Smaller lengths: one, half, one fewer."""
    return sorted({1, size // 2, size - 1} - {size, 0}) if size > 1 else []


def smaller_numbers(
    values: Mapping[str, Any], key: str, default: int, sizes: tuple[int, ...]
) -> Iterator[Values]:
    """Smaller values of one key, the smallest first."""
    now = values.get(key, default)
    for size in sizes:
        if size < now:
            yield {**values, key: size}
