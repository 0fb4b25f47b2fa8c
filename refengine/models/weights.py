"""Where a decoder's weights come from: safetensors, GGUF, or random numbers.

All sources name tensors as Hugging Face does and hand them out one at a time, so that a loader
never holds more than the model in its final layout and one tensor:

    with open_weights(path, config) as source:
        for name in expected_tensors(config):
            pack(source.read(name))
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from refengine.config import ModelConfig
from refengine.errors import ModelLoadError
from refengine.models.tensor_names import expected_tensors

DTYPES: dict[str, npt.DTypeLike] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


class WeightSource(Protocol):
    """A checkpoint's tensors by name."""

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""

    def read(self, name: str) -> npt.NDArray[np.generic]:
        """The tensor: float32, float16 or ``ml_dtypes.bfloat16``; possibly a read-only view."""

    def close(self) -> None:
        """Let go of the files."""


@contextmanager
def open_weights(
    path: Path, config: ModelConfig, load_format: str = "auto", seed: int = 0
) -> Iterator[WeightSource]:
    """Open a model's weights and check that every tensor is there in the right shape.

    Args:
        path: a model directory or a GGUF file.
        config: what the model should be.
        load_format: "auto" goes by the path; "safetensors", "gguf" and "dummy" insist.
        seed: of dummy weights.

    Raises:
        ModelLoadError: names the file or tensor that is missing, damaged or of another shape.
    """
    if load_format == "auto":
        load_format = "gguf" if path.is_file() else "safetensors"
    source: WeightSource
    if load_format == "dummy":
        source = DummyWeights(config, seed)
    elif load_format == "gguf":
        from refengine.models.gguf_weights import GGUFWeights

        if not path.is_file():
            raise ModelLoadError(f"load format gguf needs a .gguf file, got {path}")
        source = GGUFWeights(path, config)
    else:
        from refengine.models.safetensors_files import SafetensorsWeights

        if not path.is_dir():
            raise ModelLoadError(f"load format safetensors needs a directory, got {path}")
        source = SafetensorsWeights(path)
    try:
        check_weights(source, config, path)
        yield source
    finally:
        source.close()


def check_weights(source: WeightSource, config: ModelConfig, path: Path) -> None:
    """Raise ModelLoadError unless the source holds exactly the tensors that the config calls for.

    Tensors outside the decoder (a vision tower) are ignored, and so are ``lm_head.weight`` beside
    tied embeddings and the rotary tables of old checkpoints.
    """
    expected = expected_tensors(config)
    for name, shape in expected.items():
        if name not in source.names:
            raise ModelLoadError(
                f"tensor {name} is missing from {path}; its config asks for shape {list(shape)}"
            )
        found = source.shape(name)
        if found != shape:
            raise ModelLoadError(
                f"tensor {name} in {path} has shape {list(found)}, "
                f"but its config asks for {list(shape)}"
            )
    for name in sorted(source.names - expected.keys()):
        if name.startswith("model.layers.") and not name.endswith("rotary_emb.inv_freq"):
            raise ModelLoadError(
                f"{path} holds tensor {name} of shape {list(source.shape(name))}, "
                "which its config does not call for"
            )


class DummyWeights:
    """Random weights of a config's shape, for benchmarks: the same ones for the same seed.

    Matrices are cut from one pool of normal numbers (deviation 0.02, as models are initialised),
    which costs a copy rather than a draw per element: seconds for 8 billion parameters.
    """

    # A prime, so that rows of a power-of-two length do not repeat.
    _POOL_SIZE = 1_048_573
    _DEVIATION = 0.02

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self._shapes = expected_tensors(config)
        self._dtype = np.dtype(DTYPES[config.dtype])
        self._seed = seed
        self._norm_value = 1.0 - config.norm_weight_offset
        pool = np.random.default_rng(seed).standard_normal(self._POOL_SIZE, dtype=np.float32)
        self._pool = (pool * np.float32(self._DEVIATION)).astype(self._dtype)  # [_POOL_SIZE]

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._shapes[name]

    def read(self, name: str) -> npt.NDArray[np.generic]:
        """A tensor of random numbers; norm weights are those that change nothing."""
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return np.full(shape, self._norm_value, self._dtype)
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        start = int.from_bytes(digest[:8], "little") % self._POOL_SIZE
        size = int(np.prod(shape))
        out = np.empty(size, self._dtype)
        filled = 0
        while filled < size:
            count = min(size - filled, self._POOL_SIZE - start)
            out[filled : filled + count] = self._pool[start : start + count]
            filled, start = filled + count, 0
        return out.reshape(shape)

    def close(self) -> None:
        """Nothing to let go of."""
