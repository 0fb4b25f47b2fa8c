"""``refengine chat``: a conversation in the terminal."""

from __future__ import annotations

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
from refengine.errors import RequestError

HELP_TEXT = (
    "/reset forgets the conversation, /stats tells how fast it went, /exit ends (or Ctrl-D)."
)


@click.command("chat")
@click.option("--system", default=None, help="A system message to begin with.")
@sampling_options(temperature=0.7, top_p=0.95, max_tokens=512)
@engine_options
def command(system: str | None, **flags: Any) -> None:
    """Talk to a model in the terminal; answers stream as they are made.

    Ctrl-C stops an answer, Ctrl-D ends the conversation.
    """
    params = take_sampling_params(flags)
    config = take_engine_config(flags)

    from refengine.llm import LLM

    llm = LLM.from_config(config, progress=show_progress())
    interactive = sys.stdin.isatty()
    if interactive:
        click.echo(click.style(f"{config.model}: {HELP_TEXT}", dim=True))
    start = [{"role": "system", "content": system}] if system else []
    messages: list[dict[str, str]] = list(start)
    stats = "nothing was said yet"
    while True:
        line = _read_line(interactive)
        if line is None or line == "/exit":
            return
        if line == "/reset":
            messages = list(start)
            continue
        if line == "/stats":
            click.echo(click.style(stats, dim=True))
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        try:
            answer, stats = _answer(llm, messages, params)
        except RequestError as error:
            # Usually a conversation that outgrew the model; the terminal stays.
            click.echo(click.style(f"error: {error}", fg="red"), err=True)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


def _read_line(interactive: bool) -> str | None:
    """What the user typed, or None at the end."""
    try:
        line = input("\x01\x1b[1m\x02> \x01\x1b[0m\x02" if interactive else "")
    except EOFError:
        if interactive:
            click.echo()
        return None
    return line.strip()


def _answer(llm: Any, messages: list[dict[str, str]], params: Any) -> tuple[str, str]:
    """Stream one answer; Ctrl-C keeps what came so far."""
    _, token_ids = llm.render_chat(messages)
    text, metrics = "", None
    stream = llm.stream({"prompt_token_ids": token_ids}, params)
    try:
        for output in stream:
            text += output.outputs[0].text
            click.echo(output.outputs[0].text, nl=False)
            sys.stdout.flush()
            metrics = output.metrics
    except KeyboardInterrupt:
        stream.close()
    click.echo()
    return text, _describe_speed(metrics, len(token_ids))


def _describe_speed(metrics: Any, prompt_tokens: int) -> str:
    if metrics is None or len(metrics.token_times) < 2:
        return "too short to tell"
    first, last = metrics.token_times[0], metrics.token_times[-1]
    rate = (len(metrics.token_times) - 1) / max(last - first, 1e-9)
    wait = first - metrics.arrival_time
    return (
        f"{prompt_tokens} prompt tokens, first token after {wait * 1e3:.0f} ms, "
        f"{len(metrics.token_times)} tokens at {rate:.1f} tokens/s"
    )
