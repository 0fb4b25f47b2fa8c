"""The compiled step gives the bits of the readable decoder: any model, batch and threads."""

from dataclasses import replace

import ml_dtypes
import numba
import numpy as np
import pytest

import refengine.cpu as kernels
from refengine.config import ModelConfig
from refengine.cpu.calls import call_address
from refengine.cpu.decoder_step import DecoderStep
from refengine.cpu.jit import inner
from refengine.execution.batch import BatchArrays
from refengine.models.decoder_weights import load_decoder_weights
from refengine.models.tensor_names import expected_tensors
from refengine.models.transformer import Transformer

BLOCK_SIZE = 4
NUM_BLOCKS = 64
MAX_LEN = 96

LLAMA = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=131,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=MAX_LEN,
    tie_word_embeddings=True,
)
MODELS = {
    "llama": LLAMA,
    "untied": replace(LLAMA, tie_word_embeddings=False),
    "biases": replace(LLAMA, attention_bias=True, attention_output_bias=True),
    "qk_norm": replace(LLAMA, qk_norm=True),
    "windows": replace(LLAMA, layer_windows=(5, None, 8)),
    "all_windows": replace(LLAMA, layer_windows=(5, 3, 8)),
    "gemma": replace(
        LLAMA,
        hidden_act="gelu_pytorch_tanh",
        layer_windows=(6, 6, None),
        rope_local_theta=100.0,
        attention_scale=0.3,
        attention_logits_soft_cap=5.0,
        final_logits_soft_cap=3.0,
        embedding_multiplier=48**0.5,
        norm_weight_offset=1.0,
        post_norms=True,
        qk_norm=True,
    ),
    # Nothing is a multiple of anything: odd rows, tails of panels, heads that end inside 16 lanes.
    "odd": replace(
        LLAMA,
        vocab_size=97,
        hidden_size=27,
        intermediate_size=53,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=6,
        qk_norm=True,
        attention_bias=True,
        post_norms=True,
    ),
    "one_layer": replace(LLAMA, num_hidden_layers=1, num_key_value_heads=6),
}


class RandomWeights:
    """Every tensor random, norms and biases too."""

    def __init__(self, config):
        self.shapes = expected_tensors(config)

    def read(self, name):
        rng = np.random.default_rng(sum(name.encode()))
        scale = 0.3 if len(self.shapes[name]) == 1 else 0.2
        centre = 1.0 if "norm" in name else 0.0
        return (centre + scale * rng.standard_normal(self.shapes[name])).astype(np.float32)


def load(config, dtype):
    return load_decoder_weights(
        config, RandomWeights(config), kernels, dtype=dtype, max_model_len=MAX_LEN
    )


def make_caches(config, dtype):
    """Caches with NaN in every slot, which a step must not read before it writes them."""
    caches = kernels.allocate_cache(
        config.num_hidden_layers,
        NUM_BLOCKS,
        BLOCK_SIZE,
        config.num_key_value_heads,
        config.head_dim,
        dtype,
    )
    for cache in caches:
        cache[...] = np.nan
    return caches


def make_batch(parts, seed=0):
    """A step of sequences, each ``(tokens computed before, tokens now)``.

    Sequence i has blocks of its own, in a shuffled order; its tokens depend on i and position.
    """
    columns = MAX_LEN // BLOCK_SIZE
    order = np.random.default_rng(seed).permutation(NUM_BLOCKS)
    tables = np.array([np.roll(order, -16 * i)[:columns] for i in range(len(parts))], np.int32)
    positions = [np.arange(start, start + count) for start, count in parts]
    tokens = [(7 * p + 13 * i) % 97 for i, p in enumerate(positions)]
    slots = [
        tables[i, p // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + p % BLOCK_SIZE
        for i, p in enumerate(positions)
    ]
    counts = np.array([count for _, count in parts])
    return BatchArrays(
        token_ids=np.concatenate(tokens).astype(np.int64),
        positions=np.concatenate(positions).astype(np.int64),
        slot_mapping=np.concatenate(slots),
        block_tables=tables,
        seq_lens=np.array([start + count for start, count in parts], np.int32),
        query_start_loc=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        logits_rows=np.cumsum(counts) - 1,
    )


# Prompts, then decode and chunks and a draft together; at most 64 tokens (16 blocks) a sequence.
STEPS = ([(0, 9), (0, 1), (0, 33)], [(9, 1), (1, 20), (33, 5)], [(10, 1), (21, 1), (38, 1)])


def run(model, config, dtype, steps=STEPS):
    """Hidden states and logits of all steps, and the caches after them."""
    caches = make_caches(config, dtype)
    results = []
    for parts in steps:
        batch = make_batch(parts)
        hidden = model.forward(batch, *caches)
        results.append((hidden, model.logits(hidden[batch.logits_rows])))
    return results, caches


def assert_same_bits(one, other):
    for (hidden, logits), (other_hidden, other_logits) in zip(one[0], other[0], strict=True):
        assert np.isfinite(hidden).all()
        assert np.array_equal(hidden, other_hidden)
        assert np.array_equal(logits, other_logits)
    for cache, other_cache in zip(one[1], other[1], strict=True):
        assert cache.tobytes() == other_cache.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_has_the_bits_of_the_readable_decoder(name, dtype):
    config = MODELS[name]
    weights = load(config, dtype)
    readable = run(Transformer(config, weights, kernels), config, dtype)
    assert_same_bits(run(DecoderStep(config, weights), config, dtype), readable)


def test_generic_words_give_the_bits_of_the_readable_decoder(monkeypatch):
    monkeypatch.setenv("REFENGINE_CPU_ISA", "generic")
    config = MODELS["odd"]
    weights = load(config, "bfloat16")
    readable = run(Transformer(config, weights, kernels), config, "bfloat16")
    assert_same_bits(run(DecoderStep(config, weights), config, "bfloat16"), readable)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_number_of_threads_changes_nothing(dtype):
    weights = load(LLAMA, dtype)
    step = DecoderStep(LLAMA, weights)
    threads = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        alone = run(step, LLAMA, dtype)
    finally:
        numba.set_num_threads(threads)
    assert_same_bits(run(step, LLAMA, dtype), alone)


def test_a_sequence_gives_the_same_bits_alone_and_in_any_chunks():
    weights = load(LLAMA, "bfloat16")
    step = DecoderStep(LLAMA, weights)
    whole, _ = run(step, LLAMA, "bfloat16", [[(0, 60)]])
    for size in (1, 7, 16, 59):
        parts = [[(start, min(size, 60 - start))] for start in range(0, 60, size)]
        chunks, _ = run(step, LLAMA, "bfloat16", parts)
        assert np.array_equal(np.concatenate([hidden for hidden, _ in chunks]), whole[0][0])
    crowd, _ = run(step, LLAMA, "bfloat16", [[(0, 60), (0, 50), (0, 40)]])
    assert np.array_equal(crowd[0][0][:60], whole[0][0])


def test_buffers_grow_and_earlier_results_stay():
    weights = load(LLAMA, "float32")
    step = DecoderStep(LLAMA, weights)
    caches = make_caches(LLAMA, "float32")
    first = step.forward(make_batch([(0, 3)]), *caches)
    kept = first.copy()
    step.forward(make_batch([(0, 64), (0, 64), (0, 64)]), *caches)
    assert step.capacity >= 192
    assert np.array_equal(first, kept)


def test_padding_slots_are_not_written():
    weights = load(LLAMA, "float32")
    caches = make_caches(LLAMA, "float32")
    batch = make_batch([(0, 5)])
    batch.slot_mapping[3] = -1
    batch.seq_lens[0], batch.query_start_loc[1] = 5, 5
    with np.errstate(invalid="ignore"):
        DecoderStep(LLAMA, weights).forward(batch, *caches)
    written = np.isfinite(caches[0][0]).all(axis=(2, 3)).sum()
    assert written == 4


def test_a_thread_that_comes_late_finds_its_work_done():
    """Threads one after the other instead of at once: none may wait for another."""
    config = LLAMA
    weights = load(config, "float32")
    step = DecoderStep(config, weights)
    caches = make_caches(config, "float32")
    batch = make_batch([(0, 9), (0, 4)])
    numba_threads = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        wanted = step.forward(batch, *caches)
    finally:
        numba.set_num_threads(numba_threads)
    # The record still names the batch and its result: run it again with three threads' worth.
    step._make_room(13, 2, 3)
    again = np.full_like(wanted, np.nan)
    step._keep(normalised=again)
    step._stages[:] = 0

    @inner
    def one_by_one(address, step_address, embedding, words):
        for worker in (1, 0, 2):
            call_address(address, worker, 3, step_address, embedding, words)

    one_by_one(step._worker, step._step.ctypes.data, step._embedding, step._words)
    assert np.array_equal(again, wanted)


def test_part_shares_add_up():
    weights = load(LLAMA, "float32")
    step = DecoderStep(LLAMA, weights)
    step.forward(make_batch([(0, 9)]), *make_caches(LLAMA, "float32"))
    shares = step.part_shares()
    assert set(shares) >= {"qkv", "attention", "gate_up", "down"}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert sum(step.part_shares().values()) == 0.0


def test_an_empty_batch_gives_no_rows():
    weights = load(LLAMA, "float32")
    empty = np.zeros(0, np.int64)
    batch = BatchArrays(empty, empty, empty, np.zeros((0, 1), np.int32), np.zeros(0, np.int32),
                        np.zeros(1, np.int32), empty)  # fmt: skip
    hidden = DecoderStep(LLAMA, weights).forward(batch, *make_caches(LLAMA, "float32"))
    assert hidden.shape == (0, LLAMA.hidden_size)


def changed(**arrays):
    return replace(make_batch([(0, 5), (0, 3)]), **arrays)


def with_element(name, index, value):
    array = getattr(make_batch([(0, 5), (0, 3)]), name).copy()
    array[index] = value
    return {name: array}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (with_element("token_ids", 2, 131), "token_ids must be 0 to 130, got 0 to 131"),
        (with_element("token_ids", 2, -1), "token_ids must be 0 to 130, got -1"),
        (with_element("positions", 1, MAX_LEN), f"positions.*{MAX_LEN}"),
        (with_element("slot_mapping", 1, NUM_BLOCKS * BLOCK_SIZE), "slot_mapping"),
        (with_element("block_tables", (0, 1), NUM_BLOCKS), "block_tables"),
        (with_element("seq_lens", 0, 4), "seq"),
        (with_element("seq_lens", 0, 0), "as many tokens as it adds"),
        ({"positions": np.zeros(7, np.int64)}, r"positions must have shape \[8\].*got \[7\]"),
        ({"seq_lens": np.zeros(3, np.int32)}, r"query_start_loc must have shape \[4\].*got \[3\]"),
    ],
)
def test_forward_says_what_does_not_fit(changes, said):
    step = DecoderStep(LLAMA, load(LLAMA, "float32"))
    caches = make_caches(LLAMA, "float32")
    with pytest.raises(ValueError, match=said):
        step.forward(changed(**changes), *caches)
    assert np.isnan(caches[0]).all()


def test_caches_must_be_the_models():
    step = DecoderStep(LLAMA, load(LLAMA, "float32"))
    keys, values = make_caches(LLAMA, "float32")
    batch = make_batch([(0, 5)])
    with pytest.raises(ValueError, match=r"key_caches must have shape \[3, num_blocks.*got \[2"):
        step.forward(batch, keys[:2], values[:2])
    with pytest.raises(ValueError, match="key_caches must be contiguous and of the weights' dtype"):
        step.forward(batch, keys.astype(ml_dtypes.bfloat16), values)
