"""CUDA kernels are tested where they can run: on a GPU, or simulated in a process of its own.

Numba decides at its first import whether it simulates, and other tests import it without. So the
tests in ``kernels/`` are collected only on a machine with a GPU, or under NUMBA_ENABLE_CUDASIM=1,
which is how ``test_simulator.py`` runs them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


def has_gpu() -> bool:
    """Whether real kernels can run: a GPU that torch sees, and numba-cuda to compile for it."""
    try:
        import numba_cuda  # noqa: F401
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


sys.path.insert(0, str(Path(__file__).parent / "kernels"))
collect_ignore = [] if SIMULATED or has_gpu() else ["kernels"]
