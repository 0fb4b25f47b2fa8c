"""Runs the tests of ``kernels/`` in the simulator, in a process that simulates from the start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(
    os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0"), reason="this is that process"
)
def test_every_kernel_passes_in_the_simulator() -> None:
    kernels = Path(__file__).parent / "kernels"
    command = [sys.executable, "-m", "pytest", str(kernels), "-q", "-x", "-p", "no:cacheprovider"]
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
