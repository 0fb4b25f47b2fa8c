"""A file mapped read-only, whose pages are given back along the way."""

from __future__ import annotations

import mmap
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from refengine.errors import ModelLoadError

# Mapped pages count as this process's memory once they have been read. Giving them back after
# this many bytes keeps the peak at "the model plus a little", whatever the file's size.
RELEASE_BYTES = 32 * 2**20


class MappedFile:
    """Views into a file's bytes without a copy.

    Raises:
        ModelLoadError: where the file cannot be opened, or is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelLoadError(f"cannot read {path}: {error.strerror or error}") from None
        except ValueError:  # mmap refuses an empty file
            raise ModelLoadError(f"{path} is empty") from None
        self.size = len(self.map)
        self._unreleased = 0

    def bytes_at(self, offset: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """A read-only view of ``num_bytes`` bytes, ``[num_bytes]`` uint8.

        Earlier views stay valid: their pages may have been given back to the system, which reads
        them from the file again when they are touched.
        """
        if self._unreleased >= RELEASE_BYTES:
            self.release()
        self._unreleased += num_bytes
        return np.frombuffer(self.map, dtype=np.uint8, count=num_bytes, offset=offset)

    def release(self) -> None:
        """Give the mapped pages back to the system."""
        self._unreleased = 0
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Unmap the file, or leave that to the last view of it."""
        try:
            self.map.close()
        except BufferError:  # an array still looks into it
            self.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
