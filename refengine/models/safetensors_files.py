"""safetensors directories as Hugging Face lays them out: one file, or shards with an index.

The ``safetensors`` library checks each file's header; the tensors themselves are views into the
mapped file, which its NumPy interface would copy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from refengine.errors import ModelLoadError
from refengine.models.mapped_file import MappedFile
from refengine.models.model_config import read_json_object

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPES: dict[str, npt.DTypeLike] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
# Models with a vision tower keep the decoder under one of these prefixes.
_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)


@dataclass(frozen=True, slots=True)
class _Entry:
    file: MappedFile
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    offset: int  # bytes from the file's beginning
    num_bytes: int


class SafetensorsWeights:
    """The tensors of a directory of safetensors files, under Hugging Face's names.

    Raises:
        ModelLoadError: where a file is missing, truncated or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self._files: list[MappedFile] = []
        self._entries: dict[str, _Entry] = {}
        for path in weight_files(directory):
            self._add_file(path)

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._entry(name).shape

    def read(self, name: str) -> npt.NDArray[np.generic]:
        """The tensor, a read-only view into the file: float32, float16 or bfloat16.

        Raises:
            ModelLoadError: where there is no such tensor, or it has another dtype.
        """
        entry = self._entry(name)
        if entry.dtype not in DTYPES:
            raise ModelLoadError(
                f"tensor {name} in {entry.file.path} has dtype {entry.dtype}; "
                f"supported: {', '.join(DTYPES)}"
            )
        dtype = np.dtype(DTYPES[entry.dtype])
        raw = entry.file.bytes_at(entry.offset, entry.num_bytes)
        if entry.offset % dtype.itemsize:  # writers need not align tensors
            raw = raw.copy()
        return raw.view(dtype).reshape(entry.shape)

    def close(self) -> None:
        """Unmap the files."""
        for file in self._files:
            file.close()

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            where = ", ".join(str(file.path) for file in self._files)
            raise ModelLoadError(f"tensor {name} is missing from {where}")
        return self._entries[name]

    def _add_file(self, path: Path) -> None:
        try:
            # 1 The library's checks: sizes, overlaps, dtypes, and that the file is all there.
            with safe_open(str(path), framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(
                f"{path} is not a complete safetensors file ({error}); download it again"
            ) from None
        # 2 Where each tensor lies: 8 bytes of length, then a JSON header, then the tensors.
        file = MappedFile(path)
        self._files.append(file)
        header_bytes = int.from_bytes(file.map[:8], "little")
        header = json.loads(file.map[8 : 8 + header_bytes])
        header.pop("__metadata__", None)
        for name, info in header.items():
            start, end = info["data_offsets"]
            offset = 8 + header_bytes + start
            entry = _Entry(file, info["dtype"], tuple(info["shape"]), offset, end - start)
            self._entries[_plain_name(name)] = entry


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, from its index if there is one.

    Raises:
        ModelLoadError: where there are none, or one that the index names is missing.
    """
    index = directory / INDEX_NAME
    if not index.exists():
        single = directory / SINGLE_NAME
        paths = [single] if single.exists() else sorted(directory.glob("*.safetensors"))
        if not paths:
            raise ModelLoadError(
                f"{directory} holds no safetensors files; convert other formats to safetensors, "
                "or use --load-format dummy for random weights"
            )
        return paths
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index} lacks weight_map, a mapping of tensor names to files")
    paths = [directory / str(name) for name in sorted(set(weight_map.values()))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ModelLoadError(f"{index} names files that are missing: {', '.join(missing)}")
    return paths


def _plain_name(name: str) -> str:
    for prefix, plain in _PREFIXES:
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name
