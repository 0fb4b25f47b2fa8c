"""``refengine serve``: the OpenAI-compatible HTTP API."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from refengine.cli.options import Bytes, engine_options, show_progress, take_engine_config
from refengine.errors import RefengineError

EPILOG = """
\b
Examples:
  refengine serve
  refengine serve --model ./my-model --port 9000 --api-key "$KEY"
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "smollm2", "messages": [{"role": "user", "content": "Hello!"}]}'
"""


# Requests carry priorities (equal ones go by arrival), and conversations share their beginnings.
DEFAULTS = {"scheduling_policy": "priority", "enable_prefix_caching": True}


@click.command("serve", epilog=EPILOG, context_settings={"default_map": DEFAULTS})
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 serves the network.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True,
              help="0 picks a free one.")  # fmt: skip
@click.option("--served-model-name", default=None,
              help="What clients call the model. [default: from --model]")  # fmt: skip
@click.option("--api-key", envvar="REFENGINE_API_KEY", default=None,
              help="Ask for it on every route but /health (or set REFENGINE_API_KEY).")  # fmt: skip
@click.option("--max-body-bytes", type=Bytes(), default="8MiB", show_default=True,
              help="A larger request gets status 413.")  # fmt: skip
@click.option("--request-timeout", type=click.FloatRange(0, min_open=True), default=600.0,
              show_default=True, help="Seconds that an answer may take.")  # fmt: skip
@click.option("--max-queue", type=click.IntRange(0), default=256, show_default=True,
              help="Requests in flight beyond --max-num-seqs; more get status 429.")  # fmt: skip
@click.option("--shutdown-timeout", type=click.FloatRange(0), default=30.0, show_default=True,
              help="Seconds that running requests have after SIGTERM.")  # fmt: skip
@click.option("--cors-origin", "cors_origins", multiple=True,
              help='Let pages of this origin ("*": any) use the server; repeatable.')  # fmt: skip
@click.option("--restart-engine", is_flag=True,
              help="Start a new engine when it has died, instead of ending.")  # fmt: skip
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]),
              default="info", show_default=True)  # fmt: skip
@engine_options
def command(
    host: str,
    port: int,
    served_model_name: str | None,
    api_key: str | None,
    max_body_bytes: int,
    request_timeout: float,
    max_queue: int,
    shutdown_timeout: float,
    cors_origins: tuple[str, ...],
    restart_engine: bool,
    log_level: str,
    **flags: Any,
) -> None:
    """Serve a model over HTTP, as OpenAI's and Ollama's APIs."""
    engine_config = take_engine_config(flags)
    if api_key is not None and not api_key.strip():
        raise click.UsageError("--api-key is empty; leave it out or give one")
    try:
        from refengine.server.context import ServerConfig
        from refengine.server.logs import set_up
        from refengine.server.run import serve
    except ImportError as error:
        raise RefengineError(
            f"the server's packages are missing ({error}); pip install 'refengine[server]'"
        ) from error
    set_up(log_level)
    config = ServerConfig(
        host=host,
        port=port,
        served_model_name=served_model_name or _name(engine_config.model),
        api_key=api_key,
        max_body_bytes=max_body_bytes,
        request_timeout=request_timeout,
        max_queue=max_queue,
        shutdown_timeout=shutdown_timeout,
        cors_origins=cors_origins,
        restart_engine=restart_engine,
    )

    def announce(url: str) -> None:
        click.echo(f"serving {config.served_model_name} at {url} (chat page), {url}/v1 (OpenAI)")
        sys.stdout.flush()

    status = serve(engine_config, config, progress=show_progress(), announce=announce)
    # Threads of clients that stall must not keep the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _name(model: str) -> str:
    """A model's last path component, without an ending."""
    path = Path(model)
    return path.resolve().stem if path.suffix == ".gguf" else (path.name or path.resolve().name)
