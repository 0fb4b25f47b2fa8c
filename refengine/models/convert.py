"""A GGUF file as a Hugging Face directory, which transformers and other engines load."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from refengine.config import ModelConfig
from refengine.errors import ModelLoadError
from refengine.models.model_config import MODEL_TYPES, load_model_config
from refengine.models.tensor_names import expected_tensors
from refengine.models.tokenizer import Tokenizer
from refengine.models.weights import DTYPES, WeightSource, open_weights

_SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ALIGNMENT = 8


def convert_gguf(
    gguf_path: str | Path, out_dir: str | Path, dtype: str = "float32", *, progress: bool = False
) -> Path:
    """Write a GGUF file's model as a Hugging Face directory.

    config.json, generation_config.json, model.safetensors, tokenizer.json and
    tokenizer_config.json (with the chat template). Tensors pass through memory one at a time.
    config.json comes last, so a directory that holds it is complete.

    Args:
        gguf_path: the file.
        out_dir: made if need be; it must not hold a model yet.
        dtype: of the weights; float32 keeps dequantised values exactly.
        progress: show a bar on standard error.

    Returns:
        The directory.

    Raises:
        ModelLoadError: where the file cannot be read, or the directory not be written.
    """
    gguf_path, out_dir = Path(gguf_path), Path(out_dir)
    if dtype not in DTYPES:
        raise ModelLoadError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not gguf_path.is_file():
        raise ModelLoadError(f"no GGUF file at {gguf_path}")
    if (out_dir / "config.json").exists():
        raise ModelLoadError(f"{out_dir} holds a model already; name another directory")
    config = load_model_config(gguf_path)
    tokenizer = Tokenizer.from_path(gguf_path)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with open_weights(gguf_path, config) as source:
            write_safetensors(
                out_dir / "model.safetensors",
                source,
                expected_tensors(config),
                dtype,
                progress=progress,
            )
        tokenizer.backend.save(str(out_dir / "tokenizer.json"))
        _write_json(out_dir / "tokenizer_config.json", _tokenizer_config(tokenizer, config))
        _write_json(out_dir / "generation_config.json", _token_ids(config, tokenizer))
        _write_json(out_dir / "config.json", to_hf_config(config, dtype))
    except OSError as error:
        raise ModelLoadError(f"cannot write {out_dir}: {error}") from None
    return out_dir


def to_hf_config(config: ModelConfig, dtype: str | None = None) -> dict[str, Any]:
    """config.json's object for a ModelConfig, with the keys of transformers 4, which 5 reads too.

    Raises:
        ModelLoadError: where Hugging Face's architecture has no key for something in it.
    """
    architecture = config.architecture
    model_types = {name: model_type for model_type, name in MODEL_TYPES.items()}
    gemma = architecture.startswith("Gemma3")
    values: dict[str, Any] = {
        # A model with a vision tower is written as its text half.
        "architectures": ["Gemma3ForCausalLM" if gemma else architecture],
        "model_type": "gemma3_text" if gemma else model_types[architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling(config),
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": _one_or_list(config.eos_token_ids),
        "torch_dtype": dtype or config.dtype,
    }
    if gemma:
        values["hidden_activation"] = config.hidden_act
        values["rope_local_base_freq"] = config.rope_local_theta
        values["query_pre_attn_scalar"] = round(config.scale**-2)
        values["attn_logit_softcapping"] = config.attention_logits_soft_cap
        values["final_logit_softcapping"] = config.final_logits_soft_cap
    else:
        values["hidden_act"] = config.hidden_act
    if config.attention_bias != config.attention_output_bias and architecture in (
        "LlamaForCausalLM",
        "Qwen3ForCausalLM",
    ):
        raise ModelLoadError(
            f"{architecture} has biases on all projections of attention or on none, this model on "
            "some; it cannot be written for Hugging Face"
        )
    if architecture != "Qwen2ForCausalLM":
        values["attention_bias"] = config.attention_bias
    values.update(_windows(config))
    return values


def write_safetensors(
    path: Path,
    source: WeightSource,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    *,
    progress: bool = False,
) -> None:
    """Write tensors to a safetensors file, reading them one at a time.

    The library's writer wants all of them in memory. The format (safetensors' README): the header's
    length as 8 little-endian bytes, a JSON header padded with spaces, the tensors.
    """
    numpy_dtype = np.dtype(DTYPES[dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * numpy_dtype.itemsize
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    unfinished = path.with_name(path.name + ".unfinished")
    names: Iterable[str] = tqdm(shapes, desc="Writing weights", unit="tensor", disable=not progress)
    try:
        with unfinished.open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for name in names:
                tensor = np.ascontiguousarray(source.read(name).astype(numpy_dtype, copy=False))
                file.write(tensor.reshape(-1).view(np.uint8).data)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, ensure_ascii=False, indent=2) + "\n"
    path.write_text(text, encoding="utf-8")


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    return list(ids) if len(ids) > 1 else ids[0] if ids else None


def _token_ids(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json: which ids begin, end and pad a text."""
    values = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": _one_or_list(config.eos_token_ids),
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {key: value for key, value in values.items() if value is not None}


def _tokenizer_config(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """tokenizer_config.json; the plain class leaves tokenizer.json's rules as they are."""
    values: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        **tokenizer.special_tokens,
    }
    if isinstance(tokenizer.chat_template, str):
        values["chat_template"] = tokenizer.chat_template
    return values


def _rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    values: dict[str, Any] = {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling.rope_type == "llama3":
        values["low_freq_factor"] = scaling.low_freq_factor
        values["high_freq_factor"] = scaling.high_freq_factor
        values["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    return values


def _windows(config: ModelConfig) -> dict[str, Any]:
    """The keys of each family that give ``config.layer_windows``."""
    windows = config.layer_windows
    found = {window for window in windows if window is not None}
    if config.architecture == "LlamaForCausalLM":
        if found:
            raise ModelLoadError("LlamaForCausalLM has no windows; this model's config has some")
        return {}
    if len(found) > 1:
        raise ModelLoadError(f"windows of several sizes ({sorted(found)}) cannot be written")
    window = found.pop() if found else None
    if config.architecture == "MistralForCausalLM":
        return {"sliding_window": window}
    kinds = ["full_attention" if w is None else "sliding_attention" for w in windows]
    values: dict[str, Any] = {
        "sliding_window": window,
        "layer_types": kinds or ["full_attention"] * config.num_hidden_layers,
    }
    if config.architecture.startswith("Qwen"):
        values["use_sliding_window"] = window is not None
    return values
