"""What the suite knows about ``write_kv``, ``copy_blocks``, ``swap_blocks``: exact to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from refengine.conformance.attention import HUGE_HINT
from refengine.conformance.case import Case
from refengine.conformance.large import empty_cache
from refengine.conformance.precision import (
    Array,
    activation_dtype,
    bits,
    cache_dtype,
    rounded,
    single,
)
from refengine.conformance.problem import Expected, Location, Mistake, Problem
from refengine.conformance.shrinking import smaller_numbers

Outputs = dict[str, Array]


class WriteKv:
    """``write_kv``."""

    name = "write_kv"
    arguments = ("key", "value", "key_cache", "value_cache", "slot_mapping")

    def build(self, case: Case, variation: int = 0) -> Problem:
        """Tokens to arbitrary slots, some of them padding."""
        rng = np.random.default_rng([case.seed, variation])
        num_tokens, padding = case.get("num_tokens", 9), case.get("padding", 0)
        heads, head_dim = case.get("num_kv_heads", 2), case.get("head_dim", 64)
        block_size, huge = case.get("block_size", 16), bool(case.get("huge", False))
        row = block_size * heads * head_dim
        num_blocks = 2**31 // row + 64 if huge else -(-num_tokens // block_size) + 3
        num_slots = num_blocks * block_size
        dtype, low = activation_dtype(case.dtype), cache_dtype(case.dtype)
        if huge:  # half of the slots past 2**31 elements, half near the start
            far = num_slots - 1 - rng.permutation(60 * block_size)[:num_tokens]
            slots = np.where(np.arange(num_tokens) % 2, far, far % (20 * block_size))
        elif case.get("slots", "scattered") == "neighbours":
            slots = np.arange(num_tokens) + rng.integers(num_slots - num_tokens + 1)
        else:
            slots = rng.permutation(num_slots)[:num_tokens]
        slots = slots.astype(np.int64)
        slots[rng.permutation(num_tokens)[:padding]] = -1
        shape = (num_blocks, block_size, heads, head_dim)
        arguments: dict[str, Any] = {}
        for name in ("key", "value"):
            values = rng.standard_normal((num_tokens, heads, head_dim))
            if case.get("extremes", False):  # rounding ties, subnormals, the largest numbers
                special = np.array([1 + 2**-8, 1 + 3 * 2**-8, 2**-24, -0.0, 65519.0, -3e38, 1e-40])
                values = np.where(
                    rng.random(values.shape) < 0.5, rng.choice(special, values.shape), values
                )
            arguments[name] = rounded(values, dtype)
        for name in ("key_cache", "value_cache"):
            cache = empty_cache(shape, low, huge)
            if not huge:
                cache[...] = rounded(rng.standard_normal(shape), low)
                cache[rng.random(shape[:2]) < 0.3] = np.nan
            arguments[name] = cache
        arguments["slot_mapping"] = slots
        sparse = np.unique(slots[slots >= 0] // block_size) if huge else None
        if sparse is not None:  # where offsets that wrap at 2**32 or 2**31 elements would land
            wrapped = (slots[slots >= 0] * heads * head_dim) % 2**31 // row
            sparse = np.unique(np.concatenate([sparse, wrapped]))
        gaps = {"key": heads * head_dim, "value": heads * head_dim} if case.get("strided") else {}
        return Problem(case, arguments, ("key_cache", "value_cache"), gaps, sparse)

    def expected(self, problem: Problem) -> dict[str, Expected]:
        """The caches as they were, but for the slots that were written."""
        return {name: Expected(cache) for name, cache in _write(problem.arguments, problem).items()}

    def locate(
        self, problem: Problem, output: str, index: tuple[int, ...], got: Array, expected: Expected
    ) -> Location:
        """Block, slot, and the token that should have gone there, if any."""
        block, offset, head, dim = index
        if problem.sparse is not None:
            block = int(problem.sparse[block])
        slot = block * problem.arguments["key_cache"].shape[1] + offset
        tokens = np.flatnonzero(problem.arguments["slot_mapping"] == slot)
        token = int(tokens[-1]) if tokens.size else None
        return Location(
            token=token, head=head, dim=dim, block=block, slot=slot, array=output
        )  # fmt: skip

    def mistakes(self, problem: Problem) -> list[Mistake]:
        """Known mistakes of scattering."""

        def with_slots(change: Callable[[Array, int], Array]) -> Callable[[Problem], Outputs]:
            def compute(problem: Problem) -> Outputs:
                arguments = dict(problem.arguments)
                num_slots = arguments["key_cache"].shape[0] * arguments["key_cache"].shape[1]
                changed = change(arguments["slot_mapping"].copy(), num_slots)
                return _write({**arguments, "slot_mapping": changed}, problem)

            return compute

        def swapped(problem: Problem) -> Outputs:
            arguments = dict(problem.arguments)
            arguments["key"], arguments["value"] = arguments["value"], arguments["key"]
            return _write(arguments, problem)

        if problem.sparse is not None:
            return [
                Mistake(HUGE_HINT, lambda p: _write({**p.arguments, "slot_mapping": _none(p)}, p))
            ]
        return [
            Mistake(
                "padding is written: slot -1 is taken for the last slot",
                with_slots(lambda slots, count: np.where(slots < 0, count - 1, slots)),
            ),
            Mistake(
                "padding is written: slot -1 is taken for slot 0",
                with_slots(lambda slots, count: np.maximum(slots, 0)),
            ),
            Mistake(
                "slots one too high",
                with_slots(lambda slots, count: np.where(slots < 0, -1, (slots + 1) % count)),
            ),
            Mistake(
                "slot 0 is taken for padding",
                with_slots(lambda slots, count: np.where(slots == 0, -1, slots)),
            ),
            Mistake(
                "the last token is not written",
                with_slots(
                    lambda slots, count: np.where(np.arange(slots.size) < slots.size - 1, slots, -1)
                ),
            ),
            Mistake("keys and values exchanged", swapped),
            Mistake(
                "values are not written",
                lambda p: {**_write(p.arguments, p), "value_cache": p.arguments["value_cache"]},
            ),
            Mistake(
                "rounded towards zero, not to nearest even",
                lambda p: _write(p.arguments, p, _truncated),
            ),
            Mistake(
                "cache layout: written as [block, head, slot, dim], not [block, slot, head, dim]",
                lambda p: _write(p.arguments, p, hnd=True),
            ),
        ]

    def smaller(self, values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Fewer tokens, then smaller everything."""
        for proposal in smaller_numbers(values, "num_tokens", 9, (1, 2, 3, 5, 8, 16, 64)):
            yield {**proposal, "padding": min(values.get("padding", 0), proposal["num_tokens"])}
        if values.get("huge"):
            return
        yield from smaller_numbers(values, "padding", 0, (0, 1))
        yield from smaller_numbers(values, "num_kv_heads", 2, (1, 2))
        yield from smaller_numbers(values, "head_dim", 64, (1, 2, 4, 8, 16))
        yield from smaller_numbers(values, "block_size", 16, (1, 2, 4, 8))
        for key in ("strided", "extremes", "slots", "repeats"):
            if key in values:
                yield {k: v for k, v in values.items() if k != key}

    def traffic(self, problem: Problem) -> tuple[int, int]:
        """Read once, written once."""
        arguments = problem.arguments
        elements = arguments["key"].size + arguments["value"].size
        return elements * (arguments["key"].itemsize + arguments["key_cache"].itemsize), 0


def _none(problem: Problem) -> Array:
    slots = problem.arguments["slot_mapping"]
    cache = problem.arguments["key_cache"]
    row = cache.shape[2] * cache.shape[3]
    return np.where(slots * row >= 2**31, -1, slots)


def _truncated(values: Array, dtype: Any) -> Array:
    if values.dtype == dtype or np.dtype(dtype).name != "bfloat16":
        return rounded(values, dtype)
    return (bits(single(values)) >> 16).astype(np.uint16).view(dtype)


def _write(
    arguments: dict[str, Any],
    problem: Problem,
    convert: Callable[[Array, Any], Array] = rounded,
    hnd: bool = False,
) -> Outputs:
    """The caches after the call (of a huge cache, the blocks that matter)."""
    slots = arguments["slot_mapping"]
    out: Outputs = {}
    for source, name in (("key", "key_cache"), ("value", "value_cache")):
        cache = arguments[name]
        num_blocks, block_size, heads, head_dim = cache.shape
        kept = np.arange(num_blocks) if problem.sparse is None else problem.sparse
        result = cache[kept].copy()
        for token, slot in enumerate(slots.tolist()):
            if slot < 0 or slot // block_size not in kept:
                continue
            row = convert(arguments[source][token], cache.dtype)
            place = int(np.searchsorted(kept, slot // block_size))
            if hnd:
                view = result.reshape(-1, heads, block_size, head_dim)
                view[place, :, slot % block_size] = row
            else:
                result[place, slot % block_size] = row
        out[name] = result
    return out


class CopyBlocks:
    """``copy_blocks``: inside one set of caches, pair after pair."""

    name = "copy_blocks"
    arguments: tuple[str, ...] = ("key_caches", "value_caches", "block_mapping")
    outputs: tuple[str, ...] = ("key_caches", "value_caches")

    def build(self, case: Case, variation: int = 0) -> Problem:
        """Caches of several layers, and pairs of blocks."""
        rng = np.random.default_rng([case.seed, variation])
        num_pairs, num_blocks = case.get("num_pairs", 3), case.get("num_blocks", 8)
        if case.get("pairs", "apart") == "chain":  # each reads what the one before wrote
            ids = rng.permutation(num_blocks)[: num_pairs + 1]
            mapping = np.stack([ids[:-1], ids[1:]], axis=1)
        elif case.get("pairs") == "fan":  # one source, many destinations
            ids = rng.permutation(num_blocks)[: num_pairs + 1]
            mapping = np.stack([np.full(num_pairs, ids[0]), ids[1:]], axis=1)
        else:
            mapping = rng.permutation(num_blocks)[: 2 * num_pairs].reshape(-1, 2)
        arguments = self._caches(case, rng)
        arguments["block_mapping"] = mapping.astype(np.int64)
        return Problem(case, arguments, self.outputs)

    def _caches(self, case: Case, rng: np.random.Generator) -> dict[str, Any]:
        shape = self._shape(case, case.get("num_blocks", 8))
        return {name: _caches(shape, case, rng) for name in ("key_caches", "value_caches")}

    @staticmethod
    def _shape(case: Case, num_blocks: int) -> tuple[int, ...]:
        heads, head_dim = case.get("num_kv_heads", 2), case.get("head_dim", 16)
        return (case.get("num_layers", 2), num_blocks, case.get("block_size", 4), heads, head_dim)

    def _result(
        self, arguments: dict[str, Any], mapping: Array | None = None, layers: Any = slice(None)
    ) -> Outputs:
        out = {name: arguments[name].copy() for name in self.outputs}
        for source, destination in arguments["block_mapping"] if mapping is None else mapping:
            for name in self.outputs:
                out[name][layers, destination] = self._source(arguments, out, name)[layers, source]
        return out

    def _source(self, arguments: dict[str, Any], out: Outputs, output: str) -> Array:
        return out[output]

    def expected(self, problem: Problem) -> dict[str, Expected]:
        """The destination caches, pair after pair."""
        return {name: Expected(cache) for name, cache in self._result(problem.arguments).items()}

    def locate(
        self, problem: Problem, output: str, index: tuple[int, ...], got: Array, expected: Expected
    ) -> Location:
        """Block and slot of the destination."""
        _, block, offset, head, dim = index
        slot = block * expected.exact.shape[2] + offset
        return Location(head=head, dim=dim, block=block, slot=slot, array=output)

    def mistakes(self, problem: Problem) -> list[Mistake]:
        """Known mistakes of copying."""
        first = self.outputs[0]

        def at_once(problem: Problem) -> Outputs:
            arguments = problem.arguments
            out = {name: arguments[name].copy() for name in self.outputs}
            for name in self.outputs:
                source = self._source(arguments, arguments, name)
                for a, b in arguments["block_mapping"]:
                    out[name][:, b] = source[:, a]
            return out

        def backwards(problem: Problem) -> Outputs:
            arguments = problem.arguments
            mapping, limit = arguments["block_mapping"][:, ::-1], arguments[first].shape[1]
            return self._result(arguments, mapping[(mapping < limit).all(axis=1)])

        return [
            Mistake("source and destination exchanged", backwards),
            Mistake(
                "pairs not carried out in order: a later one must read what an earlier one wrote",
                at_once,
            ),
            Mistake(
                "only the first layer is copied",
                lambda p: self._result(p.arguments, layers=slice(0, 1)),
            ),
            Mistake(
                "the last pair is not copied",
                lambda p: self._result(p.arguments, p.arguments["block_mapping"][:-1]),
            ),
            Mistake(
                "values are not copied",
                lambda p: {
                    **self._result(p.arguments), self.outputs[1]: p.arguments[self.outputs[1]]
                },
            ),
        ]  # fmt: skip

    def smaller(self, values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Fewer pairs, layers, blocks; then smaller blocks."""
        yield from smaller_numbers(values, "num_pairs", 3, (1, 2, 3, 8))
        yield from smaller_numbers(values, "num_layers", 2, (1, 2))
        pairs = values.get("num_pairs", 3)
        needed = max(2 * pairs, 2)
        yield from smaller_numbers(values, "num_blocks", 8, (needed, needed + 1))
        yield from smaller_numbers(values, "num_kv_heads", 2, (1,))
        yield from smaller_numbers(values, "head_dim", 16, (1, 2, 4, 8))
        yield from smaller_numbers(values, "block_size", 4, (1, 2))

    def traffic(self, problem: Problem) -> tuple[int, int]:
        """Every copied block read once and written once, keys and values."""
        cache = problem.arguments[self.outputs[0]]
        pairs = problem.arguments["block_mapping"].shape[0]
        return 4 * pairs * cache.nbytes // cache.shape[1], 0


class SwapBlocks(CopyBlocks):
    """``swap_blocks``: from one set of caches into another."""

    name = "swap_blocks"
    outputs = ("destination_key_caches", "destination_value_caches")
    arguments = ("source_key_caches", "source_value_caches", *outputs, "block_mapping")

    def build(self, case: Case, variation: int = 0) -> Problem:
        """Two sets of caches with different numbers of blocks."""
        problem = super().build(case, variation)
        rng = np.random.default_rng([case.seed, variation, 1])
        wide = problem.arguments["destination_key_caches"].shape[1]
        num_pairs = problem.arguments["block_mapping"].shape[0]
        narrow = case.get("num_blocks", 8)
        columns = [rng.permutation(count)[:num_pairs] for count in (narrow, wide)]
        problem.arguments["block_mapping"] = np.stack(columns, axis=1).astype(np.int64)
        return problem

    def _caches(self, case: Case, rng: np.random.Generator) -> dict[str, Any]:
        count = case.get("num_blocks", 8)
        return {
            name: _caches(self._shape(case, count + extra), case, rng)
            for name, extra in zip(self.arguments[:4], (0, 0, 3, 3), strict=True)
        }

    def _source(self, arguments: dict[str, Any], out: Outputs, output: str) -> Array:
        source: Array = arguments[output.replace("destination", "source")]
        return source


def _caches(shape: tuple[int, ...], case: Case, rng: np.random.Generator) -> Array:
    caches = rounded(rng.standard_normal(shape), cache_dtype(case.dtype))
    caches[rng.random(shape[:3]) < 0.2] = np.nan  # copied like anything else
    return caches
