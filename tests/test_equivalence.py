"""Mechanisms never change the answer: batching, chunking and preemption give each request's tokens
as it would get them alone.

On the cpu backend a row's arithmetic does not depend on its neighbours, so answers are equal to the
last bit. The reference's matrix products come from a BLAS whose order of summation depends on the
shape; there, steps whose two likeliest tokens lie within TIE are where an answer may part.
"""

import random

import pytest
from tiny_models import TINY_MODELS, VOCAB_SIZE, write_tiny_model

from refengine import LLM, SamplingParams

TIE = 1e-3
NUM_REQUESTS = 64
MAX_MODEL_LEN = 160


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model("llama3_scaling", tmp_path_factory.mktemp("tiny"))


def requests(seed=0, count=NUM_REQUESTS):
    """Prompts of 1 to 90 tokens with shared beginnings, greedy and sampled, of all lengths."""
    draw = random.Random(seed)
    shared = [draw.randrange(VOCAB_SIZE) for _ in range(50)]
    prompts, params = [], []
    for number in range(count):
        own = [draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 40))]
        prompts.append({"prompt_token_ids": shared[: draw.choice([0, 0, 16, 50])] + own})
        params.append(
            SamplingParams(
                temperature=draw.choice([0.0, 0.0, 0.8]),
                top_p=draw.choice([1.0, 0.9]),
                frequency_penalty=draw.choice([0.0, 0.5]),
                max_tokens=draw.randint(1, 60),
                min_tokens=draw.choice([0, 1]),
                seed=number,
                logprobs=2,
            )
        )
    return prompts, params


def generate(model, backend, prompts, params, **options):
    llm = LLM(str(model), backend=backend, dtype="float32", max_model_len=MAX_MODEL_LEN,
              **({"num_kv_blocks": 800} | options))  # fmt: skip
    scheduler = llm.engine.scheduler
    step = llm.engine.step

    def checked_step():
        outputs = step()
        scheduler.check_invariants()
        return outputs

    llm.engine.step = checked_step
    outputs = llm.generate(prompts, params)
    assert scheduler.num_free_blocks == scheduler.num_blocks
    llm.close()
    return outputs


@pytest.fixture(scope="module", params=["reference", "cpu"])
def solo(request, model):
    """Each request alone, one after the other."""
    prompts, params = requests()
    outputs = []
    llm = LLM(str(model), backend=request.param, dtype="float32", max_model_len=MAX_MODEL_LEN,
              num_kv_blocks=800)  # fmt: skip
    for prompt, own in zip(prompts, params, strict=True):
        outputs += llm.generate(prompt, own)
    return request.param, prompts, params, outputs


def assert_same(backend, alone, together):
    """Tokens are equal; on the reference, up to the first tie of a request."""
    ties = 0
    for one, other in zip(alone, together, strict=True):
        ours, theirs = one.outputs[0], other.outputs[0]
        if ours.token_ids == theirs.token_ids:
            assert ours.finish_reason == theirs.finish_reason
            continue
        assert backend == "reference", "the cpu backend must be equal to the last bit"
        at = next(
            i
            for i, (a, b) in enumerate(zip(ours.token_ids, theirs.token_ids, strict=False))
            if a != b
        )
        best = sorted((entry.logprob for entry in ours.logprobs[at].values()), reverse=True)
        assert best[0] - best[1] < TIE, f"request {one.request_id} parts at token {at}"
        ties += 1
    assert ties <= 2


def test_together_is_as_alone(solo, model):
    backend, prompts, params, alone = solo
    assert_same(backend, alone, generate(model, backend, prompts, params))


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_chunks_of_any_size_are_as_whole_prompts(solo, model, chunk):
    backend, prompts, params, alone = solo
    together = generate(model, backend, prompts, params, max_num_batched_tokens=chunk)
    assert_same(backend, alone, together)


def test_without_chunked_prefill(solo, model):
    backend, prompts, params, alone = solo
    together = generate(
        model, backend, prompts, params, enable_chunked_prefill=False, max_num_batched_tokens=160
    )
    assert_same(backend, alone, together)


@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_a_pool_so_small_that_requests_are_preempted_many_times(solo, model, block_size):
    backend, prompts, params, alone = solo
    # Room for the longest request and little more.
    num_kv_blocks = -(-MAX_MODEL_LEN // block_size) + 2
    together = generate(
        model, backend, prompts, params, block_size=block_size, num_kv_blocks=num_kv_blocks
    )
    assert sum(output.num_preemptions for output in together) > 20
    assert_same(backend, alone, together)


@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_backends_agree_on_every_architecture(name, tmp_path):
    model = write_tiny_model(name, tmp_path / name)
    prompts, params = requests(seed=1, count=12)
    reference = generate(model, "reference", prompts, params)
    for options in ({}, {"enforce_eager": True}):
        assert_same("reference", reference, generate(model, "cpu", prompts, params, **options))


def test_compiled_and_eager_are_equal_to_the_last_bit(model):
    prompts, params = requests(seed=2, count=16)
    eager = generate(model, "cpu", prompts, params, enforce_eager=True)
    compiled = generate(model, "cpu", prompts, params)
    assert_same("cpu", eager, compiled)
