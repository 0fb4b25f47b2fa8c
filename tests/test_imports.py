"""Who may import whom: the walls between the parts, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STANDARD = set(sys.stdlib_module_names)
PLAIN_DATA = {
    "refengine.errors",
    "refengine.request",
    "refengine.sampling_params",
    "refengine.step",
}
# Parts that stand above the engine: nothing below may import them.
UPPER = {
    "refengine.__main__",
    "refengine.cli",
    "refengine.conformance",
    "refengine.server",
    "refengine.simulation",
}
CUDA_PACKAGES = {"numba", "numpy", "cuda", "llvmlite", "ml_dtypes"}


def module_name(path: Path) -> str:
    """The dotted name under which a source file is imported."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in ("cuda", "reference"):
        parts.insert(0, "refengine")
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def imports_of(source: str, module: str, is_package: bool = False) -> set[str]:
    """Full dotted names that a module imports, inside functions too, ``TYPE_CHECKING`` aside."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")
                package = package[: len(package) - node.level + is_package]
                base = ".".join([*package, base]) if base else ".".join(package)
            # "from refengine import engine" imports refengine.engine, if that is a module.
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def within(name: str, parts: set[str]) -> bool:
    """Whether a dotted name is one of these modules or lies in one."""
    return any(name == part or name.startswith(part + ".") for part in parts)


def walls(module: str, imported: set[str]) -> set[str]:
    """The imports that a module of this name may not have."""
    tops = {name: name.partition(".")[0] for name in imported}
    own = {name for name in imported if tops[name] == "refengine"}
    foreign = {name for name in imported - own if tops[name] not in STANDARD}
    if within(module, {"refengine.reference"}):
        allowed = {"numpy", "ml_dtypes"}
        return {n for n in foreign if tops[n] not in allowed} | {
            n for n in own if not within(n, {"refengine.reference"})
        }
    if within(module, {"refengine.cuda"}):
        return {n for n in foreign if tops[n] not in CUDA_PACKAGES} | {
            n for n in own if not within(n, {"refengine.cuda"})
        }
    if within(module, {"refengine.scheduling"}):
        return foreign | {n for n in own if not within(n, PLAIN_DATA | {"refengine.scheduling"})}
    if module in PLAIN_DATA | {"refengine.config"}:
        return foreign | {n for n in own if not within(n, PLAIN_DATA)}
    bad = set()
    if not within(module, UPPER):
        bad |= {n for n in own if within(n, UPPER)}
    if module == "refengine.engine":
        bad |= {n for n in foreign if tops[n] in ("torch", "numba", "flask")}
        bad |= {n for n in own if within(n, {"refengine.cuda", "refengine.cpu"})}
    return bad


FILES = sorted(
    path for folder in ("refengine", "cuda", "reference") for path in (ROOT / folder).rglob("*.py")
)


def test_there_are_files_to_read() -> None:
    assert {"refengine.scheduling.scheduler", "refengine.reference", "refengine.cuda"} <= {
        module_name(path) for path in FILES
    }


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_each_module_keeps_to_its_side_of_the_walls(path: Path) -> None:
    module = module_name(path)
    imported = imports_of(path.read_text("utf-8"), module, path.name == "__init__.py")
    assert walls(module, imported) == set()


@pytest.mark.parametrize(
    ("module", "source", "bad"),
    [
        ("refengine.scheduling.x", "import numpy as np", "numpy"),
        ("refengine.scheduling.x", "def f():\n    import torch", "torch"),
        ("refengine.scheduling.x", "from refengine import engine", "refengine.engine"),
        ("refengine.scheduling.x", "from ..execution import runner", "refengine.execution.runner"),
        ("refengine.reference.x", "from numba import njit", "numba.njit"),
        ("refengine.reference.x", "from refengine.step import Decision", "refengine.step.Decision"),
        ("refengine.cuda.x", "import torch", "torch"),
        ("refengine.engine", "import torch.cuda", "torch.cuda"),
        ("refengine.engine", "from refengine.server import app", "refengine.server.app"),
        ("refengine.models.x", "from refengine.cli import main", "refengine.cli.main"),
        ("refengine.step", "from refengine.engine import Engine", "refengine.engine.Engine"),
    ],
)
def test_a_wall_that_is_crossed_is_seen(module: str, source: str, bad: str) -> None:
    assert walls(module, imports_of(source, module)) == {bad}


def test_importing_refengine_loads_no_accelerator_and_no_web_server() -> None:
    code = (
        "import sys, refengine\n"
        "print(*[n for n in ('torch', 'flask', 'numba', 'numba.cuda') if n in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.split() == []
