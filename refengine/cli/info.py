"""``refengine info``: what a model is, and what fits in this machine."""

from __future__ import annotations

import json
from typing import Any

import click

from refengine.config import DTYPES, ModelConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@click.command("info")
@click.argument("model", default="smollm2")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    show_default=True,
    help="Of weights and cache, for the sizes.",
)
@click.option("--block-size", type=click.IntRange(1), default=16, show_default=True)
@click.option(
    "--max-model-len",
    type=click.IntRange(1),
    default=None,
    help="Tokens of a full-length request. [default: the model's]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str, dtype: str, block_size: int, max_model_len: int | None, as_json: bool
) -> None:
    """Say what MODEL is and what fits in this machine. Reads no weights."""
    from refengine.cli.options import show_progress
    from refengine.models.default_model import resolve_model
    from refengine.models.model_config import load_model_config

    path = resolve_model(model, progress=show_progress())
    config = load_model_config(path)
    facts = describe_model(config, dtype, block_size, max_model_len)
    facts = {"model": model, "path": str(path), **facts}
    if as_json:
        click.echo(json.dumps(facts))
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        click.echo(click.style(f"{name:<{width}}", bold=True) + f"  {_readable(name, value)}")


def describe_model(
    config: ModelConfig, dtype: str, block_size: int, max_model_len: int | None
) -> dict[str, Any]:
    """Shapes, sizes and what fits, as ``--json`` prints them (bytes are plain integers)."""
    from refengine.memory import available_memory_bytes

    dtype = config.dtype if dtype == "auto" else dtype
    size = DTYPE_BYTES[dtype]
    length = min(max_model_len or config.max_position_embeddings, config.max_position_embeddings)
    weights = config.num_parameters * size
    token = config.kv_bytes_per_token(size)
    request = -(-length // block_size) * block_size * token
    free = available_memory_bytes()
    left = max(free - weights, 0)
    return {
        "architecture": config.architecture,
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "num_parameters": config.num_parameters,
        "dtype": dtype,
        "weight_bytes": weights,
        "kv_bytes_per_token": token,
        "max_model_len": length,
        "kv_bytes_per_full_request": request,
        "available_memory_bytes": free,
        "fits": weights <= free,
        "kv_tokens_that_fit": left // token,
        "full_requests_that_fit": left // request,
    }


def _readable(name: str, value: Any) -> str:
    """A fact for a person."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int):
        return str(value)
    if "bytes" not in name:
        return f"{value:,}"
    amount, unit = float(value), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:,.1f} {unit}" if unit != "B" else f"{value} B"
