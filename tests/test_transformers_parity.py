"""Tokens equal those of Hugging Face transformers (float32, eager), recorded in tests/data.

An answer may part from transformers' only at a step whose two likeliest tokens lie within TIE of
each other, and is not compared from there on. tests/data/make_expectations.py makes the
expectations.
"""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import TINY_MODELS

from refengine import LLM, SamplingParams

DATA = Path(__file__).parent / "data"
TIE = 1e-3


@pytest.fixture(scope="module")
def tiny_expectations():
    return json.loads((DATA / "tiny_models.json").read_text())["models"]


@pytest.fixture(scope="module")
def smollm2_expectations():
    with gzip.open(DATA / "greedy_smollm2.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)["prompts"]


def assert_greedy_tokens(outputs, expected):
    compared = 0
    for output, entry in zip(outputs, expected, strict=True):
        steps = zip(output.outputs[0].token_ids, entry["token_ids"], entry["gaps"], strict=True)
        for at, (ours, theirs, gap) in enumerate(steps):
            compared += 1
            if ours != theirs:
                name = entry.get("name", f"prompt of {len(entry['prompt_token_ids'])}")
                assert gap <= TIE, f"{name}: token {at} is {ours}, transformers' is {theirs}"
                break
    # Ties must stay the exception, or nothing was compared.
    assert compared > 0.8 * sum(len(entry["gaps"]) for entry in expected)


@pytest.mark.parametrize("options", [
    {"backend": "reference"}, {"backend": "cpu"}, {"backend": "cpu", "enforce_eager": True},
], ids=["reference", "cpu", "cpu-eager"])  # fmt: skip
@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_tiny_models_of_every_architecture(name, options, tiny_model, tiny_expectations):
    expected = tiny_expectations[name]
    llm = LLM(str(tiny_model(name)), dtype="float32", num_kv_blocks=200, **options)
    prompts = [{"prompt_token_ids": entry["prompt_token_ids"]} for entry in expected]
    count = len(expected[0]["token_ids"])
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=20)
    outputs = llm.generate(prompts, params)
    assert_greedy_tokens(outputs, expected)
    # The first step's logits, not only their order: differences to the likeliest token.
    for output, entry in zip(outputs, expected, strict=True):
        logits = np.array(entry["last_prompt_logits"])
        first = output.outputs[0].logprobs[0]
        best = max(first, key=lambda token: first[token].logprob)
        for token, value in first.items():
            difference = first[best].logprob - value.logprob
            assert difference == pytest.approx(logits[best] - logits[token], abs=2e-3)


@pytest.mark.model
def test_smollm2_on_the_cpu(smollm2_path, smollm2_expectations):
    llm = LLM(str(smollm2_path), backend="cpu", dtype="float32", max_model_len=2048)
    prompts = [{"prompt_token_ids": e["prompt_token_ids"]} for e in smollm2_expectations]
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    assert_greedy_tokens(llm.generate(prompts, params), smollm2_expectations)


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_on_the_reference(smollm2_path, smollm2_expectations):
    short = [e for e in smollm2_expectations if len(e["prompt_token_ids"]) <= 200]
    llm = LLM(str(smollm2_path), backend="reference", max_model_len=512)
    prompts = [{"prompt_token_ids": e["prompt_token_ids"]} for e in short]
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    assert_greedy_tokens(llm.generate(prompts, params), short)
