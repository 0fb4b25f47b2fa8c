"""``refengine bench serve``: load a server of OpenAI's API and say what its clients feel."""

from __future__ import annotations

import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import click
from tqdm import tqdm

from refengine.cli.options import IntRange, show_progress
from refengine.errors import RefengineError
from refengine.measure import summarize

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


@dataclass(slots=True)
class Result:
    """One request as its client saw it; times by ``time.perf_counter``, seconds."""

    sent: float
    token_times: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


@click.command("serve")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True,
              help="Of any server with OpenAI's /v1/completions.")  # fmt: skip
@click.option("--model", default=None, help="[default: the first that /v1/models lists]")
@click.option("--api-key", envvar="REFENGINE_API_KEY", default=None)
@click.option("--num-prompts", type=click.IntRange(1), default=100, show_default=True)
@click.option("--request-rate", type=click.FloatRange(0, min_open=True), default=None,
              help="Requests a second, with random (Poisson) arrivals.")  # fmt: skip
@click.option("--concurrency", type=click.IntRange(1), default=None,
              help="Requests in flight; the next is sent when one ends. [default: 16]")  # fmt: skip
@click.option("--input-len", type=IntRange(), default="32:512", show_default=True,
              help="Prompt words, drawn uniformly from MIN:MAX.")  # fmt: skip
@click.option("--output-len", type=IntRange(), default="16:192", show_default=True,
              help="Tokens to generate at most, drawn uniformly from MIN:MAX.")  # fmt: skip
@click.option("--ignore-eos/--no-ignore-eos", default=True, show_default=True,
              help="Sent as ignore_eos, which some servers refuse.")  # fmt: skip
@click.option("--temperature", type=click.FloatRange(0.0), default=0.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def serve_command(
    url: str,
    model: str | None,
    api_key: str | None,
    num_prompts: int,
    request_rate: float | None,
    concurrency: int | None,
    input_len: tuple[int, int],
    output_len: tuple[int, int],
    ignore_eos: bool,
    temperature: float,
    seed: int,
    as_json: bool,
) -> None:
    """Send requests to a server and time their tokens."""
    if request_rate is not None and concurrency is not None:
        raise click.UsageError("--request-rate and --concurrency exclude each other")
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    if model is None:
        model = first_model(url, headers)
    draw = random.Random(seed)
    bodies = []
    for _ in range(num_prompts):
        body = {
            "model": model,
            "prompt": " ".join(draw.choices(WORDS, k=draw.randint(*input_len))),
            "max_tokens": draw.randint(*output_len),
            "temperature": temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        bodies.append(body | {"ignore_eos": True} if ignore_eos else body)
    delays = None
    if request_rate is not None:
        delays = [draw.expovariate(request_rate) for _ in bodies]
    result = run_load(url, headers, bodies, delays, concurrency or 16)
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(
        f"{result['completed']} of {num_prompts} requests, {result['prompt_tokens']:,} prompt and "
        f"{result['output_tokens']:,} output tokens in {result['seconds']:.2f} s"
    )
    click.echo(click.style(f"{result['output_tokens_per_s']:,.1f} output tokens/s", bold=True))
    for name, text in (
        ("ttft_ms", "time to first token"),
        ("itl_ms", "between two tokens"),
        ("e2e_ms", "whole request"),
    ):
        value = result[name]
        click.echo(
            f"{text:<20} mean {value['mean']:.1f} ms, median {value['p50']:.1f}, "
            f"99th percentile {value['p99']:.1f}"
        )
    for message, count in result["errors"].items():
        click.echo(f"{count} x {message}")


def run_load(
    url: str,
    headers: dict[str, str],
    bodies: list[dict[str, Any]],
    delays: list[float] | None,
    concurrency: int,
) -> dict[str, Any]:
    """Send requests and gather the figures that ``--json`` prints (milliseconds).

    Args:
        url: of the server.
        headers: of each request.
        bodies: of the requests.
        delays: seconds before each is sent, after the one before; None keeps ``concurrency`` in
            flight.
        concurrency: where there are no delays.
    """
    results: list[Result] = []
    lock = threading.Lock()
    with tqdm(total=len(bodies), unit="request", disable=not show_progress()) as bar:

        def send(body: dict[str, Any]) -> None:
            result = request_once(url, headers, body)
            with lock:
                results.append(result)
                bar.update()

        began = time.perf_counter()
        workers = len(bodies) if delays is not None else concurrency
        with ThreadPoolExecutor(workers) as pool:
            for number, body in enumerate(bodies):
                if delays is not None:
                    time.sleep(delays[number])
                pool.submit(send, body)
        seconds = time.perf_counter() - began
    good = [result for result in results if result.error is None]
    errors: dict[str, int] = {}
    for result in results:
        if result.error is not None:
            errors[result.error] = errors.get(result.error, 0) + 1
    output_tokens = sum(result.output_tokens for result in good)
    return {
        "num_requests": len(bodies),
        "completed": len(good),
        "errors": errors,
        "prompt_tokens": sum(result.prompt_tokens for result in good),
        "output_tokens": output_tokens,
        "seconds": round(seconds, 4),
        "requests_per_s": round(len(good) / seconds, 3),
        "output_tokens_per_s": round(output_tokens / seconds, 2),
        "ttft_ms": summarize([(r.token_times[0] - r.sent) * 1e3 for r in good if r.token_times]),
        "itl_ms": summarize(
            [(later - earlier) * 1e3 for r in good for earlier, later in pairwise(r.token_times)]
        ),
        "e2e_ms": summarize([(r.ended - r.sent) * 1e3 for r in good]),
    }


def request_once(url: str, headers: dict[str, str], body: dict[str, Any]) -> Result:
    """One streamed request; whatever goes wrong is in the result."""
    result = Result(time.perf_counter())
    connection = _connect(url)
    try:
        path = urlsplit(url).path.rstrip("/").removesuffix("/v1") + "/v1/completions"
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            text = response.read(300).decode("utf-8", "replace")
            result.error = f"status {response.status}: {text}"
            return result
        finished = False
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                result.error = str(event["error"].get("message", event["error"]))
                return result
            for choice in event.get("choices", ()):
                finished = finished or choice.get("finish_reason") is not None
                if choice.get("text"):
                    result.token_times.append(time.perf_counter())
            usage = event.get("usage")
            if usage:
                result.prompt_tokens = usage["prompt_tokens"]
                result.output_tokens = usage["completion_tokens"]
        if not finished:
            result.error = "the stream ended without a finish_reason"
    except (OSError, HTTPException, ValueError) as error:
        result.error = f"{type(error).__name__}: {error}"
    finally:
        result.ended = time.perf_counter()
        connection.close()
    return result


def first_model(url: str, headers: dict[str, str]) -> str:
    """What ``/v1/models`` lists first.

    Raises:
        RefengineError: where the server can't be reached or lists none.
    """
    try:
        connection = _connect(url)
        path = urlsplit(url).path.rstrip("/").removesuffix("/v1") + "/v1/models"
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        text = response.read()
        connection.close()
        return str(json.loads(text)["data"][0]["id"])
    except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
        raise RefengineError(f"no model list at {url}: {error}; is a server there?") from error


def _connect(url: str) -> HTTPConnection:
    parts = urlsplit(url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RefengineError(f"{url!r} is not an address such as http://127.0.0.1:8000")
    return kind(parts.hostname, parts.port, timeout=600)
