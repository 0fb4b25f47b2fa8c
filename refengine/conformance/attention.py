"""What the suite knows about ``paged_attention``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from refengine.conformance.attention_math import (
    Variant,
    attend,
    dense_low_precision,
    first_order_errors,
    gather,
    sequences,
    slots_of,
)
from refengine.conformance.budget import scale_unit
from refengine.conformance.case import Case
from refengine.conformance.large import empty_cache
from refengine.conformance.layout import Pages, lay_out
from refengine.conformance.precision import Array, activation_dtype, cache_dtype, rounded, wide
from refengine.conformance.problem import Expected, Location, Mistake, Problem
from refengine.conformance.shrinking import smaller_lists, smaller_numbers

MISTAKES = {
    "causal mask off by one: a query sees one token too many, the one after it": Variant(ahead=1),
    "causal mask off by one: a query does not see itself": Variant(ahead=-1),
    "no causal mask: every query sees the whole sequence": Variant(ahead=None),
    "causal mask starts at the chunk: the context before it is not counted": Variant(top_left=True),
    "sliding window one token too long": Variant(window=1),
    "sliding window one token too short": Variant(window=-1),
    "sliding window ignored": Variant(window="ignored"),
    "soft cap ignored": Variant(cap="ignored"),
    "soft cap after the mask: hidden tokens come back with a score of -cap": Variant(
        cap="after mask"
    ),
    "soft cap before the scale": Variant(cap="before scale"),
    "missing scale": Variant(scale=0),
    "scale applied twice": Variant(scale=2),
    "mask before scale, with a finite number: large scores win over the mask": Variant(
        finite_mask=True
    ),
    "wrong head mapping: query head h reads h % num_kv_heads, not h // group": Variant(
        heads="modulo"
    ),
    "wrong head mapping: every query head reads key-value head 0": Variant(heads="first"),
    "wrong head mapping for values: h % num_kv_heads, not h // group": Variant(
        value_heads="modulo"
    ),
    "wrong head mapping for keys: h % num_kv_heads, not h // group": Variant(
        heads="modulo", value_heads="grouped"
    ),
    "block table ignored: blocks are read as if they lay in order": Variant(pages="logical"),
    "unordered blocks: a sequence's blocks are read sorted by id": Variant(pages="sorted"),
    "unordered blocks: a sequence's blocks are read last to first": Variant(pages="reversed"),
    "every sequence reads the first sequence's block table": Variant(pages="first row"),
    "last partial block dropped": Variant(last_block="dropped"),
    "rows past the sequence's end are read: a weight of 0 times NaN is NaN": Variant(
        last_block="whole"
    ),
    "table read past its end: the block after the last holds NaN": Variant(last_block="next"),
    "the oldest token is left out": Variant(first_token=False),
    "cache layout: read as [block, head, slot, dim], not [block, slot, head, dim]": Variant(
        hnd=True
    ),
    "keys and values exchanged": Variant(swapped=True),
    "softmax without the running maximum: exp overflows": Variant(maximum=False),
    "softmax not divided by its sum": Variant(divisor="none"),
    "softmax divided by the length, not by its sum": Variant(divisor="length"),
}


# What a case can do without, tried in this order when it is shrunk.
_PROPERTIES = (
    *("strided", "edges", "previous", "table", "garbage", "sliding_window", "logits_soft_cap"),
    *("scale", "logits", "logits_offset", "repeats", "alone"),
)


class PagedAttention:
    """``paged_attention``: how to pose it, what is right, where an element comes from."""

    name = "paged_attention"
    arguments = (
        *("query", "key_cache", "value_cache", "block_tables", "seq_lens", "query_start_loc"),
        *("scale", "sliding_window", "logits_soft_cap", "out"),
    )

    def build(self, case: Case, variation: int = 0) -> Problem:
        """Make the arrays; see ``cases.toml`` for the values."""
        rng = np.random.default_rng([case.seed, variation])
        seq_lens, query_lens = list(case.get("seq_lens")), list(case.get("query_lens"))
        num_q_heads, num_kv_heads = case.get("num_q_heads", 4), case.get("num_kv_heads", 2)
        head_dim, block_size = case.get("head_dim", 64), case.get("block_size", 16)
        huge = bool(case.get("huge", False))
        row = block_size * num_kv_heads * head_dim
        pages = lay_out(
            seq_lens,
            block_size,
            np.random.default_rng(case.seed),  # the same blocks whatever they hold
            table=case.get("table", "permuted"),
            garbage=case.get("garbage", "nan block"),
            num_blocks=2**31 // row + 64 if huge else None,
            min_block=2**31 // row if huge else 0,
        )
        dtype, low = activation_dtype(case.dtype), cache_dtype(case.dtype)
        shape = (pages.num_blocks, block_size, num_kv_heads, head_dim)
        scale = float(case.get("scale", head_dim**-0.5))
        # Scores reach about `logits`; 3.5 is what random numbers give by themselves.
        size = float(np.sqrt(case.get("logits", 3.5) / 3.5))
        query = rng.standard_normal((sum(query_lens), num_q_heads, head_dim)) * size
        caches = []
        for spread in (size, 1.0):
            cache = empty_cache(shape, low, huge)
            used = _used_blocks(pages, seq_lens, block_size)
            rows = rng.standard_normal((used.size, *shape[1:])) * spread
            cache[used] = rounded(rows, low)
            if not huge:  # nobody owns these: whoever reads them shows it
                cache[~pages.owned] = np.nan
            caches.append(cache)
        offset = float(case.get("logits_offset", 0.0))
        if offset:  # one element of every query and key, exact in any format, sets all scores
            root = 2.0 ** np.round(np.log2(abs(offset) / scale) / 2)
            query[..., 0], caches[0][..., 0] = root, np.sign(offset) * root
            if not huge:
                caches[0][~pages.owned] = np.nan
        window = case.get("sliding_window", 0) or None
        arguments: dict[str, Any] = {
            "query": rounded(query, dtype),
            "key_cache": caches[0],
            "value_cache": caches[1],
            "block_tables": pages.tables,
            "seq_lens": np.array(seq_lens, np.int32),
            "query_start_loc": np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32),
            "scale": scale,
            "sliding_window": window,
            "logits_soft_cap": float(case.get("logits_soft_cap", 0)) or None,
            "out": np.empty(query.shape, dtype),
        }
        if case.get("edges", False):
            _tempt(arguments)
        gaps = {}
        if case.get("strided", False):  # as in one [tokens, query and key and value heads, d] array
            gaps = {"query": 2 * num_kv_heads * head_dim, "out": 2 * num_kv_heads * head_dim}
        sparse = np.unique(_used_blocks(pages, seq_lens, block_size)) if huge else None
        return Problem(case, arguments, ("out",), gaps, sparse)

    def expected(self, problem: Problem) -> dict[str, Expected]:
        """Float64 attention, and the budget of dense attention in the same precision."""
        arguments = problem.arguments
        dtype = arguments["out"].dtype
        exact = attend(arguments)
        dense = dense_low_precision(arguments, dtype)
        first_order = first_order_errors(arguments, exact, dtype)
        return {"out": Expected(exact, scale_unit(first_order, dense, exact))}

    def locate(
        self, problem: Problem, output: str, index: tuple[int, ...], got: Array, expected: Expected
    ) -> Location:
        """The element's sequence, token and head, and the slot that the error came from.

        That is the slot whose value row the error points along; where none stands out, the
        token's own.
        """
        token, head, dim = index
        arguments = problem.arguments
        part = next(p for p in sequences(arguments) if p.rows.start <= token < p.rows.stop)
        position = int(part.query_positions[token - part.rows.start])
        slot = _guilty_slot(arguments, part.sequence, head, got[token, head], expected, token)
        if slot is None and position >= 0:
            slot = int(slots_of(arguments, part.sequence, np.array([position]), "table")[0])
        block = None if slot is None else slot // arguments["key_cache"].shape[1]
        return Location(part.sequence, token, position, head, dim, block, slot)

    def mistakes(self, problem: Problem) -> list[Mistake]:
        """All of ``MISTAKES``."""

        def computer(variant: Variant) -> Any:
            return lambda problem: {"out": attend(problem.arguments, variant)}

        if problem.sparse is not None:
            return [Mistake(HUGE_HINT, _wrapped)]
        found = [Mistake(hint, computer(variant)) for hint, variant in MISTAKES.items()]
        if problem.case.get("previous"):
            before = self.build(problem.case, variation=1).arguments

            def stale(*names: str) -> Any:
                old = {name: before[name] for name in names}
                return lambda problem: {"out": attend({**problem.arguments, **old})}

            found += [
                Mistake("stale keys: what a block held before it was reused", stale("key_cache")),
                Mistake("stale values: what a block held before", stale("value_cache")),
                Mistake("stale blocks: what they held before", stale("key_cache", "value_cache")),
            ]
        return found

    def smaller(self, values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Fewer sequences, shorter ones, fewer heads, smaller heads and blocks."""
        yield from smaller_lists(values, ("seq_lens", "query_lens"), _fits)
        heads, kv_heads = values.get("num_q_heads", 4), values.get("num_kv_heads", 2)
        for kv in sorted({1, kv_heads // 2, kv_heads - 1} - {0}):
            for group in sorted({1, 2, heads // kv_heads}):
                if kv * group < heads and kv <= kv_heads:
                    yield {**values, "num_q_heads": kv * group, "num_kv_heads": kv}
        if values.get("huge"):
            return
        yield from smaller_numbers(values, "head_dim", 64, (1, 2, 4, 8, 16, 32))
        yield from smaller_numbers(values, "block_size", 16, (1, 2, 4, 8))
        for key in _PROPERTIES:
            if key in values:
                yield {k: v for k, v in values.items() if k != key}
        if values.get("sliding_window", 0) > 1:
            yield from smaller_numbers(values, "sliding_window", 1, (1, 2, 4, 8))

    def traffic(self, problem: Problem) -> tuple[int, int]:
        """Every visible key and value once per sequence, the queries and the result."""
        arguments = problem.arguments
        _, _, num_kv_heads, head_dim = arguments["key_cache"].shape
        window, operations, keys = arguments["sliding_window"], 0, 0
        for part in sequences(arguments):
            seen = part.query_positions + 1
            seen = np.minimum(seen, window) if window else seen
            operations += 4 * int(seen.sum()) * arguments["query"].shape[1] * head_dim
            first = max(0, int(part.query_positions[0]) - window + 1) if window else 0
            keys += part.seq_len - first
        itemsize = arguments["key_cache"].itemsize
        moved = 2 * keys * num_kv_heads * head_dim * itemsize
        return moved + arguments["query"].nbytes + arguments["out"].nbytes, operations


HUGE_HINT = "32-bit slot arithmetic: element offsets past 2**31 wrap round"


def _wrapped(problem: Problem) -> dict[str, Array]:
    """What offsets that wrap at 32 bits read: slots near the start, which hold zeros."""
    arguments = dict(problem.arguments)
    arguments["value_cache"] = np.zeros((1, *arguments["value_cache"].shape[1:]), np.float32)
    arguments["key_cache"] = arguments["value_cache"]
    arguments["block_tables"] = arguments["block_tables"] * 0
    return {"out": attend(arguments)}


def _used_blocks(pages: Pages, seq_lens: list[int], block_size: int) -> Array:
    used = [
        pages.tables[s, : -(-length // block_size)].astype(np.int64)
        for s, length in enumerate(seq_lens)
    ]
    return np.concatenate([*used, np.empty(0, np.int64)])


def _tempt(arguments: dict[str, Any]) -> None:
    """Make the keys just outside what a query may see the ones that it would like best."""
    query, window = arguments["query"], arguments["sliding_window"]
    key_cache = arguments["key_cache"]
    group = query.shape[1] // key_cache.shape[2]
    for part in sequences(arguments):
        places = [part.query_positions + 1]
        if window is not None:
            places.append(part.query_positions - window)
        for positions in places:
            inside = (positions >= 0) & (positions < part.seq_len)
            if not inside.any():
                continue
            slots = slots_of(arguments, part.sequence, positions[inside], "table")
            flat = key_cache.reshape(-1, *key_cache.shape[2:])
            flat[slots] = query[part.rows][inside][:, ::group].astype(key_cache.dtype)


def _guilty_slot(
    arguments: dict[str, Any],
    sequence: int,
    head: int,
    got: Array,
    expected: Expected,
    token: int,
) -> int | None:
    """The slot of the sequence's table whose value row explains the error, if one does."""
    block_size = arguments["key_cache"].shape[1]
    columns = arguments["block_tables"].shape[1]
    positions = np.arange(columns * block_size)
    slots = slots_of(arguments, sequence, positions, "table")
    seq_len = int(arguments["seq_lens"][sequence])
    finite = np.isfinite(wide(got))
    values = arguments["value_cache"]
    kv_head = head // (arguments["query"].shape[1] // values.shape[2])
    if not finite.all():  # the first slot past the end is where reading too far begins
        past = slots[seq_len:]
        past = past[past >= 0]
        return int(past[0]) if past.size and seq_len else None
    inside = np.flatnonzero(slots >= 0)
    if expected.exact.shape[2] < 4 or inside.size == 0:
        return None
    rows = wide(gather(values, slots[inside], np.array([kv_head])))[0]  # [len, d]
    exact = expected.exact[token, head]
    error, toward = wide(got) - exact, rows - exact
    with np.errstate(all="ignore"):
        cosines = np.abs(toward @ error) / (
            np.linalg.norm(toward, axis=1) * np.linalg.norm(error) + 1e-300
        )
    cosines = np.nan_to_num(cosines)
    best = int(np.argmax(cosines))
    return int(slots[inside[best]]) if cosines[best] > 0.95 else None


def _fits(values: Mapping[str, Any]) -> bool:
    return all(
        q <= length or length == 0
        for q, length in zip(values["query_lens"], values["seq_lens"], strict=True)
    )
