"""Many streams over HTTP against the same load through ``LLM.generate``, and what HTTP costs.

    python benchmarks/http_load.py --streams 256 --output-len 200

Starts ``refengine serve``, opens all streams at once, checks that each is whole and equal to what
``LLM.generate`` gives for its prompt (and, for a few, to its answer when asked alone), and prints
one JSON object: throughput of both, their ratio, and processor time of the HTTP process a token.
``--engine-on-thread`` runs the engine inside the HTTP process instead, to compare.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from typing import Any
from urllib.parse import urlsplit

import psutil

WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "it",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=200)
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--num-kv-blocks", type=int, default=4500)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--engine-on-thread", action="store_true")
    parser.add_argument("--serve-on-thread", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--offline", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_on_thread is not None:
        serve_on_thread(options)
        return
    if options.offline:
        print(json.dumps(offline(options)))
        return
    rounds = []
    for _ in range(options.rounds):
        http, texts = over_http(options)
        command = [sys.executable, __file__, "--offline"]
        for name in ("model", "streams", "output-len", "input-len", "num-kv-blocks"):
            command += [f"--{name}", str(getattr(options, name.replace("-", "_")))]
        done = subprocess.run(command, capture_output=True, check=True)
        llm = json.loads(done.stdout)
        assert texts == llm.pop("texts"), "streams differ from LLM.generate"
        rounds.append(
            {"http": http, "llm": llm, "ratio": http["tokens_per_s"] / llm["tokens_per_s"]}
        )
    print(json.dumps(rounds, indent=1))


def prompts(options: argparse.Namespace) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=options.input_len)) for _ in range(options.streams)]


def offline(options: argparse.Namespace) -> dict[str, Any]:
    from refengine import LLM, SamplingParams

    llm = LLM(options.model, num_kv_blocks=options.num_kv_blocks)
    params = SamplingParams(temperature=0, max_tokens=options.output_len, ignore_eos=True)
    llm.generate(prompts(options)[:8], SamplingParams(max_tokens=4))
    began = time.perf_counter()
    outputs = llm.generate(prompts(options), params)
    seconds = time.perf_counter() - began
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    texts = [output.outputs[0].text for output in outputs]
    return {"seconds": seconds, "tokens_per_s": tokens / seconds, "texts": texts}


def over_http(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    if options.engine_on_thread:
        command = [sys.executable, __file__, "--serve-on-thread", "0", "--model", options.model]
    else:
        command = [sys.executable, "-m", "refengine", "serve", "--port", "0", "--model"]
        command += [options.model, "--log-level", "warning"]
    command += ["--num-kv-blocks", str(options.num_kv_blocks)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = re.search(r"at (http://\S+) ", server.stdout.readline())
        assert found
        address = urlsplit(found.group(1))
        where = (str(address.hostname), int(address.port or 0))
        while b" 200 " not in ask(where, "GET", "/health", None)[:20]:
            time.sleep(0.2)
        name = os.path.basename(options.model)
        bodies = [
            {"model": name, "prompt": prompt, "max_tokens": options.output_len, "temperature": 0,
             "ignore_eos": True, "stream": True}
            for prompt in prompts(options)
        ]  # fmt: skip
        for body in bodies[:8]:
            ask(where, "POST", "/v1/completions", body | {"max_tokens": 4})
        process = psutil.Process(server.pid)
        own = psutil.Process()
        before, own_before = process.cpu_times(), own.cpu_times()
        began = time.perf_counter()
        streams = run_streams(where, bodies)
        seconds = time.perf_counter() - began
        after, own_after = process.cpu_times(), own.cpu_times()
        texts = [check(stream) for stream in streams]
        for index in range(0, len(bodies), max(1, len(bodies) // 4)):
            alone = check(ask(where, "POST", "/v1/completions", bodies[index]))
            assert alone == texts[index], "a stream differs from its answer alone"
        tokens = options.streams * options.output_len
        spent = after.user + after.system - before.user - before.system
        client = own_after.user + own_after.system - own_before.user - own_before.system
        figures = {
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
            "http_process_us_per_token": spent / tokens * 1e6,
            "client_us_per_token": client / tokens * 1e6,
        }
        return figures, texts
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
        if server.stdout is not None:
            server.stdout.close()


def request_bytes(method: str, path: str, body: dict[str, Any] | None) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.0\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def ask(where: tuple[str, int], method: str, path: str, body: dict[str, Any] | None) -> bytes:
    with socket.create_connection(where) as client:
        client.sendall(request_bytes(method, path, body))
        parts = []
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


def run_streams(where: tuple[str, int], bodies: list[dict[str, Any]]) -> list[bytes]:
    """All requests at once, read by one thread that costs little beside the server."""
    selector = selectors.DefaultSelector()
    parts: list[list[bytes]] = [[] for _ in bodies]
    for index, body in enumerate(bodies):
        client = socket.create_connection(where)
        client.sendall(request_bytes("POST", "/v1/completions", body))
        client.setblocking(False)
        selector.register(client, selectors.EVENT_READ, index)
    left = len(bodies)
    while left:
        events = selector.select(120)
        assert events, f"{left} streams hang"
        for key, _ in events:
            client = key.fileobj  # type: ignore[assignment]
            part = client.recv(65536)
            if part:
                parts[key.data].append(part)
            else:
                selector.unregister(client)
                client.close()
                left -= 1
    return [b"".join(stream) for stream in parts]


def check(stream: bytes) -> str:
    """A stream's text; it must be whole, of one answer, and end once."""
    head, _, data = stream.partition(b"\r\n\r\n")
    assert b" 200 " in head[:20], stream[:300]
    assert data.endswith(b"data: [DONE]\n\n"), data[-200:]
    events = [json.loads(line[6:]) for line in data.split(b"\n\n") if line.startswith(b"data: {")]
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons == [None] * (len(events) - 1) + ["length"]
    assert len({event["id"] for event in events}) == 1
    return "".join(event["choices"][0]["text"] for event in events)


def serve_on_thread(options: argparse.Namespace) -> None:
    """The same server with the engine on a thread of the HTTP process."""
    from refengine.config import EngineConfig
    from refengine.server.context import ServerConfig
    from refengine.server.engine_process import engine_main
    from refengine.server.run import serve

    class ThreadSource:
        def start(self) -> Any:
            ours, theirs = Pipe()
            signal.signal = lambda *_: None  # type: ignore[assignment]  # not from a thread
            arguments = (theirs, config, False)
            threading.Thread(target=engine_main, args=arguments, daemon=True).start()
            return ours

        def end(self, timeout: float) -> None:
            pass

    config = EngineConfig(model=options.model, num_kv_blocks=options.num_kv_blocks)

    def announce(url: str) -> None:
        print(f"serving at {url} ", flush=True)

    server_config = ServerConfig(port=0, served_model_name=os.path.basename(options.model))
    handler = signal.signal
    signal.signal = lambda number, action: (  # type: ignore[assignment]
        handler(number, lambda *_: os._exit(0)) if number == signal.SIGTERM else None
    )
    serve(config, server_config, announce=announce, source=ThreadSource())


if __name__ == "__main__":
    main()
