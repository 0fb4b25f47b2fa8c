"""Put the parts together: engine process, client, application, HTTP server."""

from __future__ import annotations

import sys
from collections.abc import Callable

from refengine.config import EngineConfig
from refengine.errors import RefengineError
from refengine.execution.structured_output import StructuredOutputs
from refengine.models.loading import open_model
from refengine.server.app import create_app
from refengine.server.context import Context, ServerConfig
from refengine.server.engine_client import EngineClient, EngineSource
from refengine.server.engine_process import EngineProcess
from refengine.server.http_server import HttpServer, bind

# Threads beyond those whose requests are in the engine: for /health, refusals and the page.
SPARE_THREADS = 64


def serve(
    engine_config: EngineConfig,
    config: ServerConfig,
    *,
    progress: bool = False,
    announce: Callable[[str], None] = lambda url: None,
    source: EngineSource | None = None,
) -> int:
    """Serve a model until a signal; return the exit status.

    Args:
        engine_config: what to load and how to run it.
        config: how to serve it.
        progress: show progress bars on standard error.
        announce: called with the server's address once it listens.
        source: starts the engine; None starts a process.

    Raises:
        RefengineError: where the model can't be opened or the address can't be had.
    """
    # 1 The model's words, which this process needs itself; its weights are the engine's.
    files = open_model(engine_config, progress=progress)
    if files.tokenizer is None:
        raise RefengineError(
            "a server needs a tokenizer, and this model has none; give --tokenizer"
        )
    # 2 The address comes first, so that a taken port shows before minutes of loading.
    listener = bind(config.host, config.port)
    # 3 The engine starts in the background; /health says when it is ready.
    client = EngineClient(
        source or EngineProcess(engine_config, progress=progress), restart=config.restart_engine
    )
    context = Context(
        config=config,
        client=client,
        tokenizer=files.tokenizer,
        chat_template=files.chat_template,
        structures=StructuredOutputs(
            files.tokenizer, files.config.vocab_size, files.config.eos_token_ids
        ),
        max_num_seqs=engine_config.max_num_seqs,
    )
    threads = engine_config.max_num_seqs + config.max_queue + SPARE_THREADS
    server = HttpServer(create_app(context), context, listener, threads)
    client.on_death = server.engine_died
    client.start()
    host, port = listener.getsockname()[:2]
    announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    try:
        status = server.run()
    finally:
        client.stop()
    if status:
        print(f"error: {client.reason}", file=sys.stderr)
    return status
