"""Clients that go away, engines that die, keys, full queues, and ending in order."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import requests
from conftest import TINY_FLAGS, Server

LONG: dict[str, Any] = {
    "model": "tiny",
    "prompt": "the cat and the dog",
    "max_tokens": 480,
    "ignore_eos": True,
    "temperature": 0,
}


def open_request(server: Server, body: dict[str, Any]) -> http.client.HTTPConnection:
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection


def open_stream(server: Server, body: dict[str, Any]) -> Any:
    """A stream that has given its first event."""
    connection = open_request(server, body | {"stream": True})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    assert response.readline().startswith(b"data: ")
    return connection, response


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_everything(tiny, stream):
    for _ in range(3):
        connections = []
        for _ in range(8):
            if stream:
                connections.append(open_stream(tiny, LONG | {"n": 2}))
            else:
                connections.append((open_request(tiny, LONG | {"n": 2}), None))
        tiny.wait_for(lambda: tiny.metric("num_requests_running") > 8)
        aborted = tiny.get("/metrics").text
        for connection, response in connections:
            if response is not None:
                response.close()
            connection.close()
        tiny.wait_for(tiny.is_idle, 3)
        assert aborted
    assert tiny.post("/v1/completions", LONG | {"max_tokens": 2}).elapsed.total_seconds() < 2


def test_dropped_streams_leave_no_threads(tiny):
    process = psutil.Process(tiny.process.pid)
    counts = []
    for _ in range(4):
        streams = [open_stream(tiny, LONG) for _ in range(30)]
        for connection, response in streams:
            response.close()
            connection.close()
        tiny.wait_for(tiny.is_idle, 5)
        counts.append((process.num_threads(), process.num_fds()))
    time.sleep(0.2)
    # Threads of the pool stay; what is asked is that they do not become more.
    assert counts[-1][0] <= counts[0][0] + 5
    assert process.num_fds() <= counts[0][1] + 2


def test_many_streams_at_once_are_each_whole(tiny):
    bodies = [LONG | {"max_tokens": 30, "seed": i, "temperature": 1.0} for i in range(48)]
    alone = [tiny.post("/v1/completions", body).json()["choices"][0]["text"] for body in bodies[:6]]

    def streamed(body: dict[str, Any]) -> str:
        response = tiny.post("/v1/completions", body | {"stream": True}, stream=True)
        lines = [line.decode() for line in response.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        events = [json.loads(line[6:]) for line in lines[:-1]]
        reasons = [e["choices"][0]["finish_reason"] for e in events]
        assert reasons == [None] * (len(events) - 1) + ["length"]
        assert len({event["id"] for event in events}) == 1
        return "".join(event["choices"][0]["text"] for event in events)

    with ThreadPoolExecutor(48) as pool:
        texts = list(pool.map(streamed, bodies))
    assert texts[:6] == alone


def test_a_client_that_reads_slowly_loses_nothing(tiny):
    body = LONG | {"n": 48, "logprobs": 20, "max_tokens": 120}
    whole = tiny.post("/v1/completions", body).json()
    connection, response = open_stream(tiny, body)
    time.sleep(3.0)  # the socket fills, and the response's own thread takes over
    texts = [""] * 48
    data = response.read()
    lines = [line for line in data.split(b"\n\n") if line.startswith(b"data: {")]
    for line in lines:
        for choice in json.loads(line[6:])["choices"]:
            texts[choice["index"]] += choice["text"]
    connection.close()
    first = "" if len(texts[0]) == len(whole["choices"][0]["text"]) else None
    for index, choice in enumerate(whole["choices"]):
        assert choice["text"].endswith(texts[index])
        assert first is None or texts[index] == choice["text"]
    assert data.rstrip().endswith(b"data: [DONE]")


def test_who_has_priority_goes_first(start, tools_model):
    server = start(tools_model, "--backend", "reference", "--num-kv-blocks", "64",
                   "--max-num-seqs", "1")  # fmt: skip
    ended: list[int] = []

    def ask(priority: int) -> None:
        body = LONG | {"max_tokens": 60, "priority": priority}
        assert server.post("/v1/completions", body).status_code == 200
        ended.append(priority)

    # One seat, taken long enough for the others to queue behind it.
    connection, response = open_stream(server, LONG | {"priority": -9, "n": 8})
    with ThreadPoolExecutor(3) as pool:
        for priority in (5, 0, -5):
            pool.submit(ask, priority)
            time.sleep(0.1)
        assert response.read().rstrip().endswith(b"[DONE]")
    connection.close()
    assert ended == [-5, 0, 5]
    assert server.stop() == 0


@pytest.mark.parametrize("restart", [False, True])
def test_a_killed_engine(start, tools_model, restart):
    server = start(tools_model, *TINY_FLAGS, *(["--restart-engine"] if restart else []))
    connection, response = open_stream(server, LONG | {"n": 4})
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.post, "/v1/completions", LONG | {"n": 4})
        server.wait_for(lambda: server.metric("num_requests_running") == 8)
        os.kill(server.engine_pid(), signal.SIGKILL)
        text = response.read().decode()
        connection.close()
        assert '"code": "engine_unavailable"' in text
        assert waiting.result(10).status_code == 503
        health = server.get("/health")
        assert health.status_code == 503
        assert server.post("/v1/completions", LONG).status_code == 503
    if restart:
        server.wait_for(lambda: server.get("/health").status_code == 200, 60)
        assert server.post("/v1/completions", LONG | {"max_tokens": 2}).status_code == 200
        assert server.stop() == 0
    else:
        assert server.process.wait(20) == 1
        assert "the engine has died" in server.log.read_text()
        server.stop()


def test_sigterm_finishes_what_runs(start, tools_model):
    server = start(tools_model, *TINY_FLAGS)
    family = psutil.Process(server.process.pid).children(recursive=True)
    connection, response = open_stream(server, LONG)
    idle = requests.Session()
    assert idle.get(server.url + "/version", timeout=10).status_code == 200
    server.process.send_signal(signal.SIGTERM)
    server.wait_for(lambda: server.get("/health").status_code == 503)
    refused = server.post("/v1/completions", LONG)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert "Retry-After" in refused.headers
    text = response.read().decode()
    connection.close()
    idle.close()
    assert text.rstrip().endswith("data: [DONE]")
    assert '"finish_reason": "length"' in text
    assert server.process.wait(20) == 0
    _, left = psutil.wait_procs(family, timeout=5)
    assert not left


def test_a_drain_does_not_wait_for_ever(start, tools_model):
    server = start(tools_model, *TINY_FLAGS, "--shutdown-timeout", "0.3")
    connection, response = open_stream(server, LONG | {"n": 32})
    server.process.send_signal(signal.SIGTERM)
    text = response.read().decode()
    connection.close()
    assert "shutting down" in text
    assert server.process.wait(20) == 0


def test_limits_and_keys(start, tools_model):
    server = start(
        tools_model, "--backend", "reference", "--num-kv-blocks", "64", "--max-num-seqs", "2",
        "--max-queue", "2", "--api-key", "sésame", "--request-timeout", "1.5",
        "--max-body-bytes", "2000", "--cors-origin", "http://page.example",
    )  # fmt: skip
    key = {"Authorization": "Bearer sésame".encode()}
    # 1 The key guards everything but /health.
    for path in ("/v1/models", "/metrics", "/", "/openapi.json", "/api/tags", "/nothing"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic x"}):
            response = server.get(path, headers=headers)
            assert response.status_code == 401, path
            assert response.headers["WWW-Authenticate"] == "Bearer"
    assert server.get("/health").status_code == 200
    assert server.get("/v1/models", headers=key).status_code == 200
    # 2 Bodies and answers that are too long.
    large = server.post("/v1/completions", LONG | {"prompt": "a" * 3000}, headers=key)
    assert large.status_code == 413
    many = server.post("/v1/completions", LONG | {"n": 5}, headers=key)
    assert (many.status_code, many.json()["error"]["code"]) == (400, "too_many_choices")
    # 3 The queue.
    started = threading.Barrier(5)

    def ask() -> requests.Response:
        started.wait()
        return server.post("/v1/completions", LONG | {"max_tokens": 400, "n": 2}, headers=key)

    with ThreadPoolExecutor(5) as pool:
        answers = [future.result() for future in [pool.submit(ask) for _ in range(5)]]
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses.count(429) == 3, statuses
    full = next(answer for answer in answers if answer.status_code == 429)
    assert full.headers["Retry-After"]
    assert full.json()["error"]["type"] == "rate_limit_error"
    # 4 Pages of a site that was let in.
    origin = {"Origin": "http://page.example"}
    allowed = server.get("/v1/models", headers=key | origin)
    assert allowed.headers["Access-Control-Allow-Origin"] == "http://page.example"
    preflight = requests.options(server.url + "/v1/completions", headers=origin, timeout=10)
    assert preflight.status_code == 204
    assert "Authorization" in preflight.headers["Access-Control-Allow-Headers"]
    assert server.stop() == 0


def test_a_request_that_takes_too_long(start, tools_model):
    server = start(tools_model, *TINY_FLAGS, "--request-timeout", "0.2")
    slow = LONG | {"n": 32}
    response = server.post("/v1/completions", slow)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
    text = server.post("/v1/completions", slow | {"stream": True}).text
    assert '"code": "timeout"' in text
    server.wait_for(server.is_idle)
    assert server.stop() == 0


def test_start_that_fails_says_why(start, tmp_path, tools_model):
    server = start(tools_model, "--backend", "reference", "--kv-cache-memory-bytes", "10",
                   wait=False)  # fmt: skip
    assert server.process.wait(30) == 1
    assert "hold no block" in server.log.read_text()
    server.stop()
