"""``paged_attention`` of the CPU backends against a dense float64 computation.

Errors are measured as the largest difference in a batch divided by the largest expected number.
"""

from __future__ import annotations

import itertools
import random

import numba
import numpy as np
import pytest
from attention_cases import DTYPES, GARBAGE, dense_attention, make_case, relative_error

from refengine import cpu, reference

BACKENDS = {"reference": reference, "cpu": cpu}
FLOAT32_TOLERANCE = 1e-5

HEAD_DIMS = (16, 32, 40, 59, 64, 128)
BLOCK_SIZES = (1, 4, 5, 16, 32)
HEADS = ((1, 1), (4, 4), (8, 2), (7, 1), (9, 3), (32, 8))
WINDOWS = (None, 3, 16)
CAPS = (None, 30.0)
GRID = list(itertools.product(HEAD_DIMS, BLOCK_SIZES, HEADS, WINDOWS, CAPS, DTYPES))


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS.keys())
def kernels(request):
    return request.param


@pytest.fixture(autouse=True)
def _all_threads():
    """Leave Numba's thread count as it was."""
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


def key_lengths(block_size):
    """1, around a block's end, and lengths that are no multiple of anything."""
    return [n for n in (1, block_size - 1, block_size, block_size + 1, 37, 97, 463) if n > 0]


def mixed_lengths(block_size):
    """Decodes of every length, chunks, whole prompts and an empty sequence in one batch."""
    decodes = [(length, 1) for length in key_lengths(block_size)]
    chunks = [(18, 5), (463, 129), (0, 0), (18, 18), (37, 0), (97, 97)]
    return [pair for pairs in itertools.zip_longest(decodes, chunks) for pair in pairs if pair]


def check(case, backends, dtype):
    """Compare with float64; bfloat16 with twice the error of dense bfloat16 arithmetic."""
    expected = case.expected()
    tolerance = FLOAT32_TOLERANCE
    if dtype == "bfloat16":
        low = DTYPES["bfloat16"].type
        dense = case.expected(lambda *a: dense_attention(*a, dtype=low))
        tolerance = 2 * relative_error(dense, expected)
    errors = {b.name: relative_error(case.run(b), expected) for b in backends}
    assert max(errors.values()) <= tolerance, (errors, tolerance)


def covering_part(size):
    """Points of the grid that between them have every pair of values of any two axes."""
    draw = random.Random(7)
    chosen, covered = [], set()

    def pairs(point):
        return set(itertools.combinations(enumerate(point), 2))

    while len(chosen) < size:
        candidates = draw.sample(GRID, 60)
        best = max(candidates, key=lambda point: len(pairs(point) - covered))
        chosen.append(best)
        covered |= pairs(best)
    everything = set().union(*map(pairs, GRID))
    assert covered == everything, len(everything - covered)
    return chosen


@pytest.mark.parametrize(
    ("head_dim", "block_size", "heads", "window", "cap", "dtype"), covering_part(96)
)
def test_mixed_batch_agrees_with_dense_float64(head_dim, block_size, heads, window, cap, dtype):
    case = make_case(
        mixed_lengths(block_size),
        num_q_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        window=window,
        cap=cap,
        seed=hash((head_dim, block_size, heads[0])) % 1000,
    )
    check(case, BACKENDS.values(), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_whole_grid_agrees_with_dense_float64(head_dim, block_size, heads):
    case = make_case(
        mixed_lengths(block_size),
        num_q_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        block_size=block_size,
        rounded=True,
        seed=head_dim + block_size,
    )
    wide_caches = case.key_cache, case.value_cache
    # The same numbers in a bfloat16 cache: products are float32 all the same, and far closer than
    # bfloat16 arithmetic would be (the covering part compares with that).
    low_caches = [cache.astype(DTYPES["bfloat16"]) for cache in wide_caches]
    for case.window, case.cap in itertools.product(WINDOWS, CAPS):
        expected = case.expected()
        for case.key_cache, case.value_cache in (wide_caches, low_caches):
            for backend in BACKENDS.values():
                error = relative_error(case.run(backend), expected)
                assert error <= FLOAT32_TOLERANCE, (backend.name, case.window, case.cap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "lengths",
    [
        [(length, 1) for length in key_lengths(16)],
        [(18, 5)],
        [(463, 129)],
        [(463, 463)],
        [(1, 1)],
        [(700, 1)],
    ],
    ids=str,
)
def test_one_kind_of_batch_agrees_with_dense_float64(lengths, dtype):
    case = make_case(lengths, num_q_heads=9, num_kv_heads=3, head_dim=64, dtype=dtype)
    check(case, BACKENDS.values(), dtype)


def test_float32_caches_keep_all_bits_of_float32(kernels):
    """A kernel that rounded what it reads would be 300 times further away."""
    case = make_case([(97, 97), (200, 1)], num_q_heads=9, num_kv_heads=3, head_dim=64)
    assert relative_error(case.run(kernels), case.expected()) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_blocks(kernels, dtype):
    lengths = [(64, 1), (100, 40), (70, 6), (20, 20), (65, 65)]
    case = make_case(lengths, dtype=dtype, shared_tokens=64)
    assert (case.block_tables[0, :4] == case.block_tables[1, :4]).all()
    check(case, [kernels], dtype)


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_half_a_million(kernels, dtype, cap):
    """Whole numbers, so that float32 holds every logit exactly; neighbours may differ by one."""
    for head_dim, size in ((16, 177), (59, 92)):
        case = make_case(
            mixed_lengths(16), head_dim=head_dim, dtype=dtype, scale=1.0, cap=cap,
            whole_numbers=size,
        )  # fmt: skip
        heads = case.keys[-1].astype(np.float64)[:, 0]
        logits = case.query[-1, 0].astype(np.float64) @ heads.T
        assert np.abs(logits).max() > 5e4
        assert relative_error(case.run(kernels), case.expected()) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("sign", [1, -1])
def test_equal_logits_of_half_a_million_give_the_mean(kernels, sign):
    case = make_case([(100, 100)], num_q_heads=2, num_kv_heads=1, head_dim=16, scale=1.0)
    case.query[:] = 0
    case.query[..., 0] = 707.0
    case.key_cache[..., 0] = np.where(np.isnan(case.key_cache[..., 0]), np.nan, sign * 707.0)
    got = case.run(kernels)
    mean = np.cumsum(case.values[0].astype(np.float64), axis=0) / np.arange(1, 101)[:, None, None]
    assert relative_error(got, np.repeat(mean, 2, axis=1)) <= FLOAT32_TOLERANCE


def test_the_scale_is_applied_before_the_cap(kernels):
    case = make_case([(40, 3)], scale=0.7, cap=1.5)
    check(case, [kernels], "float32")


@pytest.mark.parametrize(
    "lengths", [[(0, 0)], [(0, 0), (0, 0), (5, 2)], [(7, 0)], [(3, 1), (0, 0), (9, 0), (4, 4)]]
)
def test_empty_sequences_and_empty_chunks(kernels, lengths):
    case = make_case(lengths)
    got = case.run(kernels)
    assert got.shape == case.query.shape
    assert relative_error(got, case.expected()) <= FLOAT32_TOLERANCE


def test_queries_of_an_empty_sequence_get_zeros(kernels):
    case = make_case([(5, 2), (0, 3), (6, 1)])
    got = case.run(kernels)
    assert (got[2:5] == 0).all()
    assert relative_error(got, case.expected()) <= FLOAT32_TOLERANCE


def test_no_sequences_at_all(kernels):
    case = make_case([])
    assert case.run(kernels).shape == (0, 4, 32)


@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_blocks_before_every_window_are_not_read(kernels, block_size):
    """They may have been given back: their entries and contents are anything."""
    window = 10
    case = make_case([(200, 1), (150, 20)], block_size=block_size, window=window)
    expected = case.expected()
    for seq, (seq_len, query_len) in enumerate(((200, 1), (150, 20))):
        oldest = seq_len - query_len - window + 1
        given_back = oldest // block_size
        blocks = case.block_tables[seq, :given_back]
        case.key_cache[blocks] = case.value_cache[blocks] = np.nan
        case.block_tables[seq, :given_back] = -1 if seq else GARBAGE
        partly = case.block_tables[seq, given_back]
        case.key_cache[partly, : oldest % block_size] = np.nan
        case.value_cache[partly, : oldest % block_size] = np.nan
    assert relative_error(case.run(kernels), expected) <= FLOAT32_TOLERANCE


def test_uint16_is_bfloat16(kernels):
    case = make_case([(40, 7), (9, 1)], dtype="bfloat16")
    expected = case.run(kernels)
    case.key_cache = case.key_cache.view(np.uint16)
    case.value_cache = case.value_cache.view(np.uint16)
    assert np.array_equal(case.run(kernels), expected)


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_tables_of_any_integer_type_and_strides(kernels, dtype):
    case = make_case([(40, 7), (9, 1)])
    expected = case.run(kernels)
    wide = np.zeros((2, case.block_tables.shape[1] + 3), dtype)
    wide[:, : case.block_tables.shape[1]] = case.block_tables
    case.block_tables = wide[:, : case.block_tables.shape[1]]
    case.seq_lens, case.query_start_loc = case.seq_lens.astype(dtype), case.query_start_loc
    assert np.array_equal(case.run(kernels), expected)


def test_query_and_out_inside_wider_arrays(kernels):
    """As the decoder passes them: heads of one product of query, key and value."""
    case = make_case([(40, 7), (9, 1)])
    expected = case.run(kernels)
    wide = np.zeros((8, 11, 32), np.float32)
    wide[:, 2:6] = case.query
    case.query = wide[:, 2:6]
    assert np.array_equal(case.run(kernels), expected)
    out = np.full((8, 6, 32), 5.0, np.float32)
    arguments = (
        case.query, case.key_cache, case.value_cache, case.block_tables, case.seq_lens,
        case.query_start_loc, case.scale, None, None, out[:, 1:5],
    )  # fmt: skip
    kernels.paged_attention(*arguments)
    assert np.array_equal(out[:, 1:5], expected)
    assert (out[:, 0] == 5.0).all()
    assert (out[:, 5] == 5.0).all()


# ---------------------------------------------------------------- the same bits, whatever else


INVARIANT = {
    "narrow": {"num_q_heads": 9, "num_kv_heads": 3, "head_dim": 64},
    "padded": {"num_q_heads": 4, "num_kv_heads": 4, "head_dim": 40, "block_size": 5},
    "windowed": {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64, "window": 70, "cap": 20.0},
    "wide group": {"num_q_heads": 7, "num_kv_heads": 1, "head_dim": 128},
}
INVARIANT_LENGTHS = [(300, 1), (18, 5), (463, 129), (64, 64), (1, 1), (130, 2), (65, 1), (200, 90)]


def alone(case, seq, first, stop):
    """The bits that query tokens ``first .. stop - 1`` of one sequence get in a batch of one."""
    start, end = case.query_start_loc[seq], case.query_start_loc[seq + 1]
    out = np.full((stop - first, *case.query.shape[1:]), np.nan, np.float32)
    cpu.paged_attention(
        case.query[start + first : start + stop],
        case.key_cache,
        case.value_cache,
        case.block_tables[seq : seq + 1],
        np.array([case.seq_lens[seq] - (end - start) + stop], np.int32),
        np.array([0, stop - first], np.int32),
        case.scale,
        case.window,
        case.cap,
        out,
    )
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", INVARIANT.values(), ids=INVARIANT.keys())
def test_cpu_gives_the_same_bits_alone_and_in_a_batch(options, dtype):
    case = make_case(INVARIANT_LENGTHS, dtype=dtype, **options)
    together = case.run(cpu)
    for seq, (_, query_len) in enumerate(INVARIANT_LENGTHS):
        start = case.query_start_loc[seq]
        assert np.array_equal(alone(case, seq, 0, query_len), together[start : start + query_len])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", INVARIANT.values(), ids=INVARIANT.keys())
def test_cpu_gives_the_same_bits_token_by_token_and_in_chunks(options, dtype):
    case = make_case([(200, 150)], dtype=dtype, **options)
    together = case.run(cpu)
    for chunk in (1, 7, 64):
        for first in range(0, 150, chunk):
            stop = min(first + chunk, 150)
            assert np.array_equal(alone(case, 0, first, stop), together[first:stop]), (chunk, first)


@pytest.mark.parametrize("options", INVARIANT.values(), ids=INVARIANT.keys())
def test_cpu_gives_the_same_bits_with_any_number_of_threads(options):
    case = make_case(INVARIANT_LENGTHS, **options)
    results = []
    for threads in range(1, min(4, numba.config.NUMBA_NUM_THREADS) + 1):
        numba.set_num_threads(threads)
        results.append(case.run(cpu))
    assert all(np.array_equal(result, results[0]) for result in results)


# ---------------------------------------------------------------- what is refused


def broken(**changes):
    return lambda case: {name: change(case) for name, change in changes.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            broken(query=lambda c: c.query[..., :16]),
            r"query must have shape \[num_tokens, num_q_heads, 32\] .*got \[8, 4, 16\]",
        ),
        (
            broken(query=lambda c: c.query[:, :3], out=lambda c: c.query[:, :3]),
            "multiple of the cache's key-value heads, 2, got 3 heads",
        ),
        (
            broken(value_cache=lambda c: c.value_cache[:-1]),
            r"value_cache must have shape \[6, 16, 2, 32\] \(as key_cache\), got \[5, 16, 2, 32\]",
        ),
        (
            broken(value_cache=lambda c: c.value_cache.astype(np.float16)),
            "value_cache must have key_cache's dtype, float32, got float16",
        ),
        (
            broken(key_cache=lambda c: c.key_cache[0]),
            r"key_cache must have shape \[num_blocks, block_size, num_kv_heads, head_dim\], "
            r"got \[16, 2, 32\]",
        ),
        (
            broken(out=lambda c: np.empty((8, 4, 33), np.float32)),
            r"out must have shape \[8, 4, 32\] \(as query\), got \[8, 4, 33\]",
        ),
        (
            broken(block_tables=lambda c: c.block_tables[:1]),
            r"block_tables must have shape \[2, max_blocks\] \(as seq_lens\), got \[1, 3\]",
        ),
        (
            broken(block_tables=lambda c: c.block_tables.astype(np.float32)),
            "block_tables must hold integers, got float32",
        ),
        (
            broken(query_start_loc=lambda c: c.query_start_loc[:-1]),
            r"query_start_loc must have shape \[3\] .*got \[2\]",
        ),
        (
            broken(query_start_loc=lambda c: np.array([0, 7, 9], np.int32)),
            "query_start_loc must run from 0 to query's number of tokens, 8, got 0 to 9",
        ),
        (
            broken(query_start_loc=lambda c: np.array([1, 7, 8], np.int32)),
            "got 1 to 8",
        ),
        (
            broken(query_start_loc=lambda c: np.array([0, 9, 8], np.int32)),
            "query_start_loc must not fall, got 9 then 8 at sequence 1",
        ),
        (
            broken(seq_lens=lambda c: np.array([40, 49], np.int32)),
            r"seq_lens\[1\] must be 0 to 48, what 3 blocks of 16 in block_tables hold, got 49",
        ),
        (
            broken(seq_lens=lambda c: np.array([-1, 9], np.int32)),
            r"seq_lens\[0\] must be 0 to 48.* got -1",
        ),
        (
            broken(seq_lens=lambda c: np.array([6, 9], np.int32)),
            "sequence 0 must have at most as many query tokens as tokens, 6, got 7",
        ),
        (
            broken(seq_lens=lambda c: np.array([40, 17], np.int32)),
            rf"block_tables\[1, 1\] must be 0 to 5, a block of the cache, got {GARBAGE}",
        ),
        (
            broken(block_tables=lambda c: -c.block_tables - 1),
            r"block_tables\[0, 0\] must be 0 to 5, a block of the cache, got -",
        ),
        (broken(window=lambda c: 0), "sliding_window must be at least 1 token or None, got 0"),
        (broken(cap=lambda c: 0.0), "logits_soft_cap must be above 0 or None, got 0.0"),
        (broken(cap=lambda c: float("nan")), "logits_soft_cap must be above 0 or None, got nan"),
    ],
)
def test_what_does_not_fit_is_refused(kernels, changes, message):
    case = make_case([(40, 7), (9, 1)])
    arguments = {
        "query": case.query,
        "key_cache": case.key_cache,
        "value_cache": case.value_cache,
        "block_tables": case.block_tables,
        "seq_lens": case.seq_lens,
        "query_start_loc": case.query_start_loc,
        "scale": 1.0,
        "window": None,
        "cap": None,
        "out": np.zeros_like(case.query),
    }
    arguments.update(changes(case))
    with pytest.raises(ValueError, match=message):
        kernels.paged_attention(*arguments.values())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("query", np.zeros((8, 4, 32)), "query must be float32 .*got float64"),
        ("query", np.zeros((8, 4, 64), np.float32)[..., ::2], "query must be float32 with strides"),
        ("out", np.zeros((8, 4, 64), np.float32)[..., ::2], "out must be float32 with strides"),
    ],
)
def test_cpu_refuses_layouts_that_it_does_not_read(name, value, message):
    case = make_case([(40, 7), (9, 1)])
    arrays = {"query": case.query, "out": np.zeros_like(case.query), name: value}
    with pytest.raises(ValueError, match=message):
        cpu.paged_attention(
            arrays["query"], case.key_cache, case.value_cache, case.block_tables, case.seq_lens,
            case.query_start_loc, 1.0, None, None, arrays["out"],
        )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda cache: cache.astype(np.float16),
            "key_cache must be float32 or bfloat16 on the CPU",
        ),
        (lambda cache: np.repeat(cache, 2, axis=0)[::2], "key_cache must be contiguous"),
    ],
)
def test_cpu_refuses_caches_that_it_does_not_read(change, message):
    case = make_case([(40, 7), (9, 1)])
    case.key_cache, case.value_cache = change(case.key_cache), change(case.value_cache)
    with pytest.raises(ValueError, match=message):
        case.run(cpu)
