"""Flags that commands share, made from the fields of EngineConfig and SamplingParams."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from refengine.config import BACKENDS, DTYPES, LOAD_FORMATS, EngineConfig
from refengine.sampling_params import SamplingParams
from refengine.scheduling.policies import POLICIES, load_policy

Command = TypeVar("Command", bound=Callable[..., Any])

ENGINE_FIELDS = tuple(EngineConfig.__dataclass_fields__)
SAMPLING_FIELDS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos",
    "logit_bias", "bad_words", "logprobs", "prompt_logprobs", "skip_special_tokens",
    "include_stop_str_in_output",
)  # fmt: skip


BYTE_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "kib": 2**10, "mib": 2**20,
              "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}  # fmt: skip


class Bytes(click.ParamType[int]):
    """A number of bytes: 1073741824, 512MiB, 4GiB, 2GB."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse the text."""
        if isinstance(value, int):
            return value
        digits = value.strip().rstrip("BbKkMmGgIi")
        unit = value.strip()[len(digits) :].lower()
        try:
            return int(float(digits) * BYTE_UNITS[unit])
        except (KeyError, ValueError, OverflowError):
            self.fail(f"{value!r} is not a number of bytes such as 512MiB or 4GiB", param, ctx)


class IntRange(click.ParamType[tuple[int, int]]):
    """``MIN:MAX`` or one number."""

    name = "min:max"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Parse the text."""
        if isinstance(value, tuple):
            return value
        parts = value.split(":")
        try:
            low, high = int(parts[0]), int(parts[-1])
        except ValueError:
            low, high = 1, 0
        if len(parts) > 2 or not 1 <= low <= high:
            self.fail(f"{value!r} is not MIN:MAX with 1 <= MIN <= MAX", param, ctx)
        return low, high


def engine_options(command: Command) -> Command:
    """Add the flags of EngineConfig, named as vLLM names them."""
    defaults = EngineConfig()
    options = [
        click.option(
            "--model",
            default=defaults.model,
            show_default=True,
            help='A directory, a GGUF file, a hub id, or "smollm2" (fetched on first use).',
        ),
        click.option(
            "--tokenizer",
            default=None,
            help="A directory or tokenizer.json to use instead of the model's own.",
        ),
        click.option(
            "--backend",
            type=click.Choice(BACKENDS),
            default=defaults.backend,
            show_default=True,
            help="reference: NumPy; cpu: Numba; cuda: Numba-CUDA; auto: the fastest here.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            default=defaults.dtype,
            show_default=True,
            help="Of weights and KV cache; auto: as stored (reference: float32).",
        ),
        click.option(
            "--load-format",
            type=click.Choice(LOAD_FORMATS),
            default=defaults.load_format,
            show_default=True,
            help="dummy: random weights of the model's shape, for benchmarks.",
        ),
        click.option(
            "--block-size",
            type=click.IntRange(1),
            default=defaults.block_size,
            show_default=True,
            help="Tokens in a block of the KV cache.",
        ),
        click.option(
            "--max-model-len",
            type=click.IntRange(1),
            default=None,
            help="Tokens that a request may have, prompt and answer. [default: the model's]",
        ),
        click.option(
            "--max-num-seqs",
            type=click.IntRange(1),
            default=defaults.max_num_seqs,
            show_default=True,
            help="Requests in one step.",
        ),
        click.option(
            "--max-num-batched-tokens",
            type=click.IntRange(1),
            default=None,
            help="Tokens in one step, over all requests. [default: 512, on CUDA 8192]",
        ),
        click.option(
            "--enable-chunked-prefill/--no-enable-chunked-prefill",
            default=defaults.enable_chunked_prefill,
            show_default=True,
            help="Let a long prompt be computed over several steps.",
        ),
        click.option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            default=defaults.enable_prefix_caching,
            show_default=True,
            help="Share the KV cache of equal prompt beginnings.",
        ),
        click.option(
            "--scheduling-policy",
            default=defaults.scheduling_policy,
            show_default=True,
            help=f'Who goes first: {", ".join(POLICIES)}, or "module:Class".',
        ),
        click.option(
            "--num-kv-blocks", type=click.IntRange(1), default=None, help="Blocks in the KV cache."
        ),
        click.option(
            "--kv-cache-memory-bytes",
            type=Bytes(),
            default=None,
            help="Memory for the KV cache, such as 512MiB. [default: a quarter of what is free]",
        ),
        click.option(
            "--gpu-memory-utilization",
            type=float,
            default=defaults.gpu_memory_utilization,
            show_default=True,
            help="Share of a GPU's memory for weights and cache.",
        ),
        click.option(
            "--seed",
            type=int,
            default=defaults.seed,
            show_default=True,
            help="Where requests without a seed of their own draw one.",
        ),
        click.option(
            "--threads", type=click.IntRange(1), default=None, help="CPU threads. [default: all]"
        ),
        click.option(
            "--enforce-eager",
            is_flag=True,
            help="Run the readable decoder, one kernel at a time, instead of its compiled form.",
        ),
    ]
    return _apply(options, command)


def sampling_options(**defaults: Any) -> Callable[[Command], Command]:
    """Add the flags of SamplingParams; keywords override its defaults."""
    base = SamplingParams()

    def default(name: str) -> Any:
        return defaults.get(name, getattr(base, name))

    options = [
        click.option(
            "--temperature",
            type=float,
            default=default("temperature"),
            show_default=True,
            help="0 is greedy.",
        ),
        click.option(
            "--top-k",
            type=int,
            default=default("top_k"),
            show_default=True,
            help="Keep the k likeliest tokens; 0 keeps all.",
        ),
        click.option(
            "--top-p",
            type=float,
            default=default("top_p"),
            show_default=True,
            help="Keep the likeliest tokens up to this probability.",
        ),
        click.option(
            "--min-p",
            type=float,
            default=default("min_p"),
            show_default=True,
            help="Drop tokens below this share of the likeliest.",
        ),
        click.option(
            "--repetition-penalty",
            type=float,
            default=default("repetition_penalty"),
            show_default=True,
            help="Above 1 discourages tokens seen in prompt or answer.",
        ),
        click.option(
            "--presence-penalty",
            type=float,
            default=default("presence_penalty"),
            show_default=True,
            help="Subtracted from tokens seen in the answer.",
        ),
        click.option(
            "--frequency-penalty",
            type=float,
            default=default("frequency_penalty"),
            show_default=True,
            help="The same, once an occurrence.",
        ),
        click.option(
            "--max-tokens",
            type=int,
            default=default("max_tokens"),
            show_default=True,
            help="Tokens to generate at most.",
        ),
        click.option(
            "--min-tokens",
            type=int,
            default=0,
            show_default=True,
            help="Tokens before the answer may end.",
        ),
        click.option("--stop", multiple=True, help="A text that ends the answer; may be repeated."),
        click.option(
            "--stop-token-ids",
            type=int,
            multiple=True,
            help="A token id that ends the answer; may be repeated.",
        ),
        click.option(
            "--ignore-eos", is_flag=True, help="Keep generating past the end-of-sequence token."
        ),
        click.option(
            "--logit-bias",
            default=None,
            help="JSON, such as '{\"42\": -100}': added to the logits of these token ids.",
        ),
        click.option(
            "--bad-words", multiple=True, help="A text that must not appear; may be repeated."
        ),
        click.option(
            "--logprobs",
            type=int,
            default=None,
            help="Report this many likeliest tokens at each position.",
        ),
        click.option("--prompt-logprobs", type=int, default=None, help="The same for the prompt."),
        click.option(
            "--sampling-seed",
            type=int,
            default=None,
            help="A seed that makes the answer repeatable.",
        ),
        click.option(
            "--skip-special-tokens/--no-skip-special-tokens",
            default=True,
            help="Leave special tokens out of the text.",
        ),
        click.option(
            "--include-stop-str-in-output", is_flag=True, help="Keep the stop text in the answer."
        ),
    ]

    def decorate(command: Command) -> Command:
        return _apply(options, command)

    return decorate


def take_engine_config(values: dict[str, Any]) -> EngineConfig:
    """Move the engine's flags out of a command's keywords into an EngineConfig."""
    with user_errors():
        load_policy(values["scheduling_policy"])
        return EngineConfig(**{name: values.pop(name) for name in ENGINE_FIELDS})


def take_sampling_params(values: dict[str, Any]) -> SamplingParams:
    """Move the sampling flags out of a command's keywords into SamplingParams."""
    chosen = {name: values.pop(name) for name in SAMPLING_FIELDS}
    chosen["seed"] = values.pop("sampling_seed")
    with user_errors():
        if chosen["logit_bias"] is not None:
            chosen["logit_bias"] = _parse_logit_bias(chosen["logit_bias"])
        return SamplingParams(**chosen)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a ValueError about the user's values into a usage error."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def show_progress() -> bool:
    """Whether someone is watching standard error."""
    return sys.stderr.isatty()


def _parse_logit_bias(text: str) -> dict[int, float]:
    """JSON object of token id to bias."""
    try:
        values = json.loads(text)
        return {int(token): float(bias) for token, bias in values.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f'logit_bias must be a JSON object such as {{"42": -100}}, got {text!r}'
        ) from error


def _apply(options: list[Callable[[Any], Any]], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command
