"""The documented examples against the default model, with the official clients."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import ollama
import openai
import pytest

pytestmark = pytest.mark.model

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(real):
    with openai.OpenAI(base_url=real.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openais_client(client):
    fields = {"model": "smollm2", "messages": QUESTION, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**fields)
    assert "Paris" in whole.choices[0].message.content
    stream = client.chat.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    # The second finds the first one's prompt in the prefix cache, if that is on.
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    text = "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
    assert text == whole.choices[0].message.content
    reasons = [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason]
    assert reasons == [whole.choices[0].finish_reason]


def test_ollamas_client(real):
    client = ollama.Client(real.url)
    options = {"temperature": 0, "num_predict": 24}
    whole = client.chat(model="smollm2", messages=QUESTION, options=options)
    assert "Paris" in whole.message.content
    parts = client.chat(model="smollm2", messages=QUESTION, options=options, stream=True)
    assert "".join(part.message.content for part in parts) == whole.message.content
    client._client.close()


def test_similar_texts_have_similar_embeddings(client):
    texts = ["The cat sleeps on the sofa.", "A kitten naps on the couch.",
             "Interest rates rose by two percent in March."]  # fmt: skip
    a, b, c = (e.embedding for e in client.embeddings.create(model="smollm2", input=texts).data)
    assert sum(x * y for x, y in zip(a, b, strict=True)) > sum(
        x * y for x, y in zip(a, c, strict=True)
    )


TEXT = {"type": "string", "maxLength": 12}
WHOLE = {"type": "integer", "minimum": 0, "maximum": 1000}
# Parts of schemas whose answers are of bounded length: a small model would fill any other.
VALUES: list[dict[str, Any]] = [
    TEXT,
    WHOLE,
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "boolean"},
    {"type": "null"},
    {"enum": ["red", "green", "blue"]},
    {"const": 42},
    {"enum": [1, "one", None, True]},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
    {"oneOf": [{"const": "x"}, {"const": "y"}]},
    {"type": "array", "items": WHOLE, "minItems": 1, "maxItems": 3},
    {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 2},
    {"type": "array", "prefixItems": [WHOLE, TEXT], "items": False, "minItems": 2},
    {"type": "array", "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
     "maxItems": 2},
    {"type": "object", "properties": {"x": WHOLE, "y": WHOLE}, "required": ["x", "y"],
     "additionalProperties": False},
    {"type": "object", "properties": {"inner": {"type": "object", "properties": {"deep": TEXT},
     "required": ["deep"], "additionalProperties": False}}, "required": ["inner"],
     "additionalProperties": False},
    {"$ref": "#/$defs/point"},
    {"type": ["string", "null"], "maxLength": 6},
    {"type": "integer", "exclusiveMinimum": 9, "exclusiveMaximum": 12},
    {"allOf": [{"type": "integer"}, {"minimum": 5, "maximum": 7}]},
]  # fmt: skip
DEFINITIONS = {
    "point": {
        "type": "object",
        "properties": {"x": WHOLE},
        "required": ["x"],
        "additionalProperties": False,
    }
}


def bounded_schemas() -> list[dict[str, Any]]:
    """24 kinds of value in an object each, and eight objects of several."""
    sets = [[value] for value in VALUES]
    sets += [VALUES[i::8] for i in range(8)]
    return [
        {
            "$defs": DEFINITIONS,
            "type": "object",
            "properties": {f"field{i}": value for i, value in enumerate(values)},
            "required": [f"field{i}" for i in range(len(values))],
            "additionalProperties": False,
        }
        for values in sets
    ]


def test_every_answer_follows_its_schema(client):
    def ask(numbered: tuple[int, dict[str, Any]]) -> None:
        number, schema = numbered
        answer = client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": "Describe a cat as JSON."}],
            temperature=0.8 if number % 2 else 0.0,
            seed=number,
            max_tokens=400,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": schema},
            },
        )
        choice = answer.choices[0]
        assert choice.finish_reason == "stop", choice.message.content
        jsonschema.validate(json.loads(choice.message.content), schema)

    schemas = bounded_schemas()
    assert len(schemas) >= 30
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, enumerate(schemas)))
