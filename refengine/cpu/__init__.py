"""Numba kernels for the CPU: the fast twins of ``refengine.reference``, of the same signatures.

The module is itself a ``KernelSet`` (refengine/execution/kernels.py). Functions are compiled when
first called and kept on disk, beside the source or in the user's cache directory.
"""

from __future__ import annotations

import os

# Between parallel loops, OpenMP's threads spin for about a tenth of a millisecond and then sleep.
# Left alone they would spin through the Python between two steps, on cores that others need. The
# library reads this when Numba first loads it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from refengine.cpu.activation import gelu_tanh_and_mul, silu_and_mul, soft_cap
from refengine.cpu.blocks import copy_blocks, swap_blocks
from refengine.cpu.linear import linear
from refengine.cpu.memory import allocate_cache, allocate_host_cache, empty
from refengine.cpu.merge_partial_attention import merge_partial_attention
from refengine.cpu.packing import allocate_weights, embedding, store_vector, store_weight
from refengine.cpu.paged_attention import paged_attention
from refengine.cpu.rms_norm import fused_add_rms_norm, rms_norm
from refengine.cpu.rotary import rotary_embedding
from refengine.cpu.write_kv import write_kv
from refengine.reference.rotary import build_cos_sin_cache

name = "cpu"

__all__ = [
    "allocate_cache",
    "allocate_host_cache",
    "allocate_weights",
    "build_cos_sin_cache",
    "copy_blocks",
    "embedding",
    "empty",
    "fused_add_rms_norm",
    "gelu_tanh_and_mul",
    "linear",
    "merge_partial_attention",
    "name",
    "paged_attention",
    "rms_norm",
    "rotary_embedding",
    "silu_and_mul",
    "soft_cap",
    "store_vector",
    "store_weight",
    "swap_blocks",
    "write_kv",
]
