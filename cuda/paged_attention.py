"""Causal attention over a paged cache; twin of ``reference.paged_attention``.

One function for decode, prefill and mixed batches. It checks the arguments, picks rungs of the
ladder by shape, and launches them. What is picked for a sequence depends on that sequence and the
model's shape alone, never on the rest of the batch; so do the results, to the bit. (One exception,
below: a batch of as many tokens as sequences in which one sequence has several of the tokens.)

The ladder, with shares of the memory's rate (64 sequences of 2,048 tokens, bfloat16) or TFLOP/s
(one prompt of 8,192) on an H100; ``docs/performance.md`` has the whole tables:

| rung | file | picked for | reaches |
|---|---|---|---|
| plain | ``attention_plain`` | rows of odd size, heads above 128 | 6 % |
| grouped | ``attention_grouped`` | rows of odd size | 17 % |
| vectors (one split, many) | ``attention_vectors`` | float32 | 89 %, 86 % |
| decode | ``attention_decode`` | up to ``DECODE_TOKENS`` new tokens | 87 % |
| decode, bulk copies | ``attention_decode_bulk`` | the same on sm_90, blocks of 8 or 16 n | 97 % |
| prefill | ``attention_prefill`` | more new tokens | 339 |
| prefill, bulk copies | ``attention_prefill_bulk`` | the same on sm_90a, blocks as above | 578 |
"""

from __future__ import annotations

from typing import Any, NamedTuple

from . import (
    attention_decode,
    attention_decode_bulk,
    attention_grouped,
    attention_plain,
    attention_prefill,
    attention_prefill_bulk,
    attention_splits,
    attention_vectors,
    checks,
    launch,
    ptx,
)
from .elements import elements

Array = Any
# Sequences with up to so many new tokens are computed token by token on the decode rung.
DECODE_TOKENS = 4
UNLIMITED = 1 << 30
MAX_TOKENS = 65535  # the second and third side of a grid
_partial_sums = launch.Scratch(ptx.POINTER_F32)
_partial_stats = launch.Scratch(ptx.POINTER_F32)
_tickets = launch.Scratch(ptx.POINTER_U32)
_queue = launch.Scratch(ptx.POINTER_U32)


class Problem(NamedTuple):
    """The checked arguments of one call, as kernels take them."""

    dtype: str
    num_tokens: int
    num_seqs: int
    num_q_heads: int
    num_kv_heads: int
    group: int
    head_dim: int
    num_blocks: int
    block_size: int
    max_context: int
    capped: bool
    wide: bool  # rows can be read 16 bytes at a time
    caches: tuple[Array, Array]
    arrays: tuple[Any, ...]  # query, key_cache, value_cache, block_tables, lens, starts, out
    query_step: int
    table_step: int
    window: int  # 0 is none
    scale: Any
    cap: Any

    @property
    def numbers(self) -> tuple[Any, ...]:
        """The scalars that follow the arrays in every rung."""
        return self.query_step, self.table_step, self.window, self.scale, self.cap


def paged_attention(
    query: Array,
    key_cache: Array,
    value_cache: Array,
    block_tables: Array,
    seq_lens: Array,
    query_start_loc: Array,
    scale: float,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    out: Array,
) -> None:
    """Attend from each sequence's newest tokens to all of its tokens, page by page.

    Args:
        query: ``[num_tokens, num_q_heads, head_dim]`` float32, float16 or bfloat16; tokens may be
            strided. Sequence s has rows ``query_start_loc[s] .. query_start_loc[s + 1] - 1``; rows
            past the last sequence's are left alone.
        key_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]``, of query's dtype.
        value_cache: likewise.
        block_tables: ``[num_seqs, max_blocks]`` int32; rows may be strided.
        seq_lens: ``[num_seqs]`` int32: tokens in the cache, the new ones included.
        query_start_loc: ``[num_seqs + 1]`` int32.
        scale: multiplies query-key products.
        sliding_window: a query at position p sees positions above ``p - sliding_window``; None for
            all.
        logits_soft_cap: scaled products become ``cap * tanh(x / cap)``; None leaves them.
        out: ``[num_tokens, num_q_heads, head_dim]``, written.

    Raises:
        ValueError: on shapes, dtypes or layouts that do not fit.
    """
    arguments = (query, key_cache, value_cache, block_tables, seq_lens, query_start_loc)
    problem = _problem(*arguments, scale, sliding_window, logits_soft_cap, out)
    if problem.num_tokens == 0 or problem.num_seqs == 0:
        return
    if not problem.wide:
        run_grouped(problem) if problem.head_dim <= 128 else run_plain(problem)
    elif problem.dtype == "float32":
        run_vectors(problem)
    elif problem.head_dim % 16:
        run_decode(problem, UNLIMITED)
    else:
        # As many tokens as sequences is a decode batch, which a launch of the prefill rung that
        # finds nothing to do would slow down. Where it is not (some sequences have no new token,
        # one has many), the decode rung takes them all: right, if not to the bit the same.
        if problem.num_tokens == problem.num_seqs:
            run_decode(problem, UNLIMITED)
            return
        if problem.num_tokens > DECODE_TOKENS:
            run_prefill(problem, DECODE_TOKENS)
        run_decode(problem, DECODE_TOKENS)


def _problem(
    query: Array,
    key_cache: Array,
    value_cache: Array,
    block_tables: Array,
    seq_lens: Array,
    query_start_loc: Array,
    scale: float,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    out: Array,
) -> Problem:
    # 1 Shapes and layouts.
    checks.check_array("key_cache", key_cache, (None, None, None, None))
    num_blocks, block_size, num_kv_heads, head_dim = key_cache.shape
    checks.check_array("value_cache", value_cache, key_cache.shape)
    checks.check_array("query", query, (None, None, head_dim), strided_rows=True)
    num_tokens, num_q_heads, _ = query.shape
    if num_kv_heads == 0 or num_q_heads % num_kv_heads:
        raise ValueError(
            f"query: got {num_q_heads} heads; wanted a multiple of the cache's {num_kv_heads}"
        )
    checks.check_array("out", out, query.shape)
    checks.check_array("seq_lens", seq_lens, (None,), ("int32",))
    num_seqs = seq_lens.shape[0]
    checks.check_array(
        "block_tables", block_tables, (num_seqs, None), ("int32",), strided_rows=True
    )
    checks.check_array("query_start_loc", query_start_loc, (num_seqs + 1,), ("int32",))
    dtype = checks.check_same_dtype(
        query=query, key_cache=key_cache, value_cache=value_cache, out=out
    )
    # 2 Options.
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window: got {sliding_window}; wanted at least 1, or None")
    if logits_soft_cap is not None and not logits_soft_cap > 0:
        raise ValueError(f"logits_soft_cap: got {logits_soft_cap}; wanted above 0, or None")
    if checks.DEBUG:
        checks.check_sequences(
            num_tokens, num_blocks, block_size, block_tables, seq_lens, query_start_loc,
            sliding_window,
        )  # fmt: skip
    # 3 As kernels take them. Softmax is computed in powers of two; a cap's division joins scale.
    narrow = elements(dtype, wide=False)
    query_step = checks.strides(query)[0]
    half = (query, key_cache, value_cache)
    addresses = [launch.address(array, narrow.pointer) for array in (*half, out)]
    wide = checks.is_wide(
        head_dim, narrow.itemsize, (query_step, addresses[0]),
        *((head_dim, address) for address in addresses[1:]),
    )  # fmt: skip
    integers = (block_tables, seq_lens, query_start_loc)
    capped = logits_soft_cap is not None
    return Problem(
        dtype=dtype,
        num_tokens=num_tokens,
        num_seqs=num_seqs,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        group=num_q_heads // num_kv_heads,
        head_dim=head_dim,
        num_blocks=num_blocks,
        block_size=block_size,
        max_context=block_tables.shape[1] * block_size,
        capped=capped,
        wide=wide and head_dim <= 256,
        caches=(key_cache, value_cache),
        arrays=(
            *addresses[:3],
            *(launch.address(array, ptx.POINTER_I32) for array in integers),
            addresses[3],
        ),
        query_step=query_step,
        table_step=checks.strides(block_tables)[0],
        window=sliding_window or 0,
        scale=launch.bits(
            scale / logits_soft_cap if logits_soft_cap else scale * attention_vectors.LOG2_E
        ),
        cap=launch.bits(logits_soft_cap * attention_vectors.LOG2_E if logits_soft_cap else 1.0),
    )


def _run_by_token(kernel: launch.Kernel, width: int, problem: Problem) -> None:
    """Launch over (heads, tokens); a grid's second side has 65,535 at most."""
    p = problem
    if p.num_tokens > MAX_TOKENS:
        raise ValueError(
            f"query: got {p.num_tokens} tokens; this rung takes up to {MAX_TOKENS}: split the batch"
        )
    kernel((width, p.num_tokens, 1), *p.arrays, p.num_seqs, *p.numbers)


def run_plain(problem: Problem) -> None:
    """Rung 1, for any shape."""
    p = problem
    shape = p.dtype, p.num_kv_heads, p.group, p.head_dim, p.block_size, p.capped
    _run_by_token(attention_plain.plain_kernel(*shape), p.num_q_heads, p)


def run_grouped(problem: Problem) -> None:
    """Rung 2, for any shape."""
    p = problem
    shape = p.dtype, p.num_kv_heads, p.group, p.head_dim, p.block_size, p.capped
    width = p.num_kv_heads * -(-p.group // attention_grouped.HEADS)
    _run_by_token(attention_grouped.grouped_kernel(*shape), width, p)


def run_vectors(problem: Problem, *, split: bool | None = None) -> None:
    """Rungs 3 and 4; ``split`` says which, None lets the table's width decide."""
    p = problem
    kernel = attention_vectors.vector_kernel(
        p.dtype, p.num_kv_heads, p.group, p.head_dim, p.block_size, p.capped
    )
    tiles = p.num_kv_heads * -(-p.group // attention_vectors.HEADS)
    num_splits = -(-p.max_context // attention_vectors.SPLIT) if split in (None, True) else 1
    sums, stats = 0, 0
    if num_splits > 1:
        rows = p.num_tokens * p.num_q_heads * num_splits
        sums, stats = _partial_sums.get(rows * p.head_dim), _partial_stats.get(2 * rows)
    elif ptx.SIMULATED:
        sums, stats = _partial_sums.get(1), _partial_stats.get(1)
    grid = (num_splits, tiles, p.num_tokens)
    kernel(grid, *p.arrays, sums, stats, p.num_seqs, *p.numbers, num_splits)
    if num_splits > 1:
        merge = attention_vectors.merge_kernel(p.dtype, p.num_q_heads, p.head_dim)
        _, _, _, _, lens, starts, out = p.arrays
        grid = (p.num_q_heads, p.num_tokens, 1)
        merge(grid, sums, stats, lens, starts, out, p.num_seqs, p.window, num_splits)


def run_decode(
    problem: Problem, max_new_tokens: int, *, parts: int | None = None, bulk: bool | None = None
) -> None:
    """The decode rungs, for sequences of up to ``max_new_tokens`` new tokens.

    ``parts`` is how many blocks may share a sequence; it does not change the result. ``bulk`` says
    whether the copy engine feeds it; None lets device and shape decide.
    """
    p = problem
    shape = p.dtype, p.num_kv_heads, p.group, p.head_dim, p.block_size, p.window > 0, p.capped
    box = attention_decode_bulk.box_slots(p.block_size)
    if bulk is None:
        bulk = launch.compute_capability() >= (9, 0) and box > 0 and p.head_dim % 16 == 0
    arrays = p.arrays
    if bulk:
        kernel = attention_decode_bulk.bulk_decode_kernel(*shape)
        maps = [launch.tensor_maps.get(cache, p.dtype, box) for cache in p.caches]
        arrays = (arrays[0], *maps, *arrays[3:])
    else:
        kernel = attention_decode.decode_kernel(*shape)
    # A row a token, or, where sequences have more tokens than this rung takes, as many rows a
    # sequence as it takes: thousands of blocks that find nothing to do would cost their launch.
    rows, per_sequence = p.num_tokens, 0
    if max_new_tokens * p.num_seqs < p.num_tokens:
        rows, per_sequence = max_new_tokens * p.num_seqs, max_new_tokens
    tiles = p.num_kv_heads * -(-p.group // attention_splits.HEADS)
    if parts is None:
        parts = attention_splits.num_parts(rows * tiles, p.max_context)
    slots = rows * tiles if parts > 1 else 1
    partial = slots * attention_splits.MAX_SPLITS * attention_splits.HEADS
    kernel(
        (parts, tiles, rows),
        *arrays,
        _partial_sums.get(partial * p.head_dim),
        _partial_stats.get(2 * partial),
        _tickets.get(slots),
        p.num_seqs,
        per_sequence,
        max_new_tokens,
        *p.numbers,
    )


def run_prefill(problem: Problem, max_decode_tokens: int, *, bulk: bool | None = None) -> None:
    """The prefill rungs, for sequences of more than ``max_decode_tokens`` new tokens.

    ``bulk`` says whether it is Hopper's; None lets device and shape decide.
    """
    p = problem
    shape = p.dtype, p.num_kv_heads, p.group, p.head_dim, p.block_size
    options = p.window > 0, p.capped
    box = attention_decode_bulk.box_slots(p.block_size)
    if bulk is None:
        bulk = launch.compute_capability() == (9, 0) and box > 0
    if bulk:
        kernel = attention_prefill_bulk.bulk_prefill_kernel(*shape, box, *options)
        maps = [launch.tensor_maps.get(cache, p.dtype, box) for cache in p.caches]
        tiles = p.num_tokens // attention_prefill_bulk.ROWS + p.num_seqs
        kernel(
            (min(launch.num_multiprocessors(), tiles * p.num_q_heads), 1, 1),
            *(p.arrays[0], *maps, *p.arrays[3:], _queue.get(2)),
            *(p.num_seqs, tiles, max_decode_tokens, *p.numbers),
        )
        return
    kernel = attention_prefill.prefill_kernel(*shape, *options)
    tiles = p.num_tokens // attention_prefill.rows_of_tile(p.head_dim) + p.num_seqs
    grid = (p.num_q_heads, tiles, 1)
    kernel(grid, *p.arrays, p.num_seqs, max_decode_tokens, *p.numbers)
