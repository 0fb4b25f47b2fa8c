"""Our own kernels, as ``refengine check`` finds them when no implementation is named."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from refengine.conformance.implementation import Implementation
from refengine.conformance.kernels import KERNELS
from refengine.errors import RefengineError


class Own(NamedTuple):
    """One of our kernels and the dtypes that its backend computes in."""

    backend: str
    implementation: Implementation
    dtypes: tuple[str, ...]


BACKENDS = ("reference", "cpu", "cuda")
_DTYPES = {
    "reference": ("float32", "float16", "bfloat16", "bfloat16-cache"),
    "cpu": ("float32", "bfloat16-cache"),
    "cuda": ("float32", "float16", "bfloat16"),
}
# Kernels of the reference whose functions work on one row; the contract's take a batch.
_ROW_BY_ROW = ("top_k_top_p",)
# Modules that hold a kernel of another name.
_HOMES = {
    "copy_blocks": "blocks",
    "swap_blocks": "blocks",
    "fused_add_rms_norm": "rms_norm",
    "rotary_embedding": "rotary",
    "silu_and_mul": "activation",
    "gelu_tanh_and_mul": "activation",
    "verify_draft_tokens": "speculative",
}
# Kernels without a cache: a 16-bit cache changes nothing.
_NO_CACHE = frozenset(KERNELS) - {"paged_attention", "write_kv", "copy_blocks", "swap_blocks"}


def own_implementations(
    kernel: str | None, backend: str | None = None, *, simulated: bool = False
) -> Iterator[Own]:
    """Our implementations on every backend that this machine has.

    Args:
        kernel: one of the contract's, or None for all.
        backend: "reference", "cpu" or "cuda", or None for all that can run here.
        simulated: the CUDA kernels in the simulator; NUMBA_ENABLE_CUDASIM must then be set where
            they run.

    Raises:
        RefengineError: where a backend was named that cannot run here.
    """
    for name in BACKENDS if backend is None else (backend,):
        if name == "cuda" and not simulated and not _cuda_is_here():
            if backend is not None:
                raise RefengineError("backend cuda needs an NVIDIA GPU, torch and numba-cuda")
            continue
        for each in KERNELS if kernel is None else (kernel,):
            target = _target(name, each)
            if target is None:
                continue
            kind, device = (
                ("torch", "cuda") if name == "cuda" and not simulated else ("numpy", "cpu")
            )
            found = Implementation(each, target, kind=kind, device=device)
            dtypes = _DTYPES[name]
            if each in _NO_CACHE:
                dtypes = tuple(d for d in dtypes if not d.endswith("-cache"))
            if each in ("top_k_top_p", "verify_draft_tokens"):
                dtypes = ("float32",)
            yield Own(name, found, dtypes)


def _target(backend: str, kernel: str) -> str | None:
    """Where a backend has a kernel, if it does."""
    if backend == "reference" and kernel in _ROW_BY_ROW:
        return f"{__name__}:reference_{kernel}"
    module = f"refengine.{backend}"
    homes = (kernel, _HOMES.get(kernel, kernel))
    for place in (f"{module}.{home}" for home in homes):
        try:
            spec = find_spec(place)
        except ImportError:
            continue
        # Read, not imported: where they will run, numba may have to be set up differently.
        if spec is not None and spec.origin is not None:
            source = Path(spec.origin).read_text("utf-8")
            if f"def {kernel}(" in source:
                return f"{place}:{kernel}"
    return None


def _cuda_is_here() -> bool:
    if find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


def reference_top_k_top_p(logits: Any, top_k: Any, top_p: Any, out: Any) -> None:
    """``refengine.reference.sampling.apply_top_k_top_p``, row by row."""
    from refengine.reference.sampling import apply_top_k_top_p

    for row in range(logits.shape[0]):
        out[row] = apply_top_k_top_p(logits[row], int(top_k[row]), float(top_p[row]))
