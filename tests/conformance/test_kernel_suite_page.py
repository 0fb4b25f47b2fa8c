"""docs/kernel_suite.md does what it says: its files are written, its commands run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernel_suite.md"
FENCE = re.compile(
    r"(?:<!-- (?P<note>(?:(?!-->).)*) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.S
)


def blocks(slow: bool) -> list[tuple[str, str, str]]:
    """Note, kind and text of each fenced block, without the installation."""
    found = [
        (m["note"] or "", m["kind"], m["text"]) for m in FENCE.finditer(PAGE.read_text("utf-8"))
    ]
    return [b for b in found if "pip install" not in b[2] and (slow or b[0] != "slow")]


def follow(folder: Path, slow: bool) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    said = ""
    for note, kind, text in blocks(slow):
        if note.startswith("file: "):
            (folder / note.removeprefix("file: ")).write_text(text)
            continue
        if note.startswith("says"):
            assert text.strip() in said
            continue
        if note.startswith("edit: "):
            name, change = note.removeprefix("edit: ").split(": ", 1)
            old, new = change.split(" -> ")
            source = (folder / name).read_text()
            assert old in source
            (folder / name).write_text(source.replace(old, new))
        if kind != "bash":
            continue
        plugin = "" if "pytest" not in text else plugin_option()
        command = text.replace("pytest -q", f"pytest -q -p no:cacheprovider{plugin}")
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        said = result.stdout
        assert result.returncode == (1 if note == "fails" else 0), text + said + result.stderr


def plugin_option() -> str:
    """An environment that was installed before the plugin was there has to be told of it."""
    from importlib.metadata import entry_points

    known = any(entry.name == "refengine" for entry in entry_points(group="pytest11"))
    return "" if known else " -p refengine.conformance.plugin"


def test_the_page(tmp_path: Path) -> None:
    follow(tmp_path, slow=False)


@pytest.mark.slow
def test_the_page_with_its_long_commands(tmp_path: Path) -> None:
    follow(tmp_path, slow=True)
