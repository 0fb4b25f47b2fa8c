"""The engine in a process of its own, so that HTTP work never holds up a step.

Threads of one Python process share its interpreter lock, and what HTTP threads do while a step's
Python runs would come out of the step; besides, an engine that crashes leaves someone to say so.
``benchmarks/http_load.py --engine-on-thread`` compares.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from refengine.config import EngineConfig
from refengine.errors import RefengineError
from refengine.server.messages import EngineInfo, Failed, Ready

EngineMain = Callable[[Connection, EngineConfig, bool], None]


def engine_main(connection: Connection, config: EngineConfig, progress: bool) -> None:
    """Load a model and serve the connection; the body of the engine's process."""
    # The parent ends this process, by a command or by closing the pipe: a Ctrl-C goes to both.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        from refengine.factory import build_engine
        from refengine.server.engine_server import EngineServer

        loaded = build_engine(config, progress=progress)
    except Exception as error:
        if not isinstance(error, RefengineError):
            traceback.print_exc()
        connection.send(Failed(str(error)))
        sys.exit(1)
    info = EngineInfo(
        pid=os.getpid(),
        backend=loaded.backend,
        dtype=loaded.dtype,
        vocab_size=loaded.model_config.vocab_size,
        hidden_size=loaded.model_config.hidden_size,
        max_model_len=loaded.max_model_len,
        num_kv_blocks=loaded.num_kv_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        startup_seconds=dict(loaded.startup_seconds),
    )
    server = EngineServer(loaded.engine, connection)
    connection.send(Ready(info))
    try:
        server.run()
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    loaded.engine.close()


class EngineProcess:
    """Starts and ends the engine's process.

    Args:
        config: what to load.
        progress: show progress bars on standard error.
        main: what the process runs; a test puts its own here.
    """

    def __init__(
        self, config: EngineConfig, *, progress: bool = False, main: EngineMain = engine_main
    ) -> None:
        self._config = config
        self._progress = progress
        self._main = main
        self._process: SpawnProcess | None = None

    def start(self) -> Connection:
        """Start a fresh process; return this side's end of its pipe."""
        # Spawned, not forked: a fork of a process with threads may inherit a held lock.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(
            target=self._main,
            args=(theirs, self._config, self._progress),
            name="refengine-engine",
            daemon=True,
        )
        self._process.start()
        # With our copy closed, the end of that process is an end of file here.
        theirs.close()
        return ours

    def end(self, timeout: float) -> None:
        """Wait for the process, and kill it after ``timeout`` seconds."""
        if self._process is None:
            return
        self._process.join(timeout)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
