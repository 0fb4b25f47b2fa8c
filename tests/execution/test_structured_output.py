"""Structured outputs and pooling through a whole engine of a tiny model."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from refengine import LLM, SamplingParams
from refengine.errors import RequestError
from refengine.execution.structured_output import StructuredOutputs
from refengine.sampling_params import StructuredOutput

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module")
def llm(tiny_model) -> LLM:
    return LLM(str(tiny_model("llama_biases")), backend="reference", num_kv_blocks=64)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_schema_holds_whatever_the_model_wants(llm: LLM, temperature: float) -> None:
    structure = StructuredOutput("json_schema", SCHEMA)
    params = [
        SamplingParams(
            temperature=temperature, seed=seed, max_tokens=200, structured_output=structure
        )
        for seed in range(4)
    ]
    for output in llm.generate(["give me json"] * 4, params):
        answer = output.outputs[0]
        assert answer.finish_reason == "stop"
        value = json.loads(answer.text)
        assert value["a"] <= 99
        assert value["b"] in "xy"


@pytest.mark.parametrize(
    ("structure", "pattern"),
    [
        (StructuredOutput("regex", "[ab]{3}-[0-9]{2}"), "[ab]{3}-[0-9]{2}"),
        (StructuredOutput("grammar", 'start: ("yes" | "no") "!"'), "(yes|no)!"),
    ],
)
def test_expressions_and_grammars(llm: LLM, structure: StructuredOutput, pattern: str) -> None:
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=50, structured_output=structure)
    (output,) = llm.generate("x", params)
    assert re.fullmatch(pattern, output.outputs[0].text)


def test_preemption_does_not_lose_the_place(tiny_model) -> None:
    structure = StructuredOutput("regex", "([0-9]{3},){12}")
    params = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=60, structured_output=structure)
        for i in range(4)
    ]
    prompts = ["one two three"] * 4
    path = str(tiny_model("llama_biases"))
    roomy = LLM(path, backend="reference", num_kv_blocks=64).generate(prompts, params)
    tight = LLM(path, backend="reference", num_kv_blocks=9, block_size=8).generate(prompts, params)
    assert any(output.num_preemptions for output in tight)
    assert [o.outputs[0].text for o in tight] == [o.outputs[0].text for o in roomy]
    assert all(re.fullmatch("([0-9]{3},){12}", o.outputs[0].text) for o in tight)


@pytest.mark.parametrize(
    "structure",
    [
        StructuredOutput("json_schema", '{"type": "nonsense"}'),
        StructuredOutput("json_schema", "not json"),
        StructuredOutput("regex", "(unclosed"),
        StructuredOutput("regex", "(" * 5000 + ")" * 5000),
        StructuredOutput("grammar", "start: missing"),
        StructuredOutput("grammar", "x" * 100_000),
    ],
)
def test_unusable_structures_are_refused(llm: LLM, structure: StructuredOutput) -> None:
    structures = StructuredOutputs(llm.loaded.tokenizer, 300, (297,))
    with pytest.raises(RequestError):
        structures.matcher(structure)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_an_embedding_does_not_depend_on_how_the_prompt_is_cut(tiny_model, pooling: str) -> None:
    path = str(tiny_model("llama_biases"))
    params = SamplingParams(max_tokens=1, pooling=pooling)
    prompts = ["the cat and the dog went to the sea", "a b"]
    found = []
    for tokens in (512, 3):
        llm = LLM(path, backend="reference", num_kv_blocks=64, max_num_batched_tokens=tokens)
        found.append([output.embedding for output in llm.generate(prompts, params)])
    assert len(found[0][0]) == 32
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert not np.allclose(found[0][0], found[0][1])


def test_pooling_is_checked() -> None:
    with pytest.raises(ValueError, match="pooling must be one of mean, last, got 'max'"):
        SamplingParams(max_tokens=1, pooling="max")
    with pytest.raises(ValueError, match="pooling needs max_tokens=1, got 16"):
        SamplingParams(pooling="mean")
