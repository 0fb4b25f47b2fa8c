"""``write_kv``, ``copy_blocks`` and ``swap_blocks`` of the CPU backends, bit by bit."""

from __future__ import annotations

import mmap
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine import cpu, reference

BACKENDS = {"reference": reference, "cpu": cpu}
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 3.4e38, -3.4e38, 1e-40, 1.00390625]


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS.keys())
def kernels(request):
    return request.param


def bits(array):
    """What is in memory, so that NaN equals itself and -0 differs from 0."""
    return np.ascontiguousarray(array).view(np.uint8)


def same(a, b):
    return np.array_equal(bits(a), bits(b))


def numbers(random, shape):
    """Ordinary numbers with special ones among them."""
    x = random.standard_normal(shape).astype(np.float32)
    special = random.random(shape) < 0.1
    x[special] = random.choice(np.array(SPECIAL, np.float32), special.sum())
    return x


@st.composite
def writes(draw):
    """Shapes, and slots with padding and repeats."""
    num_blocks, block_size = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    slots = draw(st.lists(st.integers(-1, num_blocks * block_size - 1), max_size=12))
    return {
        "cache": (num_blocks, block_size, draw(st.integers(1, 3)), draw(st.sampled_from(
            [1, 8, 15, 16, 17, 32, 59, 64]))),
        "slots": slots,
        "dtype": draw(st.sampled_from(list(DTYPES.values()))),
        "as_uint16": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }  # fmt: skip


@pytest.mark.parametrize("kernels", BACKENDS.values(), ids=BACKENDS.keys())
@settings(deadline=None, max_examples=150)
@given(case=writes())
def test_write_kv_is_a_loop_over_tokens(kernels, case):
    random = np.random.default_rng(case["seed"])
    _, block_size, num_heads, head_dim = case["cache"]
    qkv = numbers(random, (len(case["slots"]), 2 * num_heads + 1, head_dim))
    key, value = qkv[:, 1 : num_heads + 1], qkv[:, num_heads + 1 :]
    caches = [numbers(random, case["cache"]).astype(case["dtype"]) for _ in range(2)]
    expected = [cache.copy() for cache in caches]
    for token, slot in enumerate(case["slots"]):
        if slot >= 0:
            block, offset = divmod(slot, block_size)
            for head in range(num_heads):
                with np.errstate(all="ignore"):
                    expected[0][block, offset, head] = key[token, head].astype(case["dtype"])
                    expected[1][block, offset, head] = value[token, head].astype(case["dtype"])
    views = caches
    if case["as_uint16"] and case["dtype"] != np.float32:
        views = [cache.view(np.uint16) for cache in caches]
    kernels.write_kv(key, value, *views, np.array(case["slots"], np.int64))
    assert same(caches[0], expected[0])
    assert same(caches[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_write_kv_of_many_tokens(kernels, dtype):
    """Enough for all threads; of two tokens with one slot, the later stays."""
    random = np.random.default_rng(0)
    key, value = numbers(random, (2, 400, 3, 64))
    slots = random.integers(-1, 640, 400)
    caches = np.zeros((2, 40, 16, 3, 64), dtype)
    expected = caches.copy()
    for token, slot in enumerate(slots):
        if slot >= 0:
            with np.errstate(all="ignore"):
                expected[0, slot // 16, slot % 16] = key[token].astype(dtype)
                expected[1, slot // 16, slot % 16] = value[token].astype(dtype)
    kernels.write_kv(key, value, *caches, slots)
    assert same(caches, expected)


@st.composite
def moves(draw):
    """Two sets of caches and pairs of blocks, chains and repeats among them."""
    source, destination = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    return {
        "blocks": (source, destination),
        "layers": draw(st.integers(1, 3)),
        "block": draw(st.tuples(st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 7, 32]))),
        "dtype": draw(st.sampled_from(list(DTYPES.values()))),
        "pairs": draw(
            st.lists(
                st.tuples(st.integers(0, source - 1), st.integers(0, destination - 1)), max_size=8
            )
        ),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


@pytest.mark.parametrize("kernels", BACKENDS.values(), ids=BACKENDS.keys())
@settings(deadline=None, max_examples=100)
@given(case=moves())
def test_swap_blocks_is_a_loop_over_pairs(kernels, case):
    random = np.random.default_rng(case["seed"])
    layers, (source, destination) = case["layers"], case["blocks"]
    here = [numbers(random, (layers, source, *case["block"])).astype(case["dtype"]) for _ in "kv"]
    there = [
        numbers(random, (layers, destination, *case["block"])).astype(case["dtype"]) for _ in "kv"
    ]
    unchanged, expected = [c.copy() for c in here], [c.copy() for c in there]
    for a, b in case["pairs"]:
        for layer in range(layers):
            for kind in (0, 1):
                expected[kind][layer, b] = here[kind][layer, a].copy()
    kernels.swap_blocks(*here, *there, np.array(case["pairs"], np.int64).reshape(-1, 2))
    assert same(there[0], expected[0])
    assert same(there[1], expected[1])
    assert same(here[0], unchanged[0])
    assert same(here[1], unchanged[1])


@pytest.mark.parametrize("kernels", BACKENDS.values(), ids=BACKENDS.keys())
@settings(deadline=None, max_examples=100)
@given(case=moves())
def test_copy_blocks_is_a_loop_over_pairs_in_order(kernels, case):
    random = np.random.default_rng(case["seed"])
    blocks = min(case["blocks"])
    shape = (case["layers"], blocks, *case["block"])
    caches = [numbers(random, shape).astype(case["dtype"]) for _ in "kv"]
    expected = [c.copy() for c in caches]
    pairs = [(a % blocks, b % blocks) for a, b in case["pairs"]]
    for a, b in pairs:
        for kind in (0, 1):
            expected[kind][:, b] = expected[kind][:, a].copy()
    kernels.copy_blocks(*caches, np.array(pairs, np.int64).reshape(-1, 2))
    assert same(caches[0], expected[0])
    assert same(caches[1], expected[1])


def test_swapping_out_and_in_brings_everything_back(kernels):
    random = np.random.default_rng(0)
    caches = [numbers(random, (3, 6, 4, 2, 16)).astype(ml_dtypes.bfloat16) for _ in "kv"]
    before = [c.copy() for c in caches]
    host = [np.zeros((3, 2, 4, 2, 16), ml_dtypes.bfloat16) for _ in "kv"]
    out = np.array([[4, 0], [1, 1]])
    kernels.swap_blocks(*caches, *host, out)
    for cache in caches:
        cache[:, [4, 1]] = 0
    kernels.swap_blocks(*host, *caches, out[:, ::-1])
    assert same(caches[0], before[0])
    assert same(caches[1], before[1])


# ---------------------------------------------------------------- what is refused


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


CACHE = (5, 4, 2, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (zeros(3, 2, 9), zeros(3, 2, 9), zeros(*CACHE), zeros(*CACHE), np.arange(3)),
            r"key must have shape \[num_tokens, 2, 8\] .*got \[3, 2, 9\]",
        ),
        (
            (zeros(3, 2, 8), zeros(2, 2, 8), zeros(*CACHE), zeros(*CACHE), np.arange(3)),
            r"value must have shape \[3, 2, 8\] \(as key\), got \[2, 2, 8\]",
        ),
        (
            (zeros(3, 2, 8), zeros(3, 2, 8), zeros(*CACHE), zeros(4, 4, 2, 8), np.arange(3)),
            r"value_cache must have shape \[5, 4, 2, 8\] \(as key_cache\), got \[4, 4, 2, 8\]",
        ),
        (
            (zeros(3, 2, 8), zeros(3, 2, 8), zeros(*CACHE), zeros(*CACHE), np.arange(4)),
            r"slot_mapping must have shape \[3\] .*got \[4\]",
        ),
        (
            (zeros(3, 2, 8), zeros(3, 2, 8), zeros(*CACHE), zeros(*CACHE), zeros(3)),
            "slot_mapping must hold integers, got float32",
        ),
        (
            (zeros(2, 2, 8), zeros(2, 2, 8), zeros(*CACHE), zeros(*CACHE), np.array([0, 20])),
            r"slot_mapping\[1\] must be -1 or below 20 \(5 blocks of 4\), got 20",
        ),
        (
            (zeros(2, 2, 8), zeros(2, 2, 8), zeros(*CACHE), zeros(*CACHE), np.array([-2, 0])),
            r"slot_mapping\[0\] must be -1 or below 20 .*got -2",
        ),
    ],
)
def test_writes_that_do_not_fit_are_refused(kernels, arguments, message):
    with pytest.raises(ValueError, match=message):
        kernels.write_kv(*arguments)


def test_nothing_is_written_where_a_slot_is_wrong(kernels):
    key_cache, value_cache = zeros(*CACHE), zeros(*CACHE)
    ones = np.ones((3, 2, 8), np.float32)
    with pytest.raises(ValueError, match="slot_mapping"):
        kernels.write_kv(ones, ones, key_cache, value_cache, np.array([0, 1, 99]))
    assert not key_cache.any()
    assert not value_cache.any()


@pytest.mark.parametrize(
    ("key_cache", "message"),
    [
        (zeros(*CACHE, dtype=np.float64), "must be float32 or bfloat16 on the CPU, got float64"),
        (zeros(5, 4, 2, 16)[..., ::2], "key_cache must be contiguous"),
    ],
)
def test_cpu_refuses_caches_that_it_does_not_write(key_cache, message):
    with pytest.raises(ValueError, match=message):
        cpu.write_kv(zeros(1, 2, 8), zeros(1, 2, 8), key_cache, key_cache.copy()[:], np.array([0]))


LAYERS = (2, 5, 4, 2, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (zeros(*LAYERS), zeros(2, 4, 4, 2, 8), np.array([[0, 1]])),
            r"value_caches must have shape \[2, 5, 4, 2, 8\] \(as key_caches\), got \[2, 4, 4",
        ),
        (
            (zeros(*LAYERS), zeros(*LAYERS), np.array([0, 1])),
            r"block_mapping must have shape \[num_pairs, 2\], got \[2\]",
        ),
        (
            (zeros(*LAYERS), zeros(*LAYERS), np.array([[0, 1], [2, 5]])),
            r"block_mapping\[1, 1\] must be 0 to 4, a block of the destination caches, got 5",
        ),
        (
            (zeros(*LAYERS), zeros(*LAYERS), np.array([[0, 1], [-1, 2]])),
            r"block_mapping\[1, 0\] must be 0 to 4, a block of the source caches, got -1",
        ),
        (
            (zeros(*LAYERS), zeros(*LAYERS), np.array([[0.0, 1.0]])),
            "block_mapping must hold integers, got float64",
        ),
        (
            (zeros(*LAYERS), zeros(*LAYERS, dtype=np.float16), np.array([[0, 1]])),
            "all caches must have one dtype, got float32 and float16",
        ),
    ],
)
def test_copies_that_do_not_fit_are_refused(kernels, arguments, message):
    with pytest.raises(ValueError, match=message):
        kernels.copy_blocks(*arguments)


def test_swaps_between_caches_of_other_blocks_are_refused(kernels):
    here, there = zeros(*LAYERS), zeros(2, 5, 4, 2, 16)
    with pytest.raises(ValueError, match=r"destination key_caches must have shape \[2, num_blocks"):
        kernels.swap_blocks(here, here, there, there, np.array([[0, 0]]))


# ---------------------------------------------------------------- caches past 2 ** 31 elements


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is only promised")
def test_blocks_past_two_billion_elements(kernels):
    """Indices of 32 bits would wrap around, into the first blocks."""
    num_blocks, shape = 2**21 + 5, (16, 1, 64)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # the last is MAP_NORESERVE
    with mmap.mmap(-1, num_blocks * 16 * 64 * 2, flags=flags) as memory:
        cache = np.frombuffer(memory, np.uint16).reshape(num_blocks, *shape)
        last = num_blocks - 1
        key = numbers(np.random.default_rng(0), (1, 1, 64))
        with np.errstate(all="ignore"):
            expected = key.astype(ml_dtypes.bfloat16).view(np.uint16)[0]
        kernels.write_kv(key, key, cache, cache, np.array([last * 16 + 3]))
        assert np.array_equal(cache[last, 3], expected)
        kernels.copy_blocks(cache[np.newaxis], cache[np.newaxis], np.array([[last, last - 1]]))
        assert np.array_equal(cache[last - 1, 3], expected)
        cache[last - 1, :4] = np.float32(1.5).view(np.uint32) >> 16
        query, out = np.ones((1, 1, 64), np.float32), np.zeros((1, 1, 64), np.float32)
        kernels.paged_attention(
            query, cache, cache, np.array([[last - 1]], np.int32), np.array([4], np.int32),
            np.array([0, 1], np.int32), 1.0, None, None, out,
        )  # fmt: skip
        assert (out == 1.5).all()
        assert not cache[:8].any()
        del cache
