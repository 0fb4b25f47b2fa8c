"""A GGUF file's metadata and tensors (format: ggml's docs/gguf.md, versions 2 and 3).

The ``gguf`` package knows the quantised formats and undoes them. Its reader builds an array object
for every word of the vocabulary, which takes seconds at every start; the header is simple enough
to read here in a few dozen milliseconds.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from refengine.errors import ModelLoadError
from refengine.models.gguf_dequantize import dequantize
from refengine.models.mapped_file import MappedFile

_ARRAY = GGUFValueType.ARRAY.value
_STRING = GGUFValueType.STRING.value
_SCALARS: dict[int, str] = {
    GGUFValueType.UINT8.value: "B",
    GGUFValueType.INT8.value: "b",
    GGUFValueType.UINT16.value: "H",
    GGUFValueType.INT16.value: "h",
    GGUFValueType.UINT32.value: "I",
    GGUFValueType.INT32.value: "i",
    GGUFValueType.FLOAT32.value: "f",
    GGUFValueType.BOOL.value: "?",
    GGUFValueType.UINT64.value: "Q",
    GGUFValueType.INT64.value: "q",
    GGUFValueType.FLOAT64.value: "d",
}
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor lies and how it is stored."""

    name: str
    shape: tuple[int, ...]  # row-major, as NumPy has it; the file lists it the other way round
    kind: GGMLQuantizationType
    offset: int  # bytes from the file's beginning
    num_bytes: int


class GGUFFile:
    """A mapped GGUF file.

    Attributes:
        metadata: every key with its value; arrays are lists.
        tensors: by GGUF's own names.

    Raises:
        ModelLoadError: where the file is not GGUF, of another version, truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        self._file = MappedFile(path)
        self._at = 0
        try:
            self._read_header()
        except (struct.error, IndexError) as error:
            raise ModelLoadError(f"{path} is truncated in its header ({error})") from None
        except (UnicodeDecodeError, ValueError) as error:
            if isinstance(error, ModelLoadError):
                raise
            raise ModelLoadError(f"{path} is damaged ({error})") from None

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value, or the default."""
        return self.metadata.get(key, default)

    def read(self, name: str) -> npt.NDArray[np.generic]:
        """A tensor: float32, float16 or bfloat16 views as stored, anything quantised as float32.

        Raises:
            ModelLoadError: where its format cannot be dequantised.
        """
        tensor = self.tensors[name]
        raw = self._file.bytes_at(tensor.offset, tensor.num_bytes)
        try:
            return dequantize(raw, tensor.kind, tensor.shape)
        except NotImplementedError:
            raise ModelLoadError(
                f"tensor {name} in {self.path} is stored as {tensor.kind.name}, which cannot be "
                "dequantised; use another quantisation of the model"
            ) from None

    def close(self) -> None:
        """Unmap the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read_header(self) -> None:
        # 1 Magic, version and counts.
        if self._file.map[:4] != b"GGUF":
            raise ModelLoadError(
                f"{self.path} is not a GGUF file; name a .gguf file or a model's directory"
            )
        self._at = 4
        version = self._unpack("I")
        if version not in (2, 3):
            raise ModelLoadError(
                f"{self.path} is GGUF version {version} (or big-endian); supported: 2 and 3"
            )
        num_tensors, num_values = self._unpack("Q"), self._unpack("Q")
        # 2 Metadata.
        for _ in range(num_values):
            key = self._string()
            self.metadata[key] = self._value(self._unpack("I"))
        # 3 Tensor descriptions; offsets count from the aligned end of the header.
        raw: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(num_tensors):
            name = self._string()
            dims = tuple(self._unpack("Q") for _ in range(self._unpack("I")))
            raw.append((name, dims[::-1], self._unpack("I"), self._unpack("Q")))
        alignment = self.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ModelLoadError(f"{self.path}: general.alignment is {alignment!r}")
        base = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in raw:
            self.tensors[name] = self._tensor(name, shape, kind, base + offset)

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
        try:
            quantization = GGMLQuantizationType(kind)
        except ValueError:
            raise ModelLoadError(
                f"tensor {name} in {self.path} has storage type {kind}, which the installed gguf "
                "package does not know; upgrade gguf"
            ) from None
        block_elements, block_bytes = GGML_QUANT_SIZES[quantization]
        num_elements = 1
        for size in shape:
            num_elements *= size
        if not shape or shape[-1] % block_elements:
            raise ModelLoadError(
                f"tensor {name} in {self.path} has shape {list(shape)}; {quantization.name} needs "
                f"rows of a multiple of {block_elements}"
            )
        num_bytes = num_elements // block_elements * block_bytes
        if offset + num_bytes > self._file.size:
            raise ModelLoadError(
                f"{self.path} is truncated: tensor {name} ends at byte {offset + num_bytes}, the "
                f"file at {self._file.size}; download it again"
            )
        return GGUFTensor(name, shape, quantization, offset, num_bytes)

    def _unpack(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._file.map, self._at)
        self._at += struct.calcsize(code)
        return value

    def _string(self) -> str:
        size = self._unpack("Q")
        end = self._at + size
        if end > self._file.size:
            raise IndexError(f"a text of {size} bytes at byte {self._at}")
        text = self._file.map[self._at : end].decode("utf-8")
        self._at = end
        return text

    def _strings(self, count: int) -> list[str]:
        """Many texts: vocabularies have a hundred thousand, so this loop is kept bare."""
        data, size, unpack = self._file.map, self._file.size, struct.Struct("<Q").unpack_from
        texts, at = [], self._at
        for _ in range(count):
            start = at + 8
            at = start + unpack(data, at)[0]
            if at > size:
                raise IndexError(f"a text that ends at byte {at}")
            texts.append(data[start:at].decode("utf-8"))
        self._at = at
        return texts

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(self._unpack("I"), self._unpack("Q"))
        if kind not in _SCALARS:
            raise ModelLoadError(f"{self.path} is damaged: value type {kind} at byte {self._at}")
        return self._unpack(_SCALARS[kind])

    def _array(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            return self._strings(count)
        if kind not in _SCALARS:
            return [self._value(kind) for _ in range(count)]
        end = self._at + count * struct.calcsize(_SCALARS[kind])
        if end > self._file.size:
            raise IndexError(f"an array of {count} values at byte {self._at}")
        values = struct.unpack_from(f"<{count}{_SCALARS[kind]}", self._file.map, self._at)
        self._at = end
        return list(values)
