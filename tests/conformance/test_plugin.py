"""The pytest plugin, as a stranger's repository runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

KERNELS = """
import numpy as np

def norm(x, weight, eps, out):
    x = x.astype(np.float32)
    out[...] = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight

def no_eps(x, weight, eps, out):
    norm(x, weight, 0.0, out)
"""
TESTS = """
import kernels
import pytest

@pytest.mark.refengine_kernel("rms_norm", where={"num_tokens": [5]}, without=["odd"])
def test_norm(refengine_case):
    refengine_case.check(kernels.norm)

@pytest.mark.refengine_kernel("rms_norm", dtypes=["float32", "float16"], where={"eps": [0.3]})
def test_in_a_process_of_its_own(refengine_case):
    refengine_case.check("kernels:norm")

@pytest.mark.refengine_kernel("rms_norm", where={"size": [1e-3], "eps": [9], "num_tokens": [5]})
def test_without_eps(refengine_case):
    refengine_case.check(kernels.no_eps)
"""


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error"]
    try:
        from importlib.metadata import entry_points

        known = any(e.name == "refengine" for e in entry_points(group="pytest11"))
    except ImportError:
        known = False
    if not known:  # installed before the plugin was there
        command += ["-p", "refengine.conformance.plugin"]
    return subprocess.run(
        [*command, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def test_a_strangers_repository(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(KERNELS)
    (tmp_path / "test_kernels.py").write_text(TESTS)
    result = run_pytest(tmp_path, "test_kernels.py", "-k", "not without_eps")
    assert result.returncode == 0, result.stdout + result.stderr
    result = run_pytest(tmp_path, "test_kernels.py", "-k", "without_eps and tiny")
    assert result.returncode == 1
    assert "looks like: eps ignored" in result.stdout
    assert "smallest failing case" in result.stdout


def test_with_no_test_file(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(KERNELS)
    result = run_pytest(
        tmp_path,
        *("--pyargs", "refengine.conformance.kernel_test", "--refengine-kernel", "rms_norm"),
        *("--refengine-impl", "kernels:norm", "--refengine-dtype", "float32"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "19 passed" in result.stdout
    result = run_pytest(tmp_path, "--pyargs", "refengine.conformance.kernel_test")
    assert "1 skipped" in result.stdout


def test_what_cannot_be_run(tmp_path: Path) -> None:
    result = run_pytest(
        tmp_path,
        *("--pyargs", "refengine.conformance.kernel_test", "--refengine-kernel", "norm"),
        *("--refengine-impl", "kernels:norm"),
    )
    assert result.returncode != 0
    assert "kernel must be one of" in result.stdout + result.stderr


def test_the_plugin_loads_nothing_large() -> None:
    code = (
        "import sys, refengine.conformance.plugin\n"
        "print(*[n for n in ('numpy', 'numba', 'torch', 'ml_dtypes') if n in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []
