"""refengine: a reference LLM inference engine in Python and Numba."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refengine._version import __version__
from refengine.config import EngineConfig
from refengine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from refengine.llm import LLM

__all__ = ["LLM", "EngineConfig", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Load ``LLM`` when it is asked for: importing the package alone loads no kernels."""
    if name == "LLM":
        from refengine.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
