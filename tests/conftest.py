"""Fixtures for everyone: the default model, and tiny models of every architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import write_tiny_model


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") and not Path("/dev/nvidiactl").exists():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model's GGUF file, fetched on first use; mark such tests ``model``."""
    from refengine.models.default_model import resolve_model

    return resolve_model("smollm2", progress=False)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the directory of one of ``tiny_models.TINY_MODELS`` by its name; leave it as it is."""
    directories: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in directories:
            directories[name] = write_tiny_model(name, tmp_path_factory.mktemp(name))
        return directories[name]

    return directory
