"""A model's files, found and read but for the weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from refengine.config import EngineConfig, ModelConfig
from refengine.errors import ModelLoadError
from refengine.models.chat_template import ChatTemplate
from refengine.models.default_model import resolve_model
from refengine.models.model_config import load_model_config
from refengine.models.tokenizer import Tokenizer
from refengine.models.weights import WeightSource, open_weights


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What a model is, and where its weights are."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer | None  # None: dummy weights of a config that has no tokenizer
    chat_template: ChatTemplate | None
    load_format: str
    seed: int

    def open_weights(self) -> AbstractContextManager[WeightSource]:
        """The weights, for as long as the context lasts."""
        return open_weights(self.path, self.config, self.load_format, self.seed)


def open_model(config: EngineConfig, *, progress: bool = False) -> ModelFiles:
    """Find a model, fetching it if need be, and read its numbers, tokenizer and chat template.

    Raises:
        ModelLoadError: where files are missing, damaged or of a kind that this engine does not run.
    """
    path = resolve_model(config.model, progress=progress)
    model_config = load_model_config(path)
    tokenizer: Tokenizer | None = None
    try:
        tokenizer = Tokenizer.from_path(path if config.tokenizer is None else config.tokenizer)
    except ModelLoadError:
        # A benchmark of a model's shape needs no words.
        if config.load_format != "dummy" or config.tokenizer is not None:
            raise
    # Added tokens may lie beyond: Gemma 3's smallest text model has one for images, never used.
    if tokenizer is not None and tokenizer.base_vocab_size > model_config.vocab_size:
        raise ModelLoadError(
            f"the tokenizer has {tokenizer.base_vocab_size} tokens and the model's vocabulary "
            f"{model_config.vocab_size}; they do not belong together"
        )
    return ModelFiles(
        path=path,
        config=model_config,
        tokenizer=tokenizer,
        chat_template=None if tokenizer is None else ChatTemplate.of(tokenizer),
        load_format=config.load_format,
        seed=config.seed,
    )
