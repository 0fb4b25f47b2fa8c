"""Compare refengine with what a user would pick instead, on this machine, in one run.

    python benchmarks/peers.py --llama-server PATH/llama-server --llama-model smollm2-bf16.gguf

Every engine gets the same weights, dtype, threads and requests: all sent at once, greedy, end of
sequence ignored. Each runs in a process of its own, one after the other, for several rounds; the
table gives medians and the ratio to refengine within each round.

transformers needs ``pip install 'refengine[peers]'``. llama.cpp's server is built from its source,
which the source package of llama-cpp-python carries (``cmake -DGGML_NATIVE=ON``); its
``llama-quantize --allow-requantize IN.gguf OUT.gguf BF16`` makes the bf16 file.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refengine.workload import WorkItem, draw_workload, read_workload, write_workload

VOCAB_SIZE = 49_152  # of the default model; drawn ids stay below it
SINGLE = (128, 128)  # one stream: prompt and output tokens


def run_refengine(workload: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Through ``refengine bench throughput``."""
    command = [
        *(sys.executable, "-m", "refengine", "bench", "throughput", "--json"),
        *("--model", options.model, "--workload", str(workload), "--dtype", options.dtype),
        *("--threads", str(options.threads), "--max-model-len", "2048"),
    ]
    return _json_of(command)


def run_transformers(workload: Path, options: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Through ``generate``, in a process of its own."""
    command = [
        *(sys.executable, __file__, "--child", "transformers", "--hf-model", options.hf_model),
        *("--workload", str(workload), "--dtype", options.dtype, "--batch", str(batch)),
        *("--threads", str(options.threads)),
    ]
    return _json_of(command)


def _json_of(command: list[str]) -> dict[str, Any]:
    """Run a command that prints one JSON object; what it complains of is shown."""
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def child_transformers(options: argparse.Namespace) -> None:
    """Generate the workload one request at a time, or in static batches of equal width."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(
        options.hf_model, dtype=getattr(torch, options.dtype)
    ).eval()
    items = read_workload(options.workload)

    def generate(batch: list[WorkItem]) -> None:
        width = max(len(item.prompt_token_ids) for item in batch)
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, item in enumerate(batch):  # padded on the left, as decoding wants
            ids[row, width - len(item.prompt_token_ids) :] = torch.tensor(item.prompt_token_ids)
            mask[row, width - len(item.prompt_token_ids) :] = 1
        length = max(item.output_len for item in batch)
        model.generate(
            ids, attention_mask=mask, do_sample=False, min_new_tokens=length,
            max_new_tokens=length, pad_token_id=0,
        )  # fmt: skip

    with torch.inference_mode():
        generate([WorkItem(tuple(range(100, 132)), 4)])  # warm up
        began = time.perf_counter()
        for start in range(0, len(items), options.batch):
            generate(items[start : start + options.batch])
        seconds = time.perf_counter() - began
    tokens = sum(item.output_len for item in items)  # what a batch computes beyond is waste
    print(json.dumps({"seconds": seconds, "output_tokens_per_s": tokens / seconds}))


def run_llama(workload: Path, options: argparse.Namespace, slots: int) -> dict[str, Any]:
    """Through llama.cpp's server, with a client thread a request."""
    items = read_workload(workload)
    longest = max(len(item.prompt_token_ids) + item.output_len for item in items)
    context = slots * (longest + 8)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(options.llama_server, "-m", options.llama_model, "--host", "127.0.0.1"),
        *("--port", str(port), "-t", str(options.threads), "-tb", str(options.threads)),
        *("-np", str(slots), "-c", str(context), "--no-webui"),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_healthy(port, server)
        _complete(port, WorkItem(tuple(range(100, 132)), 8), [])  # warm up
        times: list[list[float]] = [[] for _ in items]
        threads = [
            threading.Thread(target=_complete, args=(port, item, own))
            for item, own in zip(items, times, strict=True)
        ]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - began
    finally:
        server.terminate()
        server.wait(timeout=30)
    tokens = sum(item.output_len for item in items)
    return {
        "seconds": seconds,
        "output_tokens_per_s": tokens / seconds,
        "ttft_ms": {"mean": 1e3 * statistics.mean(own[0] - began for own in times)},
        "decode_tokens_per_s": (items[0].output_len - 1) / (times[0][-1] - times[0][0]),
    }


def _wait_until_healthy(port: int, server: subprocess.Popen[bytes], limit: float = 120.0) -> None:
    until = time.monotonic() + limit
    while time.monotonic() < until and server.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.2)
    raise RuntimeError("llama-server did not become healthy")


def _complete(port: int, item: WorkItem, times: list[float]) -> None:
    """One streamed completion; notes when text came, and checks how much."""
    body = {
        "prompt": list(item.prompt_token_ids),
        "n_predict": item.output_len,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request(
            "POST", "/completion", json.dumps(body), {"Content-Type": "application/json"}
        )
        predicted = 0
        for line in connection.getresponse():
            if line.startswith(b"data: "):
                times.append(time.perf_counter())
                predicted = json.loads(line[6:]).get("tokens_predicted", predicted)
        if predicted != item.output_len:
            raise RuntimeError(f"llama-server gave {predicted} tokens, wanted {item.output_len}")
    finally:
        connection.close()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All engines in turn, ``--rounds`` times."""
    with tempfile.TemporaryDirectory() as scratch:
        load = Path(scratch, "workload.json")
        single = Path(scratch, "single.json")
        items = (
            read_workload(options.workload)
            if options.workload
            else draw_workload(32, (32, 512), (16, 192), VOCAB_SIZE, options.seed)
        )
        write_workload(items, load)
        write_workload(draw_workload(1, (SINGLE[0],) * 2, (SINGLE[1],) * 2, VOCAB_SIZE, 1), single)
        if options.hf_model is None and not options.skip_transformers:
            options.hf_model = str(Path(scratch, "hf"))
            convert = [
                sys.executable,
                "-m",
                "refengine",
                "convert",
                options.model,
                options.hf_model,
            ]
            subprocess.run([*convert, "--dtype", options.dtype], check=True, capture_output=True)
        runs = _runs(options, load, single)
        results: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(options.rounds):
            for name, run in runs.items():
                results[name].append(run())
                _say(f"round {number + 1}: {name}: {results[name][-1]:.1f} tokens/s")
    return {
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": options.threads,
        "dtype": options.dtype,
        "requests": len(items),
        "prompt_tokens": sum(len(item.prompt_token_ids) for item in items),
        "output_tokens": sum(item.output_len for item in items),
        "output_tokens_per_s": results,
    }


def _runs(options: argparse.Namespace, load: Path, single: Path) -> dict[str, Callable[[], float]]:
    """What to run, by name; each gives tokens/s."""
    runs: dict[str, Callable[[], float]] = {
        "refengine": lambda: run_refengine(load, options)["output_tokens_per_s"],
        "refengine, one stream": lambda: 1e3 / run_refengine(single, options)["itl_ms"]["p50"],
    }
    if not options.skip_transformers:
        runs["transformers, one at a time"] = lambda: run_transformers(load, options, 1)[
            "output_tokens_per_s"
        ]
        runs["transformers, batches of 8"] = lambda: run_transformers(load, options, 8)[
            "output_tokens_per_s"
        ]
        runs["transformers, one stream"] = lambda: run_transformers(single, options, 1)[
            "output_tokens_per_s"
        ]
    if options.llama_server:
        for slots in options.llama_slots:
            runs[f"llama.cpp, {slots} slots"] = lambda slots=slots: run_llama(load, options, slots)[
                "output_tokens_per_s"
            ]
        runs["llama.cpp, one stream"] = lambda: run_llama(single, options, 1)["decode_tokens_per_s"]
    return runs


def report(result: dict[str, Any]) -> str:
    """A table: median, spread, and refengine's ratio to each peer, paired by round."""
    rates = result["output_tokens_per_s"]
    lines = [
        f"{result['requests']} requests, {result['prompt_tokens']:,} prompt and "
        f"{result['output_tokens']:,} output tokens, {result['dtype']}, "
        f"{result['threads']} threads",
        f"{'engine':<30} {'tokens/s':>9} {'min':>8} {'max':>8} {'refengine is':>13}",
    ]
    for name, values in rates.items():
        own = "refengine, one stream" if name.endswith("one stream") else "refengine"
        pairs = zip(rates[own], values, strict=True)
        ratio = statistics.median(mine / theirs for mine, theirs in pairs)
        lines.append(
            f"{name:<30} {statistics.median(values):>9.1f} {min(values):>8.1f} "
            f"{max(values):>8.1f} {ratio:>11.2f} x"
        )
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="what refengine loads")
    parser.add_argument(
        "--hf-model", help="the same as a directory; made by refengine if not given"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workload", help="a file as `refengine bench throughput` reads it")
    parser.add_argument("--skip-transformers", action="store_true")
    parser.add_argument("--llama-server", help="llama.cpp's server binary")
    parser.add_argument("--llama-model", help="the GGUF file it serves")
    parser.add_argument("--llama-slots", type=int, nargs="+", default=[16])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", choices=("transformers",), help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child_transformers(options)
        return
    if options.llama_server and not options.llama_model:
        parser.error("--llama-server needs --llama-model")
    result = measure(options)
    print(json.dumps(result) if options.json else report(result))


if __name__ == "__main__":
    main()
