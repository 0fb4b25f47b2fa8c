"""From an ``EngineConfig`` to a running engine: the one place that knows all the parts."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from refengine.config import EngineConfig, ModelConfig
from refengine.engine import Engine
from refengine.errors import RefengineError, RequestError
from refengine.execution.kernels import KernelSet
from refengine.execution.runner import Model, ModelRunner
from refengine.execution.structured_output import StructuredOutputs
from refengine.memory import available_memory_bytes
from refengine.models.chat_template import ChatTemplate
from refengine.models.decoder_weights import load_decoder_weights
from refengine.models.loading import open_model
from refengine.models.tokenizer import Tokenizer
from refengine.models.transformer import Transformer
from refengine.scheduling.scheduler import Scheduler, SchedulerConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Of the memory that is free when the engine starts, this share may become KV cache by default.
DEFAULT_CACHE_SHARE = 0.25


DEFAULT_BATCHED_TOKENS = {"reference": 512, "cpu": 512, "cuda": 8192}

# Loading compiled kernels from disk is quicker than this; compiling them is not.
COMPILE_NOTICE_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine, and what it was made of."""

    engine: Engine
    model_config: ModelConfig
    tokenizer: Tokenizer | None
    chat_template: Any
    backend: str
    dtype: str
    max_model_len: int
    num_kv_blocks: int
    startup_seconds: dict[str, float]

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
    ) -> tuple[str, list[int]]:
        """A conversation as the model reads it: its text and its token ids.

        Raises:
            RequestError: where there is no template, or it refuses the messages.
        """
        template = self.chat_template
        if chat_template is not None and self.tokenizer is not None:
            template = ChatTemplate.of(self.tokenizer, chat_template)
        if template is None or self.tokenizer is None:
            raise RequestError(
                "this model has no chat template; use generate with a prompt, or give a template"
            )
        text = template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)
        # The template writes every special token itself.
        return text, self.tokenizer.encode(text, add_special_tokens=False)


def build_engine(
    config: EngineConfig,
    *,
    clock: Callable[[], float] = time.monotonic,
    progress: bool = False,
) -> LoadedEngine:
    """Load a model and make an engine around it.

    Args:
        config: what to load and how to run it.
        clock: the engine's clock.
        progress: show progress bars on standard error.

    Raises:
        RefengineError: where the model cannot be loaded or does not fit.
    """
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    # 1 The model's numbers and files.
    files = open_model(config, progress=progress)
    model_config = files.config
    backend = choose_backend(config.backend)
    dtype = choose_dtype(config.dtype, backend, model_config)
    max_model_len = choose_max_model_len(config, model_config)
    # 2 The backend's functions; compiling them may take a while the first time.
    kernels = load_kernels(backend, config.threads)
    # 3 Weights, straight into their final layout.
    layers = range(model_config.num_hidden_layers)
    with files.open_weights() as source:
        weights = load_decoder_weights(
            model_config,
            source,
            kernels,
            dtype=dtype,
            max_model_len=max_model_len,
            progress=_bar(layers, "loading weights", progress),
        )
    seconds["load"] = time.perf_counter() - began
    began = time.perf_counter()
    model = build_model(model_config, weights, kernels, config)
    # 4 The cache takes what is asked for, or a share of what is left.
    num_kv_blocks = choose_num_kv_blocks(config, model_config, dtype, max_model_len)
    structures = None
    if files.tokenizer is not None:
        structures = StructuredOutputs(
            files.tokenizer, model_config.vocab_size, model_config.eos_token_ids
        )
    runner = ModelRunner(
        model,
        model_config,
        kernels,
        num_kv_blocks=num_kv_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        dtype=dtype,
        structures=structures,
    )
    seconds["compile"] = _warm_up(runner, began)
    # 5 The scheduler and the loop.
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=num_kv_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=choose_max_num_batched_tokens(config, backend, max_model_len),
            max_model_len=max_model_len,
            enable_chunked_prefill=config.enable_chunked_prefill,
            enable_prefix_caching=config.enable_prefix_caching,
            policy=config.scheduling_policy,
        ),
        clock=clock,
    )
    engine = Engine(
        scheduler,
        runner,
        vocab_size=model_config.vocab_size,
        tokenizer=files.tokenizer,
        eos_token_ids=model_config.eos_token_ids,
        clock=clock,
        seed=config.seed,
    )
    return LoadedEngine(
        engine=engine,
        model_config=model_config,
        tokenizer=files.tokenizer,
        chat_template=files.chat_template,
        backend=backend,
        dtype=dtype,
        max_model_len=max_model_len,
        num_kv_blocks=num_kv_blocks,
        startup_seconds=seconds,
    )


def choose_backend(backend: str) -> str:
    """Resolve "auto": CUDA where its driver, numba-cuda and torch are there, the CPU elsewhere."""
    if backend != "auto":
        return backend
    return "cuda" if cuda_is_usable() else "cpu"


def cuda_is_usable() -> bool:
    """Whether the CUDA backend could run here, found without loading anything large."""
    if find_spec("torch") is None or find_spec("refengine.execution.cuda_kernels") is None:
        return False
    return Path("/dev/nvidiactl").exists() or Path("/dev/nvidia0").exists()


def choose_dtype(dtype: str, backend: str, model: ModelConfig) -> str:
    """Resolve "auto", and refuse what a backend cannot compute with.

    The reference backend is for checking and reading, so it stays in float32 unless told; the CPU
    has no float16 arithmetic, so float16 checkpoints become float32 there.
    """
    if dtype == "float16" and backend != "cuda":
        raise RefengineError(
            f"dtype float16 is not for backend {backend}; use bfloat16 or float32 there"
        )
    if dtype != "auto":
        return dtype
    if backend == "reference":
        return "float32"
    if backend == "cpu" and model.dtype == "float16":
        return "float32"
    return model.dtype


def choose_max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """The tokens that a request may have: what was asked for, or what the model was made for."""
    if config.max_model_len is None:
        return model.max_position_embeddings
    if config.max_model_len > model.max_position_embeddings:
        raise RefengineError(
            f"max_model_len is {config.max_model_len}, but this model's positions end at "
            f"{model.max_position_embeddings}; ask for at most that"
        )
    return config.max_model_len


def choose_max_num_batched_tokens(config: EngineConfig, backend: str, max_model_len: int) -> int:
    """Tokens in one step: what was asked for, or what a device computes at its full rate.

    More than that only makes running answers wait longer for a neighbour's prompt. Without chunked
    prefill, a step must take the longest prompt whole.
    """
    if config.max_num_batched_tokens is not None:
        return config.max_num_batched_tokens
    tokens = max(DEFAULT_BATCHED_TOKENS[backend], config.max_num_seqs)
    return tokens if config.enable_chunked_prefill else max(tokens, max_model_len)


def choose_num_kv_blocks(
    config: EngineConfig, model: ModelConfig, dtype: str, max_model_len: int
) -> int:
    """Blocks in the cache: the number or memory asked for, else a share of what is free.

    By default never more than ``max_num_seqs`` requests of full length could fill.

    Raises:
        RefengineError: where not even one block fits, with the numbers.
    """
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    block_bytes = config.block_size * model.kv_bytes_per_token(DTYPE_BYTES[dtype])
    if config.kv_cache_memory_bytes is not None:
        room = config.kv_cache_memory_bytes
    else:
        full = -(-max_model_len // config.block_size) * config.max_num_seqs * block_bytes
        room = min(int(available_memory_bytes() * DEFAULT_CACHE_SHARE), full)
    if room < block_bytes:
        raise RefengineError(
            f"{room:,} bytes of cache hold no block: one of {config.block_size} tokens takes "
            f"{block_bytes:,}; raise --kv-cache-memory-bytes or lower --block-size"
        )
    return room // block_bytes


def load_kernels(backend: str, threads: int | None) -> KernelSet:
    """Import a backend's functions.

    Raises:
        RefengineError: where the backend's packages are missing, with what to install.
    """
    modules = {
        "reference": "refengine.reference",
        "cpu": "refengine.cpu",
        "cuda": "refengine.execution.cuda_kernels",
    }
    try:
        kernels: Any = import_module(modules[backend])
    except ImportError as error:
        raise RefengineError(
            f"backend {backend} cannot be loaded ({error}); its packages come with "
            f"pip install 'refengine[cuda]'"
        ) from error
    if backend == "cpu" and threads is not None:
        _set_num_threads(threads)
    return kernels  # type: ignore[no-any-return]


def _set_num_threads(threads: int) -> None:
    """Let the CPU's kernels use this many threads, as far as the machine has them."""
    import numba

    most = numba.config.NUMBA_NUM_THREADS
    if threads > most:
        raise RefengineError(
            f"{threads} threads were asked for and this process may use {most}; "
            "lower --threads (or raise NUMBA_NUM_THREADS)"
        )
    numba.set_num_threads(threads)


def build_model(
    model_config: ModelConfig, weights: Any, kernels: KernelSet, config: EngineConfig
) -> Model:
    """The decoder: the readable one, or the backend's compiled form of it."""
    if kernels.name == "cpu" and not config.enforce_eager:
        from refengine.cpu.decoder_step import DecoderStep

        return DecoderStep(model_config, weights)
    return Transformer(model_config, weights, kernels)


def _warm_up(runner: ModelRunner, began: float) -> float:
    """Compute four tokens that nobody wants, so that every kernel is compiled and loaded.

    Says so on standard error where it takes long, which is once on each machine.
    """

    def say() -> None:
        print("compiling kernels for this machine, once; this takes a minute or less ...",
              file=sys.stderr, flush=True)  # fmt: skip

    notice = threading.Timer(COMPILE_NOTICE_SECONDS, say)
    notice.daemon = True
    notice.start()
    try:
        runner.warm_up()
    finally:
        notice.cancel()
    seconds = time.perf_counter() - began
    if seconds > COMPILE_NOTICE_SECONDS:
        print(f"compiled in {seconds:.1f} s", file=sys.stderr)
    return seconds


def _bar(items: Iterable[int], text: str, show: bool) -> Iterable[int]:
    """A progress bar on standard error that leaves nothing behind."""
    bar: Iterable[int] = tqdm(items, desc=text, leave=False, disable=not show, unit="layer")
    return bar
