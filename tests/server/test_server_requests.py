"""What a client may send: a field works or is refused by name, and nothing breaks the server."""

from __future__ import annotations

import json
import random
import re
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "the cat"}],
    "max_tokens": 2,
}
COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "the cat", "max_tokens": 2}


@pytest.fixture(autouse=True)
def alive(tiny):
    """Whatever a test sends, the server answers the next client."""
    yield
    response = tiny.post("/v1/completions", COMPLETION)
    assert response.status_code == 200, response.text
    assert tiny.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temperature": -1}, "temperature", "greater than or equal to 0; got -1"),
        ({"temperature": "hot"}, "temperature", 'valid number; got "hot"'),
        ({"temperature": True}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 1.5}, "n", "valid integer"),
        ({"n": 10**30}, "n", "less than or equal to 64"),
        ({"max_tokens": 10**6}, "max_tokens", "more than the 512 that a request may have"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"min_tokens": 3}, "min_tokens", "min_tokens is 3, more than max_tokens, 2"),
        ({"stop": [""]}, "stop", "at least 1 character"),
        ({"stop": ["x"] * 99}, "stop", "at most 16"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "the key 'x'; keys are token ids from 0 to 299"),
        ({"logit_bias": {"300": 1}}, "logit_bias", "keys are token ids from 0 to 299"),
        ({"logit_bias": {"3": 101}}, "logit_bias", "less than or equal to 100"),
        ({"stop_token_ids": [300]}, None, "stop_token_ids holds 300"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs=true"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "is for stream=true"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'user'"),
        ({"messages": [{"role": "user"}], "frobnicate": 1}, "frobnicate", "not a field"),
        ({"audio": {}}, "audio", "not supported by this server: this server makes text only"),
        ({"functions": []}, "functions", "use tools and tool_choice"),
        ({"tool_choice": "auto"}, "tool_choice", "needs tools"),
        ({"store": True}, "store", "got true"),
        ({"seed": 2**64}, "seed", "less than or equal to"),
        ({"max_completion_tokens": 3}, "max_tokens", "differ"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "may not set messages"),
    ],
)
def test_a_wrong_field_is_named(tiny, fields, param, message):
    response = tiny.post("/v1/chat/completions", CHAT | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_other_refusals(tiny, start):
    response = tiny.post("/v1/chat/completions", CHAT | {"model": "gpt-4o"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    response = tiny.post("/v1/completions", {"model": "tiny"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    response = tiny.post("/v1/completions", COMPLETION | {"prompt": [1, 300]})
    assert "300" in response.json()["error"]["message"]
    response = tiny.post("/v1/completions", COMPLETION | {"prompt": ""})
    assert "prompt is empty" in response.json()["error"]["message"]
    response = tiny.post("/v1/completions", COMPLETION | {"prompt": "a b " * 1000})
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert tiny.get("/nothing").json()["error"]["code"] == "not_found"
    response = tiny.get("/v1/completions")
    assert (response.status_code, response.headers["Allow"]) == (405, "POST")
    assert tiny.post("/v1/completions", None, data="prompt=x").status_code == 415


def test_nulls_and_meaningless_fields_ask_for_nothing(tiny):
    more = {"audio": None, "functions": None, "user": "me", "metadata": {"a": "b"}, "stop": None,
            "store": False, "service_tier": "auto", "seed": None, "n": 1}  # fmt: skip
    assert tiny.post("/v1/chat/completions", CHAT | more).status_code == 200


def test_a_template_without_tools_says_so(start, tiny_model):
    server = start(tiny_model("llama_biases"), "--backend", "reference", "--num-kv-blocks", "32",
                   "--served-model-name", "plain")  # fmt: skip
    tool = {"type": "function", "function": {"name": "f"}}
    response = server.post("/v1/chat/completions", CHAT | {"model": "plain", "tools": [tool]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
    assert "chat template has no tools" in response.json()["error"]["message"]
    assert server.stop() == 0


def test_request_ids_go_in_and_out(tiny):
    given = tiny.get("/version", headers={"X-Request-Id": "mine-1"})
    assert given.headers["X-Request-Id"] == "mine-1"
    for bad in ("a b", "x" * 200, "né"):
        made = tiny.get("/version", headers={"X-Request-Id": bad.encode()})
        assert re.fullmatch("[0-9a-f]{32}", made.headers["X-Request-Id"])
    lines = [json.loads(line) for line in tiny.log.read_text().splitlines() if line[:1] == "{"]
    (line,) = [line for line in lines if line.get("request_id") == "mine-1"]
    assert (line["method"], line["path"], line["status"]) == ("GET", "/version", 200)


def test_pages_of_other_sites_are_kept_out(tiny, start):
    for path in ("/v1/completions", "/api/generate"):
        response = tiny.post(path, COMPLETION, headers={"Origin": "http://evil.example"})
        assert response.status_code == 403
        assert "Access-Control-Allow-Origin" not in response.headers
    same = tiny.post("/v1/completions", COMPLETION, headers={"Origin": tiny.url})
    assert same.status_code == 200


def test_pages_bring_all_they_need(tiny):
    for path in ("/", "/docs"):
        response = tiny.get(path)
        assert response.status_code == 200
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", response.text)
        assert "<title>refengine" in response.text


def test_metrics_have_vllms_names(tiny):
    before = tiny.metric("generation_tokens_total")
    tiny.post("/v1/completions", COMPLETION)
    assert tiny.metric("generation_tokens_total") == before + 2
    text = tiny.get("/metrics").text
    for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
        "prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total",
        "prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_sum", "e2e_request_latency_seconds_count",
        "request_queue_time_seconds_count", "request_prefill_time_seconds_count",
        "request_decode_time_seconds_count", "iteration_tokens_total_bucket",
    ):  # fmt: skip
        assert f"\nrefengine:{name}{{" in text, name
    assert 'refengine:request_success_total{finished_reason="length"' in text


BODIES = {
    "nothing": b"",
    "not json": b"{prompt",
    "bytes": bytes(range(256)),
    "not utf-8": b'{"model": "tiny", "prompt": "\xff"}',
    "utf-16": '{"model": "tiny"}'.encode("utf-16"),
    "array": b"[]",
    "null": b"null",
    "number": b"1",
    "nan": b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
    "infinity": b'{"model": "tiny", "prompt": "a", "temperature": -Infinity}',
    "overflow": b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
    "huge integer": b'{"model": "tiny", "prompt": "a", "n": ' + b"9" * 5000 + b"}",
    "half a pair": b'{"model": "tiny", "prompt": "\\ud83d"}',
    "half a pair as a key": b'{"model": "tiny", "prompt": "a", "\\udc00": 1}',
    "deep": b'{"model": "tiny", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "unclosed": b"[" * 200_000,
    "deep schema": json.dumps(
        CHAT
        | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}}
    )
    .replace('"schema": {}', '"schema": ' + '{"items": ' * 80 + "{}" + "}" * 80)
    .encode(),
    "many ids": json.dumps(COMPLETION | {"prompt": [1] * 1_000_000}).encode(),
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/api/chat"])
def test_no_body_breaks_the_server(tiny, path, name):
    headers = {"Content-Type": "application/json"}
    response = tiny.post(path, None, data=BODIES[name], headers=headers)
    assert response.status_code == 400, response.text[:300]
    error = response.json()["error"]
    assert "message" in error if path.startswith("/v1") else isinstance(error, str)


@pytest.mark.parametrize("chunked", [False, True])
def test_ten_megabytes_are_too_large(tiny, chunked):
    data = b'{"prompt": "' + b"a" * 10_000_000 + b'"}'
    sent: Any = iter([data[i : i + 65536] for i in range(0, len(data), 65536)]) if chunked else data
    response = tiny.post("/v1/completions", None, data=sent,
                         headers={"Content-Type": "application/json"})  # fmt: skip
    assert response.status_code == 413, response.text
    assert response.json()["error"]["code"] == "request_too_large"


def test_raw_bytes_instead_of_http(tiny):
    address = urlsplit(tiny.url)
    generator = random.Random(1)
    heads = (b"", b"GET / HTTP/1.1\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n",
             b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n",
             b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
             b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET " + b"a" * 100_000)  # fmt: skip
    for number in range(60):
        with socket.create_connection((address.hostname, address.port)) as client:
            client.settimeout(10)
            data = heads[number % len(heads)] + generator.randbytes(generator.randrange(2000))
            try:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                answer = client.recv(64)
            except OSError:  # the server has hung up already
                continue
            assert not re.match(rb"HTTP/1.1 5", answer), (data[:100], answer)


WORDS: list[Any] = [
    *("", "x", "\x00", "🙂" * 3, "tiny", -1, 0, 1, 10**20, 1.5, 1e300, None, True),
    *([], {}, [[]], ["a"], [1, 2], [None]),
    *({"type": "text"}, {"a": {"b": []}}, [{"role": "user"}]),
]


def test_random_fields(tiny):
    from refengine.server.schemas import ChatRequest, CompletionRequest, EmbeddingRequest

    generator = random.Random(7)
    routes = (("/v1/completions", CompletionRequest, COMPLETION),
              ("/v1/chat/completions", ChatRequest, CHAT),
              ("/v1/embeddings", EmbeddingRequest, {"model": "tiny", "input": "a"}))  # fmt: skip
    statuses = set()
    for _ in range(400):
        path, model, base = generator.choice(routes)
        names = generator.sample(sorted(model.model_fields), generator.randint(1, 3))
        body = base | {name: generator.choice(WORDS) for name in names}
        response = tiny.post(path, body)
        statuses.add(response.status_code)
        assert response.status_code in (200, 400, 404), (body, response.text)
    assert statuses >= {200, 400}


def test_the_dashboard_names_metrics_that_there_are(tiny):
    text = (Path(__file__).parents[2] / "docs/grafana-dashboard.json").read_text("utf-8")
    names = set(re.findall(r"refengine:\w+", text))
    assert len(names) > 12
    there = tiny.get("/metrics").text
    assert not [name for name in names if f"\n{name}{{" not in there]
