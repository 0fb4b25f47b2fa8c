"""``refengine generate``: text from one or many prompts."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from refengine.cli.options import (
    engine_options,
    sampling_options,
    show_progress,
    take_engine_config,
    take_sampling_params,
)
from refengine.request import RequestOutput
from refengine.sampling_params import SamplingParams

EPILOG = """
\b
Examples:
  refengine generate "The capital of France is" --max-tokens 8
  refengine generate --chat "Write a haiku about rivers." --temperature 0.7 --sampling-seed 1
  refengine generate --prompts-file prompts.txt --json > answers.jsonl
"""


@click.command("generate", epilog=EPILOG)
@click.argument("prompts", nargs=-1)
@click.option(
    "--prompts-file",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="A prompt a line; in a .jsonl file a JSON text or object "
    '({"prompt": ...} or {"prompt_token_ids": [...]}) a line; - reads standard input.',
)
@click.option("--chat", "as_chat", is_flag=True, help="Take each prompt as a message to answer.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a prompt.")
@sampling_options(temperature=0.0, max_tokens=128)
@engine_options
def command(
    prompts: tuple[str, ...],
    prompts_file: str | None,
    as_chat: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Generate text from one or many PROMPTS, all of them in one batch."""
    wanted: list[Any] = [*prompts, *(_read_prompts(prompts_file) if prompts_file else ())]
    if not wanted:
        raise click.UsageError("give at least one prompt, or --prompts-file")
    params = take_sampling_params(flags)
    config = take_engine_config(flags)

    from refengine.llm import LLM

    llm = LLM.from_config(config, progress=show_progress())
    # One answer for a person is worth watching as it comes.
    if len(wanted) == 1 and not as_json and not as_chat:
        _stream(llm, wanted[0], params)
        return
    use_tqdm = show_progress()
    if as_chat:
        conversations = [[{"role": "user", "content": _text(prompt)}] for prompt in wanted]
        outputs = llm.chat(conversations, params, use_tqdm=use_tqdm)
    else:
        outputs = llm.generate(wanted, params, use_tqdm=use_tqdm)
    for output in outputs:
        if as_json:
            click.echo(json.dumps(describe(output), ensure_ascii=False))
        else:
            shown = "" if as_chat else (output.prompt or "")
            click.echo(click.style(shown, bold=True) + output.outputs[0].text + "\n")


def describe(output: RequestOutput) -> dict[str, Any]:
    """An output as ``--json`` prints it."""
    answer = output.outputs[0]
    result: dict[str, Any] = {
        "prompt": output.prompt,
        "prompt_token_ids": list(output.prompt_token_ids),
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }
    if answer.logprobs is not None:
        result["logprobs"] = [_describe_logprobs(entry) for entry in answer.logprobs]
    if output.prompt_logprobs is not None:
        result["prompt_logprobs"] = [
            None if entry is None else _describe_logprobs(entry) for entry in output.prompt_logprobs
        ]
    return result


def _describe_logprobs(entry: Any) -> dict[str, Any]:
    return {
        str(token): {"logprob": value.logprob, "rank": value.rank} for token, value in entry.items()
    }


def _stream(llm: Any, prompt: Any, params: SamplingParams) -> None:
    """Print one answer as it comes."""
    pieces = llm.stream(prompt, params)
    if isinstance(prompt, str):
        click.echo(click.style(prompt, bold=True), nl=False)
    for output in pieces:
        click.echo(output.outputs[0].text, nl=False)
        sys.stdout.flush()
    click.echo()


def _text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, dict) and isinstance(prompt.get("prompt"), str):
        return str(prompt["prompt"])
    raise click.UsageError("--chat takes prompts that are texts, not token ids")


def _read_prompts(name: str) -> list[Any]:
    """The prompts of a file."""
    try:
        with click.open_file(name, "rb") as file:
            text = file.read().decode("utf-8")
    except OSError as error:
        raise click.UsageError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise click.UsageError(
            f"{name} is not UTF-8: byte {error.object[error.start]:#04x} at position "
            f"{error.start}; save it as UTF-8"
        ) from error
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise click.UsageError(f"{name} holds no prompt")
    if not name.endswith(".jsonl"):
        return lines
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise click.UsageError(f"{name} holds a line that is not JSON: {error}") from error
