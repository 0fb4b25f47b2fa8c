"""The kernels of the contract, by name."""

from __future__ import annotations

from refengine.conformance.attention import PagedAttention
from refengine.conformance.cache_kernels import CopyBlocks, SwapBlocks, WriteKv
from refengine.conformance.choosing import TopKTopP, VerifyDraftTokens
from refengine.conformance.merging import MergePartialAttention
from refengine.conformance.problem import KernelSpec
from refengine.conformance.rotary import RotaryEmbedding
from refengine.conformance.row_kernels import Gated, RmsNorm
from refengine.errors import RefengineError

_ALL: tuple[KernelSpec, ...] = (
    PagedAttention(),
    WriteKv(),
    CopyBlocks(),
    SwapBlocks(),
    RmsNorm(fused=False),
    RmsNorm(fused=True),
    RotaryEmbedding(),
    Gated("silu"),
    Gated("gelu_tanh"),
    MergePartialAttention(),
    TopKTopP(),
    VerifyDraftTokens(),
)
KERNELS = {spec.name: spec for spec in _ALL}


def find_kernel(name: str) -> KernelSpec:
    """A kernel's description.

    Raises:
        RefengineError: naming those that there are.
    """
    if name not in KERNELS:
        raise RefengineError(f"kernel must be one of {', '.join(KERNELS)}, got {name!r}")
    return KERNELS[name]
