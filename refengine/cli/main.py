"""The ``refengine`` command: its subcommands, and how errors look."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import click

from refengine._version import __version__
from refengine.errors import RefengineError

# Subcommand: (module, one line for the overview). Modules load when their command runs, so that
# `refengine --help` answers at once.
COMMANDS = {
    "generate": ("refengine.cli.generate", "Generate text from one or many prompts."),
    "chat": ("refengine.cli.chat", "Talk to a model in the terminal."),
    "serve": ("refengine.cli.serve", "Serve a model over HTTP: OpenAI's and Ollama's APIs."),
    "info": ("refengine.cli.info", "Say what a model is and what fits in this machine."),
    "bench": ("refengine.cli.bench", "Measure throughput and latency."),
    "check": ("refengine.cli.check", "Check a kernel, yours or ours, against float64."),
    "convert": ("refengine.cli.convert", "Turn a GGUF file into a Hugging Face directory."),
}

EPILOG = """
\b
Try:
  refengine generate "The capital of France is" --max-tokens 8
  refengine chat
  refengine serve
  refengine info smollm2
"""


class LazyGroup(click.Group):
    """A group whose subcommands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order of ``COMMANDS``."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import one subcommand."""
        if name not in COMMANDS:
            return None
        module, _ = COMMANDS[name]
        command: click.Command = import_module(module).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The overview, without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="refengine")
def cli() -> None:
    """An LLM inference engine that one person can read whole."""


def main() -> None:
    """Run the command line; a user's mistake is one line on standard error, never a traceback."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit status."""
    try:
        status = cli.main(arguments, prog_name="refengine", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        command = (
            error.ctx.command_path
            if isinstance(error, click.UsageError) and error.ctx
            else "refengine"
        )
        _complain(error.format_message(), f" (see {command} --help)")
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except RefengineError as error:
        _complain(str(error))
        return 1
    except BrokenPipeError:
        # The reader went away (`| head`). Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    # ctx.exit(status) arrives here as a plain number.
    return status if isinstance(status, int) else 0


def _complain(message: str, hint: str = "") -> None:
    """One line on standard error, coloured on a terminal."""
    line = " ".join(message.split()) + hint
    click.echo(click.style("error: ", fg="red", bold=True) + line, err=True)
