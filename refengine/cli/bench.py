"""``refengine bench``: throughput and latency of this engine on this machine."""

from __future__ import annotations

import json
from typing import Any

import click

from refengine.cli.bench_serve import serve_command
from refengine.cli.options import IntRange, engine_options, show_progress, take_engine_config


@click.group("bench")
def command() -> None:
    """Measure throughput and latency."""


command.add_command(serve_command)


@command.command("throughput")
@click.option("--workload", type=click.Path(dir_okay=False), default=None,
              help='A JSON list of {"prompt_token_ids": [...], "output_len": n}.')  # fmt: skip
@click.option("--num-prompts", type=click.IntRange(1), default=32, show_default=True)
@click.option("--input-len", type=IntRange(), default="32:512", show_default=True,
              help="Prompt tokens, drawn uniformly from MIN:MAX.")  # fmt: skip
@click.option("--output-len", type=IntRange(), default="16:192", show_default=True,
              help="Tokens to generate, drawn uniformly from MIN:MAX.")  # fmt: skip
@click.option("--temperature", type=click.FloatRange(0.0), default=0.0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@engine_options
def throughput(
    workload: str | None,
    num_prompts: int,
    input_len: tuple[int, int],
    output_len: tuple[int, int],
    temperature: float,
    as_json: bool,
    **flags: Any,
) -> None:
    """Send all requests at once; the end of sequence is ignored."""
    config = take_engine_config(flags)

    from refengine.factory import build_engine
    from refengine.measure import run_workload
    from refengine.workload import draw_workload, read_workload

    items = read_workload(workload) if workload else None
    loaded = build_engine(config, progress=show_progress())
    if items is None:
        vocab_size = loaded.model_config.vocab_size
        items = draw_workload(num_prompts, input_len, output_len, vocab_size, config.seed)
    _warm_up(loaded.engine, loaded.model_config.vocab_size)
    result = run_workload(loaded.engine, items, temperature=temperature, progress=show_progress())
    _report(result, as_json)


@command.command("latency")
@click.option(
    "--input-len", type=click.IntRange(1), default=32, show_default=True, help="Prompt tokens."
)
@click.option(
    "--output-len",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Tokens to generate.",
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Requests at once."
)
@click.option(
    "--num-iters",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Runs; the median one is printed.",
)
@click.option("--temperature", type=click.FloatRange(0.0), default=0.0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@engine_options
def latency(
    input_len: int,
    output_len: int,
    batch_size: int,
    num_iters: int,
    temperature: float,
    as_json: bool,
    **flags: Any,
) -> None:
    """Time one batch of equal requests, several times over."""
    config = take_engine_config(flags)

    from refengine.factory import build_engine
    from refengine.measure import run_workload
    from refengine.workload import draw_workload

    loaded = build_engine(config, progress=show_progress())
    vocab_size = loaded.model_config.vocab_size
    _warm_up(loaded.engine, vocab_size)
    results = []
    for number in range(num_iters):
        # Other prompts each time, so that no run finds the last one's prefix in the cache.
        items = draw_workload(
            batch_size, (input_len,) * 2, (output_len,) * 2, vocab_size, config.seed + number
        )
        results.append(run_workload(loaded.engine, items, temperature=temperature))
    results.sort(key=lambda result: result["seconds"])
    spread = [results[0]["seconds"], results[-1]["seconds"]]
    _report(results[len(results) // 2] | {"seconds_min_max": spread}, as_json)


def _warm_up(engine: Any, vocab_size: int) -> None:
    """Let caches fill and clocks rise before anything is timed."""
    from refengine.measure import run_workload
    from refengine.workload import draw_workload

    run_workload(engine, draw_workload(4, (8, 64), (8, 8), vocab_size, seed=-1))


def _report(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result))
        return
    tokens = f"{result['prompt_tokens']:,} prompt and {result['output_tokens']:,} output tokens"
    click.echo(f"{result['num_requests']} requests, {tokens} in {result['seconds']:.2f} s")
    rate = f"{result['output_tokens_per_s']:,.1f} output tokens/s"
    click.echo(click.style(rate, bold=True))
    for name, text in (("ttft_ms", "time to first token"), ("itl_ms", "between two tokens")):
        value = result[name]
        click.echo(
            f"{text:<20} mean {value['mean']:.1f} ms, median {value['p50']:.1f}, "
            f"99th percentile {value['p99']:.1f}"
        )
    parts = ", ".join(f"{name} {value:.2f} s" for name, value in result["seconds_by_part"].items())
    click.echo(f"{result['steps']} steps: {parts}")
