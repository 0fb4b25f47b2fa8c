"""Plain NumPy kernels: what every fast kernel is checked against.

The module is itself a ``KernelSet`` (refengine/execution/kernels.py): ``--backend reference`` runs
the whole model with it. Nothing here imports more than NumPy.
"""

from __future__ import annotations

from .activation import gelu_tanh_and_mul, silu_and_mul, soft_cap
from .blocks import copy_blocks, swap_blocks
from .linear import allocate_weights, embedding, linear, store_vector, store_weight
from .memory import allocate_cache, allocate_host_cache, empty
from .merge_partial_attention import merge_partial_attention
from .paged_attention import paged_attention
from .rms_norm import fused_add_rms_norm, rms_norm
from .rotary import build_cos_sin_cache, rotary_embedding
from .write_kv import write_kv

name = "reference"

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
