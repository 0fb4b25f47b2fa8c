"""A real server process on loopback, with a tiny model that knows tools."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

TOOL_TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|user|><tool_call>{{ tools[0].function.name }}\n"
    "{% endif %}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Server:
    """A running ``refengine serve``."""

    def __init__(self, model: str, *flags: str, log: Path, wait: bool = True) -> None:
        self.log = log
        command = [sys.executable, "-m", "refengine", "serve", "--model", model, "--port", "0"]
        self._file = log.open("wb")
        self.process = subprocess.Popen(
            [*command, *flags],
            stdout=subprocess.PIPE,
            stderr=self._file,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        found = re.search(r"at (http://\S+) ", line)
        assert found, f"no address in {line!r}: {log.read_text()}"
        self.url = found.group(1)
        if wait:
            self.wait_for(lambda: self.get("/health").status_code == 200, 120)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the server ended: {self.log.read_text()}"
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.02)

    def get(self, path: str, **keywords: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=60, **keywords)

    def post(self, path: str, body: Any = None, **keywords: Any) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=60, **keywords)

    def metric(self, name: str) -> float:
        text = self.get("/metrics").text
        found = re.search(rf"^refengine:{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
        assert found, name
        return float(found.group(1))

    def is_idle(self) -> bool:
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return all(self.metric(name) == 0 for name in names)

    def engine_pid(self) -> int:
        ready = [line for line in self.log.read_text().splitlines() if "engine ready" in line]
        return int(json.loads(ready[-1])["pid"])

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(40)
        finally:
            self.process.kill()
            self.process.wait()
            if self.process.stdout is not None:
                self.process.stdout.close()
            self._file.close()


@pytest.fixture(scope="session")
def tools_model(tiny_model: Callable[[str], Path], tmp_path_factory: Any) -> Path:
    """A tiny model whose chat template has tools."""
    directory: Path = tmp_path_factory.mktemp("tools") / "tiny"
    shutil.copytree(tiny_model("llama_biases"), directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = TOOL_TEMPLATE
    path.write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def start(tmp_path_factory: Any) -> Iterator[Callable[..., Server]]:
    """Starts servers; all are ended with the session."""
    servers: list[Server] = []
    logs = tmp_path_factory.mktemp("logs")

    def starter(model: Path | str, *flags: str, wait: bool = True) -> Server:
        server = Server(str(model), *flags, log=logs / f"{len(servers)}.log", wait=wait)
        servers.append(server)
        return server

    yield starter
    for server in servers:
        server.stop()


TINY_FLAGS = ("--backend", "reference", "--num-kv-blocks", "256", "--max-num-seqs", "64")


@pytest.fixture(scope="session")
def tiny(start: Callable[..., Server], tools_model: Path) -> Server:
    """A server with the tiny model, for everyone."""
    return start(tools_model, *TINY_FLAGS)


@pytest.fixture(scope="session")
def real(start: Callable[..., Server]) -> Server:
    """A server with the default model; mark such tests ``model``."""
    return start("smollm2", "--num-kv-blocks", "1024", "--max-num-seqs", "64")
