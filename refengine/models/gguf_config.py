"""GGUF metadata to ModelConfig.

GGUF keys carry the architecture as their prefix ("llama.block_count"). What Hugging Face's config
says in words (biases, tied embeddings, head norms) a GGUF file says by the tensors it holds.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from refengine.config import ModelConfig, RopeScaling
from refengine.errors import ModelLoadError
from refengine.models.gguf_file import GGUFFile

# "llama" covers Mistral too, of which only windows tell.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
_GEMMA3_WINDOW_PATTERN = 6  # every sixth layer attends to everything
_GEMMA3_LOCAL_THETA = 10000.0
# Gemma 3 27B alone scales scores by its hidden size per head and not by its head_dim.
_GEMMA3_27B_LAYERS = 62
# How Llama 3.1 and 3.2 stretch their frequencies; files keep the result, not the parameters.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_ORIGINAL = 1.0, 4.0, 8192
_DTYPES = {GGMLQuantizationType.F32: "float32", GGMLQuantizationType.F16: "float16"}


def config_from_metadata(file: GGUFFile) -> ModelConfig:
    """What the model in a GGUF file is.

    ``dtype`` is that of the projection matrices; a quantised file counts as bfloat16, which holds
    4 to 6-bit weights about as well as they were.

    Raises:
        ModelLoadError: where the architecture is unknown, or a needed key is missing or wrong.
    """
    arch = file.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ModelLoadError(
            f"{file.path}: architecture {arch!r} is not one that refengine runs; "
            f"supported in GGUF files: {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[arch]
    gemma = arch == "gemma3"
    num_layers = _integer(file, f"{arch}.block_count")
    hidden_size = _integer(file, f"{arch}.embedding_length")
    num_heads = _integer(file, f"{arch}.attention.head_count")
    num_kv_heads = _integer(file, f"{arch}.attention.head_count_kv", num_heads)
    head_dim = _integer(file, f"{arch}.attention.key_length", hidden_size // num_heads)
    if num_heads % num_kv_heads or head_dim % 2:
        raise ModelLoadError(
            f"{file.path}: {num_heads} query heads, {num_kv_heads} key-value heads of size "
            f"{head_dim}; the first must be a multiple of the second, and the size even"
        )
    rotated = _integer(file, f"{arch}.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ModelLoadError(
            f"{file.path}: rotary embeddings of {rotated} of {head_dim} dimensions are not "
            "supported"
        )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelLoadError(f"{file.path} lacks the tensor token_embd.weight")
    theta = _number(file, f"{arch}.rope.freq_base", 1e6 if gemma else 10000.0)
    attention_scale = None
    if gemma:
        per_head = hidden_size // num_heads if num_layers == _GEMMA3_27B_LAYERS else head_dim
        attention_scale = per_head**-0.5
    query = file.tensors.get("blk.0.attn_q.weight")
    windows = _layer_windows(file, arch, num_layers)
    if arch == "llama" and windows:
        architecture = "MistralForCausalLM"
    return ModelConfig(
        architecture=architecture,
        vocab_size=embedding.shape[0],
        hidden_size=hidden_size,
        intermediate_size=_integer(file, f"{arch}.feed_forward_length"),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=_integer(file, f"{arch}.context_length"),
        rms_norm_eps=_number(file, f"{arch}.attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, arch, head_dim, theta),
        rope_local_theta=_local_theta(file, arch) if gemma else None,
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        attention_output_bias="blk.0.attn_output.bias" in file.tensors,
        qk_norm=arch in ("qwen3", "gemma3"),
        hidden_act="gelu_pytorch_tanh" if gemma else "silu",
        layer_windows=windows,
        attention_scale=attention_scale,
        embedding_multiplier=hidden_size**0.5 if gemma else 1.0,
        norm_weight_offset=1.0 if gemma else 0.0,
        post_norms=gemma,
        bos_token_id=file.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=_eos_token_ids(file),
        dtype="bfloat16" if query is None else _DTYPES.get(query.kind, "bfloat16"),
    )


def _integer(file: GGUFFile, key: str, default: int | None = None) -> int:
    """A positive integer; some writers give one value a layer, which must then be all the same."""
    value = file.get(key, default)
    if isinstance(value, list) and value:
        if len(set(value)) > 1:
            raise ModelLoadError(f"{file.path}: {key} differs between layers, not supported")
        value = value[0]
    if value is None:
        raise ModelLoadError(f"{file.path} lacks {key}")
    if not isinstance(value, int) or value < 1:
        raise ModelLoadError(f"{file.path}: {key} must be a positive integer, got {value!r}")
    return value


def _number(file: GGUFFile, key: str, default: float | None = None) -> float:
    """A positive number, as the decimal that was rounded to float32: 1e-05, not 9.9999997e-06."""
    value = file.get(key, default)
    if value is None:
        raise ModelLoadError(f"{file.path} lacks {key}")
    if not isinstance(value, (int, float)) or not 0.0 < value < float("inf"):
        raise ModelLoadError(f"{file.path}: {key} must be a positive number, got {value!r}")
    return float(str(np.float32(value)))


def _local_theta(file: GGUFFile, arch: str) -> float:
    return _number(file, f"{arch}.rope.freq_base_swa", _GEMMA3_LOCAL_THETA)


def _layer_windows(file: GGUFFile, arch: str, num_layers: int) -> tuple[int | None, ...]:
    key = f"{arch}.attention.sliding_window"
    if not file.get(key):
        return ()
    window = _integer(file, key)
    if arch != "gemma3":
        return (window,) * num_layers
    return tuple(window if (i + 1) % _GEMMA3_WINDOW_PATTERN else None for i in range(num_layers))


def _eos_token_ids(file: GGUFFile) -> tuple[int, ...]:
    """End of sequence, of a turn and of a message, without repeats."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [file.get(f"tokenizer.ggml.{key}") for key in keys]
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, int)))


def _rope_scaling(file: GGUFFile, arch: str, head_dim: int, theta: float) -> RopeScaling | None:
    """Linear scaling from the metadata, or Llama 3's from the factors in ``rope_freqs.weight``."""
    kind = file.get(f"{arch}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ModelLoadError(f"{file.path}: rope scaling {kind!r} is not supported")
    if "rope_freqs.weight" in file.tensors:
        found = file.read("rope_freqs.weight").astype(np.float64)  # [head_dim / 2]
        scaling = RopeScaling(
            rope_type="llama3",
            factor=float(found.max()),
            low_freq_factor=_LLAMA3_LOW,
            high_freq_factor=_LLAMA3_HIGH,
            original_max_position_embeddings=_LLAMA3_ORIGINAL,
        )
        wanted = llama3_frequency_divisors(scaling, head_dim, theta)
        if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=1e-4):
            raise ModelLoadError(
                f"{file.path}: rope_freqs.weight is not the scaling of Llama 3.1, not supported"
            )
        return scaling
    if kind == "none":
        return None
    return RopeScaling(rope_type="linear", factor=_number(file, f"{arch}.rope.scaling.factor"))


def llama3_frequency_divisors(
    scaling: RopeScaling, head_dim: int, theta: float
) -> npt.NDArray[np.float64]:
    """What Llama 3.1 divides each rotary frequency by, ``[head_dim / 2]``.

    Wavelengths shorter than original / high_freq_factor keep their frequency, those longer than
    original / low_freq_factor are divided by ``factor``, and between them it is interpolated.
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    result: npt.NDArray[np.float64] = 1.0 / ((1.0 - smooth) / scaling.factor + smooth)
    return result
