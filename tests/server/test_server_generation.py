"""The generating routes, through the official clients, with a tiny model."""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from typing import Any

import jsonschema
import ollama
import openai
import pytest

PROMPT = "the cat and the dog"
MESSAGES: list[Any] = [{"role": "user", "content": "the cat is in the sea"}]


@pytest.fixture(scope="module")
def client(tiny):
    with openai.OpenAI(base_url=tiny.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def local(tiny):
    client = ollama.Client(tiny.url)
    yield client
    client._client.close()


def joined(chunks: Any) -> dict[int, dict[str, Any]]:
    """A stream's choices put together; checks that each ends once, and last."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for part in chunk.choices:
            choice = choices.setdefault(part.index, {"text": "", "reasons": [], "calls": []})
            assert not choice["reasons"], "something follows the finish_reason"
            if hasattr(part, "delta"):
                choice["text"] += part.delta.content or ""
                choice["calls"] += part.delta.tool_calls or []
            else:
                choice["text"] += part.text
            if part.finish_reason:
                choice["reasons"].append(part.finish_reason)
        if chunk.usage is not None:
            choices.setdefault(-1, {})["usage"] = chunk.usage
    return choices


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_streamed_chat_joins_to_the_unstreamed_one(client, n, temperature):
    fields = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20, "n": n, "seed": 5,
              "temperature": temperature}  # fmt: skip
    whole = client.chat.completions.create(**fields)
    stream = client.chat.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    )
    parts = joined(stream)
    usage = parts.pop(-1)["usage"]
    assert usage.prompt_tokens == whole.usage.prompt_tokens
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.total_tokens == whole.usage.total_tokens
    assert [parts[i]["text"] for i in range(n)] == [c.message.content for c in whole.choices]
    assert [parts[i]["reasons"] for i in range(n)] == [[c.finish_reason] for c in whole.choices]
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.usage.prompt_tokens_details.cached_tokens >= 0
    if temperature and n > 1:
        assert len({choice.message.content for choice in whole.choices}) == n


@pytest.mark.parametrize("echo", [False, True])
def test_a_streamed_completion_joins_to_the_unstreamed_one(client, echo):
    fields = {"model": "tiny", "prompt": [PROMPT, "in the sea"], "max_tokens": 9, "n": 2,
              "seed": 1, "echo": echo, "logprobs": 2}  # fmt: skip
    whole = client.completions.create(**fields)
    parts = joined(client.completions.create(**fields, stream=True))
    assert [parts[i]["text"] for i in range(4)] == [c.text for c in whole.choices]
    assert whole.choices[0].text.startswith(PROMPT) == echo
    assert whole.choices[2].text.startswith("in the sea") == echo
    assert whole.usage.completion_tokens == 36


def test_equal_beginnings_are_cached_within_a_salt(client):
    fields = {"model": "tiny", "prompt": "a cat in the sea " * 12, "max_tokens": 2}
    cached = [
        client.completions.create(**fields, extra_body=body).usage.prompt_tokens_details
        for body in ({}, {}, {"cache_salt": "other"}, {"cache_salt": "other"})
    ]
    first, again, salted, salted_again = (details.cached_tokens for details in cached)
    assert (first, salted) == (0, 0)
    assert again == salted_again
    assert again >= 16


def test_usage_counts_what_tokenize_counts(tiny, client):
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=7, n=3)
    count = tiny.post("/tokenize", {"prompt": PROMPT}).json()["count"]
    assert answer.usage.prompt_tokens == count
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=3)
    assert (
        chat.usage.prompt_tokens == tiny.post("/tokenize", {"messages": MESSAGES}).json()["count"]
    )


@pytest.mark.parametrize("count", [0, 5, 20])
def test_chat_logprobs(client, count):
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=6, logprobs=True, top_logprobs=count, seed=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for entry in content:
        assert len(entry.top_logprobs) == count
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert all(value <= 0 for value in [*values, entry.logprob])
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token


def test_streamed_logprobs_are_the_unstreamed_ones(client):
    fields = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "logprobs": True,
              "top_logprobs": 3, "temperature": 0}  # fmt: skip
    whole = client.chat.completions.create(**fields).choices[0].logprobs.content
    stream = client.chat.completions.create(**fields, stream=True)
    parts = [e for c in stream for p in c.choices if p.logprobs for e in p.logprobs.content]
    assert parts == whole


def test_more_than_twenty_logprobs_are_refused(tiny, client):
    with pytest.raises(openai.BadRequestError, match="top_logprobs") as caught:
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=21
        )
    assert caught.value.param == "top_logprobs"
    with pytest.raises(openai.BadRequestError, match="logprobs"):
        client.completions.create(model="tiny", prompt=PROMPT, logprobs=21)


def test_completion_logprobs_with_echo_score_the_prompt(client):
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=0, echo=True, logprobs=4
    )
    choice = answer.choices[0]
    assert choice.text == PROMPT
    assert (answer.usage.completion_tokens, choice.finish_reason) == (0, "length")
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == PROMPT
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert all(len(top) >= 4 for top in logprobs.top_logprobs[1:])
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert PROMPT[offset : offset + len(token)] == token


def test_best_of_gives_the_likeliest(client):
    fields = {"model": "tiny", "prompt": PROMPT, "max_tokens": 5, "seed": 9, "logprobs": 0}
    made = client.completions.create(**fields, n=6).choices
    best = client.completions.create(**fields, n=2, best_of=6)
    made.sort(key=lambda c: -sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs))
    assert [c.text for c in best.choices] == [c.text for c in made[:2]]
    assert best.usage.completion_tokens == 30
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(model="tiny", prompt=PROMPT, best_of=1, n=2)
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(model="tiny", prompt=PROMPT, best_of=2, stream=True)


def test_a_seed_repeats_and_its_absence_does_not(client):
    fields = {"model": "tiny", "prompt": PROMPT, "max_tokens": 16}
    texts = [client.completions.create(**fields, seed=4).choices[0].text for _ in range(2)]
    assert texts[0] == texts[1]
    free = {client.completions.create(**fields).choices[0].text for _ in range(4)}
    assert len(free) > 1


def test_stop_ends_an_answer(client):
    fields = {"model": "tiny", "prompt": PROMPT, "max_tokens": 30, "temperature": 0}
    text = client.completions.create(**fields).choices[0].text
    stop = text[6:8]
    choice = client.completions.create(**fields, stop=[stop, "never"]).choices[0]
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")


def test_logit_bias_and_vllms_fields_work(client):
    fields = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    forced = client.completions.create(**fields, logit_bias={"65": 100})
    assert forced.choices[0].text == "a" * 4 or len(set(forced.choices[0].text)) == 1
    kept = client.completions.create(
        **fields,
        extra_body={"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True,
                    "min_tokens": 2, "stop_token_ids": [1], "bad_words": ["cat"], "priority": 3,
                    "cache_salt": "mine", "skip_special_tokens": False},
    )  # fmt: skip
    assert kept.choices[0].finish_reason in ("length", "stop")


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 20},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_response_format_holds(client, stream):
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=200,
        seed=1,
        stream=stream,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    )
    text = joined(answer)[0]["text"] if stream else answer.choices[0].message.content
    jsonschema.validate(json.loads(text), SCHEMA)


def test_json_object_expressions_and_grammars(client):
    fields = {"model": "tiny", "messages": MESSAGES, "max_tokens": 300, "temperature": 0}
    text = client.chat.completions.create(
        **fields, response_format={"type": "json_object"}, logit_bias={"125": 20}
    )
    assert text.choices[0].message.content.startswith("{")
    for field, value, pattern in (
        ("guided_regex", "(yes|no)-[0-9]{4}", "(yes|no)-[0-9]{4}"),
        ("guided_grammar", 'start: "<" /[a-c]{2}/ ">"', "<[a-c]{2}>"),
    ):
        answer = client.chat.completions.create(**fields, extra_body={field: value})
        assert re.fullmatch(pattern, answer.choices[0].message.content)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema":
          {"name": "x", "schema": {"type": "nonsense"}}}}, "response_format"),
        ({"guided_regex": "(oh"}, "guided_regex"),
        ({"guided_grammar": "start: missing"}, "guided_grammar"),
        ({"guided_grammar": "start: " + "(" * 30000}, "guided_grammar"),
        ({"guided_regex": "a", "guided_grammar": 'start: "a"'}, "guided_grammar"),
    ],
)  # fmt: skip
def test_unusable_structures_are_named(tiny, fields, param):
    response = tiny.post("/v1/chat/completions", {"model": "tiny", "messages": MESSAGES} | fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "x",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rome", "Oslo"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "time")
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "time"}}])
def test_a_forced_tool_is_called(client, stream, choice):
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=TOOLS, tool_choice=choice, max_tokens=150, seed=2,
        stream=stream,
    )  # fmt: skip
    if stream:
        part = joined(answer)[0]
        (call,), reason = part["calls"], part["reasons"][0]
        assert part["text"] == ""
    else:
        (call,), reason = answer.choices[0].message.tool_calls, answer.choices[0].finish_reason
        assert answer.choices[0].message.content is None
    assert reason == "tool_calls"
    assert call.function.name in (["weather", "time"] if choice == "required" else ["time"])
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")


def test_a_conversation_with_calls_is_understood(client):
    call = {"id": "1", "type": "function",
            "function": {"name": "time", "arguments": '{"city": "Rome"}'}}  # fmt: skip
    answer = client.chat.completions.create(
        model="tiny",
        messages=[*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]},
                  {"role": "tool", "tool_call_id": "1", "content": "noon"}],
        tools=TOOLS, tool_choice="none", max_tokens=3,
    )  # fmt: skip
    assert answer.choices[0].message.tool_calls is None


def test_embeddings(client):
    texts = ["the cat", "the dog in the sea", "the cat"]
    answer = client.embeddings.create(model="tiny", input=texts)  # the client asks for base64
    vectors = [entry.embedding for entry in answer.data]
    assert all(math.isclose(sum(v * v for v in vector), 1.0, rel_tol=1e-5) for vector in vectors)
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-5)
    assert vectors[0] != pytest.approx(vectors[1], abs=1e-2)
    plain = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    assert plain.data[1].embedding == pytest.approx(vectors[1], abs=1e-6)
    last = client.embeddings.create(model="tiny", input=texts[1], extra_body={"pooling": "last"})
    assert last.data[0].embedding != pytest.approx(vectors[1], abs=1e-2)
    assert answer.usage.prompt_tokens > 0


def test_embeddings_in_base64_are_little_endian_floats(tiny):
    body = {"model": "tiny", "input": "the cat"}
    plain = tiny.post("/v1/embeddings", body).json()["data"][0]["embedding"]
    coded = tiny.post("/v1/embeddings", body | {"encoding_format": "base64"}).json()
    data = base64.b64decode(coded["data"][0]["embedding"])
    assert struct.unpack(f"<{len(plain)}f", data) == pytest.approx(plain, abs=1e-6)


@pytest.mark.parametrize("route", ["chat", "generate"])
def test_ollamas_client(local, route):
    options = {"temperature": 0, "num_predict": 12}
    ask = local.chat if route == "chat" else local.generate
    what: Any = {"messages": MESSAGES} if route == "chat" else {"prompt": PROMPT}
    whole = ask(model="tiny", options=options, **what)
    parts = list(ask(model="tiny:latest", options=options, stream=True, **what))

    def text(part):
        return part.message.content if route == "chat" else part.response

    assert "".join(text(part) for part in parts) == text(whole)
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert (whole.done_reason, whole.eval_count) == ("length", 12)
    assert parts[-1].prompt_eval_count == whole.prompt_eval_count > 0
    total = parts[-1].total_duration
    assert total >= parts[-1].prompt_eval_duration + parts[-1].eval_duration - 1
    assert parts[-1].eval_duration > 0


def test_ollamas_other_routes_and_errors(local, tiny):
    assert [m.model for m in local.list().models] == ["tiny"]
    assert re.match(r"\d+\.\d+", tiny.get("/api/version").json()["version"])
    with pytest.raises(ollama.ResponseError, match="there is no model 'other'") as caught:
        local.chat(model="other", messages=MESSAGES)
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match=r"options\.mirostat is not a field"):
        local.chat(model="tiny", messages=MESSAGES, options={"mirostat": 1})
    answer = local.chat(model="tiny", messages=MESSAGES, format=SCHEMA, options={"seed": 1})
    jsonschema.validate(json.loads(answer.message.content), SCHEMA)
    raw = local.generate(model="tiny", prompt="ab", raw=True, options={"num_predict": 2})
    assert raw.prompt_eval_count == 2
    # As in Ollama's documentation: curl without a content type.
    response = tiny.post("/api/generate", None, data='{"model": "tiny", "prompt": "a", '
                         '"stream": false, "options": {"num_predict": 1}}')  # fmt: skip
    assert response.json()["done"] is True


def test_models_tokenize_detokenize(client, tiny):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    ids = tiny.post("/tokenize", {"prompt": "déjà vu 🙂"}).json()["tokens"]
    assert tiny.post("/detokenize", {"tokens": ids}).json()["prompt"] == "déjà vu 🙂"
    assert tiny.post("/detokenize", {"tokens": [300]}).status_code == 400
