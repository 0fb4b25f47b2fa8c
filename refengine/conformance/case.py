"""Cases are data: shapes and properties from ``cases.toml`` or a file of the user's own."""

from __future__ import annotations

import itertools
import tomllib
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from refengine.errors import RefengineError

# "full" holds "quick" as well; the other two are for --time and for the CUDA simulator.
SETS = ("quick", "full", "time", "simulator")


@dataclass(frozen=True)
class Case:
    """One problem to pose.

    Args:
        name: unique within its kernel.
        kernel: whose arguments ``values`` describes.
        dtype: a key of ``precision.DTYPES``.
        values: shapes and properties, by the names that ``cases.toml`` explains.
        tags: what ``--without`` can leave out.
    """

    name: str
    kernel: str
    dtype: str
    values: Mapping[str, Any]
    tags: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Name and dtype."""
        return f"{self.name}/{self.dtype}"

    @property
    def seed(self) -> int:
        """Fixed by name and dtype, so that a case is the same everywhere."""
        return zlib.crc32(f"{self.kernel}/{self.name}/{self.dtype}".encode())

    def get(self, key: str, default: Any = None) -> Any:
        """One value, or the default."""
        return self.values.get(key, default)

    def with_values(self, values: Mapping[str, Any]) -> Case:
        """The same case with other values: what shrinking tries."""
        return replace(self, values=values)

    def describe(self) -> str:
        """The values on one line, for a report."""
        return ", ".join(f"{key} {value}" for key, value in self.values.items())


def load_cases(
    kernel: str,
    cases: str = "quick",
    *,
    dtypes: Iterable[str] = ("float32",),
    without: Iterable[str] = (),
    where: Mapping[str, Iterable[Any]] | None = None,
) -> list[Case]:
    """The cases of one kernel.

    Args:
        kernel: its name.
        cases: one of ``SETS``, or the path of a TOML file laid out like ``cases.toml``.
        dtypes: of ``precision.DTYPES``; each case is posed in every one, unless it names its own.
        without: tags to leave out.
        where: for a key, the values to keep; cases without the key stay.

    Raises:
        RefengineError: where the file cannot be read or has no case for the kernel.
    """
    entries = _read(cases).get(kernel, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise RefengineError(f"cases of {kernel} must be tables written [[{kernel}]]")
    out, without = [], set(without)
    for entry in entries:
        for name, values in _expand(dict(entry)):
            member = values.get("set", "quick")
            if cases in SETS and member != cases and (cases, member) != ("full", "quick"):
                continue
            tags = tuple(values.get("tags", ()))
            if without & set(tags):
                continue
            if any(k in values and values[k] not in kept for k, kept in (where or {}).items()):
                continue
            own = {k: v for k, v in values.items() if k not in ("name", "set", "tags", "dtypes")}
            for dtype in dtypes:
                if dtype in values.get("dtypes", (dtype,)):
                    out.append(Case(name, kernel, dtype, own, tags))
    return out


def all_tags() -> set[str]:
    """Every tag that the suite's own cases carry."""
    entries = itertools.chain.from_iterable(_read("full").values())
    return {tag for entry in entries for tag in entry.get("tags", ())}


def _read(cases: str) -> dict[str, Any]:
    if cases in SETS:
        return tomllib.loads(files(__package__).joinpath("cases.toml").read_text("utf-8"))
    path = Path(cases)
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RefengineError(
            f"cases must be quick, full or a TOML file; {cases} cannot be read "
            f"({error.strerror or error})"
        ) from error
    except ValueError as error:
        raise RefengineError(f"{cases} is not a TOML file of cases: {error}") from error


def _expand(entry: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """One case, or one for every combination of its ``grid``."""
    if "name" not in entry:
        raise RefengineError(f"a case needs a name, got only {', '.join(entry) or 'nothing'}")
    grid = entry.pop("grid", {})
    for combination in itertools.product(*grid.values()):
        chosen = dict(zip(grid, combination, strict=True))
        suffix = "".join(f"-{key}={value}" for key, value in chosen.items())
        yield entry["name"] + suffix, {**entry, **chosen}
