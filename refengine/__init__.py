"""refengine: a reference LLM inference engine in Python and Numba."""

from refengine._version import __version__
from refengine.config import EngineConfig
from refengine.sampling_params import SamplingParams

__all__ = ["EngineConfig", "SamplingParams", "__version__"]
