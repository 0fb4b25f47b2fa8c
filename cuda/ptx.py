"""The hardware's own words: types, bit casts, wide loads, warp, tensor-core and copy instructions.

A kernel names an instruction once, ``ptx.mma_bf16(...)``. On a GPU the name is a compiler
intrinsic (``ptx_device``); under ``NUMBA_ENABLE_CUDASIM=1`` it is a Python emulation
(``ptx_simulator``). So the same kernel source runs in both.

Pointers are C pointers on a GPU and flat NumPy arrays in the simulator; both are indexed in
elements. Shared memory, where an instruction wants an address, is a 32-bit byte address that
``shared_address`` gives in both.
"""

from __future__ import annotations

import os

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")

if SIMULATED:
    from .ptx_simulator import *  # noqa: F403
else:
    from .ptx_device import *  # noqa: F403
