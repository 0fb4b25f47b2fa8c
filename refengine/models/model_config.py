"""Hugging Face's config.json to and from ModelConfig: one decoder described by numbers.

Key names and defaults are those of transformers' configuration classes for each architecture.
(GGUF metadata: gguf_config.py.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from refengine.config import ModelConfig, RopeScaling
from refengine.errors import ModelLoadError

# Defaults that count where config.json leaves a key out; checkpoints rely on them.
_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_QWEN: dict[str, Any] = {
    **_COMMON,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA3: dict[str, Any] = {
    **_COMMON,
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10000.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": _COMMON,
    "MistralForCausalLM": {
        **_COMMON,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "Qwen2ForCausalLM": _QWEN,
    "Qwen3ForCausalLM": {**_QWEN, "head_dim": 128},
    "Gemma3ForCausalLM": _GEMMA3,
    # The text half of the model with a vision tower: its numbers lie under text_config.
    "Gemma3ForConditionalGeneration": _GEMMA3,
}
MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
}
DTYPES = ("float32", "float16", "bfloat16")
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_tanh": "gelu_pytorch_tanh",
    "gelu_new": "gelu_pytorch_tanh",
}


def load_model_config(path: str | Path) -> ModelConfig:
    """Read what a model is from its directory (config.json) or its GGUF file.

    Raises:
        ModelLoadError: where the files are missing, damaged, or of a model that this engine does
            not run.
    """
    path = Path(path)
    if path.is_file():
        from refengine.models.gguf_config import config_from_metadata
        from refengine.models.gguf_file import GGUFFile

        with GGUFFile(path) as file:
            return config_from_metadata(file)
    if not path.is_dir():
        raise ModelLoadError(f"no model at {path}: neither a directory nor a GGUF file")
    values = read_json_object(path / "config.json")
    generation_path = path / "generation_config.json"
    generation = read_json_object(generation_path) if generation_path.exists() else {}
    return config_from_hf(values, generation, where=str(path / "config.json"))


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file whose top is an object.

    Raises:
        ModelLoadError: where the file is missing or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(
            f"{path.parent} holds no {path.name}; a model directory needs config.json, "
            "tokenizer.json and safetensors files"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"cannot read {path}: {error}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ModelLoadError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ModelLoadError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


class _Fields:
    """Checked access to config.json's keys, with an architecture's defaults behind them."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
        self.values, self.defaults, self.where = values, defaults, where

    def fail(self, key: str, value: object, wanted: str) -> NoReturn:
        raise ModelLoadError(f"{self.where}: {key} must be {wanted}, got {value!r}")

    def get(self, key: str, default: Any = None) -> Any:
        return self.values[key] if key in self.values else self.defaults.get(key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer; a missing or null key takes the default."""
        value = self.values.get(key)
        value = self.defaults.get(key, default) if value is None else value
        if value is None:
            raise ModelLoadError(f"{self.where} lacks {key}, which must be a positive integer")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.fail(key, value, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive, finite number; a missing or null key takes the default."""
        value = self.values.get(key)
        value = self.defaults.get(key, default) if value is None else value
        if (
            not isinstance(value, (int, float))
            or isinstance(value, bool)
            or not 0.0 < value < float("inf")
        ):
            self.fail(key, value, "a positive number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def boolean(self, key: str) -> bool:
        value = self.get(key, False)
        if value is None:
            return False
        if not isinstance(value, bool):
            self.fail(key, value, "true or false")
        return value


def config_from_hf(
    values: Mapping[str, Any],
    generation: Mapping[str, Any] | None = None,
    where: str = "config.json",
) -> ModelConfig:
    """Turn config.json's object into a ModelConfig.

    Args:
        values: config.json's object, as transformers 4 or 5 writes it.
        generation: generation_config.json's object; its end-of-sequence ids come before the
            config's own, as in transformers' ``generate``.
        where: what error messages call the file.

    Raises:
        ModelLoadError: names the key that is missing, wrong or not supported.
    """
    architecture = _architecture(values, where)
    if architecture == "Gemma3ForConditionalGeneration":
        text = values.get("text_config")
        if not isinstance(text, dict):
            raise ModelLoadError(f"{where}: text_config must be an object, got {text!r}")
        inherited = ("dtype", "torch_dtype", "eos_token_id", "bos_token_id", "quantization_config")
        values = {**{k: values[k] for k in inherited if k in values}, **text}
    fields = _Fields(values, DEFAULTS[architecture], where)
    _refuse_unsupported(fields)

    num_layers = fields.integer("num_hidden_layers")
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    hidden_size = fields.integer("hidden_size")
    head_dim = fields.integer("head_dim", hidden_size // num_heads or None)
    if num_heads % num_kv_heads:
        fields.fail("num_key_value_heads", num_kv_heads, f"a divisor of {num_heads} query heads")
    if head_dim % 2:
        fields.fail("head_dim", head_dim, "even, since rotary embeddings turn pairs")
    # Gemma's configs name the activation hidden_activation; hidden_act there is an older alias.
    act = fields.values.get("hidden_activation") or fields.get("hidden_act")
    if act not in ACTIVATIONS:
        fields.fail("hidden_act", act, f"one of {', '.join(ACTIVATIONS)}")
    theta, scaling, local_theta = _rope(fields, gemma=architecture.startswith("Gemma3"))
    generation_eos = (generation or {}).get("eos_token_id")
    eos = fields.get("eos_token_id") if generation_eos is None else generation_eos
    bos = fields.get("bos_token_id")
    dtype = str(fields.get("dtype") or fields.get("torch_dtype") or "float32")
    dtype = dtype.removeprefix("torch.")
    if dtype not in DTYPES:
        fields.fail("dtype", dtype, f"one of {', '.join(DTYPES)}")
    switches: dict[str, Any] = {
        "attention_bias": fields.boolean("attention_bias"),
        "attention_output_bias": fields.boolean("attention_bias"),
    }
    if architecture == "Qwen2ForCausalLM":
        switches = {"attention_bias": True}
    elif architecture == "MistralForCausalLM":
        switches = {}
    elif architecture == "Qwen3ForCausalLM":
        switches["qk_norm"] = True
    elif architecture.startswith("Gemma3"):
        switches.update(
            qk_norm=True,
            post_norms=True,
            norm_weight_offset=1.0,
            embedding_multiplier=float(hidden_size) ** 0.5,
            attention_scale=fields.number("query_pre_attn_scalar") ** -0.5,
            attention_logits_soft_cap=fields.optional_number("attn_logit_softcapping"),
            final_logits_soft_cap=fields.optional_number("final_logit_softcapping"),
        )
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=fields.integer("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        rope_local_theta=local_theta,
        tie_word_embeddings=fields.boolean("tie_word_embeddings"),
        hidden_act=ACTIVATIONS[act],
        layer_windows=_layer_windows(fields, architecture, num_layers),
        bos_token_id=bos if isinstance(bos, int) else None,
        eos_token_ids=_token_ids(fields, eos),
        dtype=dtype,
        **switches,
    )


def _architecture(values: Mapping[str, Any], where: str) -> str:
    """The supported architecture that config.json names."""
    names = values.get("architectures")
    if names:
        name = names[0] if isinstance(names, list) else names
    else:
        name = MODEL_TYPES.get(str(values.get("model_type")), values.get("model_type"))
    if name not in DEFAULTS:
        raise ModelLoadError(
            f"{where}: architecture {name!r} is not one that refengine runs; "
            f"supported: {', '.join(DEFAULTS)}"
        )
    return str(name)


def _refuse_unsupported(fields: _Fields) -> None:
    """Raise where the config asks for something that would silently give wrong text."""
    quantization = fields.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ModelLoadError(
            f"{fields.where}: weights quantised by {method or 'quantization_config'} are not "
            "supported; use the original checkpoint or a GGUF file"
        )
    for key in ("mlp_bias", "use_bidirectional_attention"):
        if fields.boolean(key):
            raise ModelLoadError(f"{fields.where}: {key} is not supported")
    factor = fields.get("partial_rotary_factor")
    if factor is not None and factor != 1.0:
        raise ModelLoadError(f"{fields.where}: partial_rotary_factor {factor} is not supported")


def _rope(fields: _Fields, *, gemma: bool) -> tuple[float, RopeScaling | None, float | None]:
    """Rotary base, its scaling, and the base of windowed layers, from either layout of the keys.

    transformers 4 writes ``rope_theta``, ``rope_scaling`` (and ``rope_local_base_freq``);
    transformers 5 writes one ``rope_parameters``, nested by layer type for Gemma 3.
    """
    parameters = fields.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        fields.fail("rope_parameters", parameters, "an object")
    nested = "full_attention" in parameters or "sliding_attention" in parameters
    full = parameters.get("full_attention") or {} if nested else parameters
    full = {**full, **(fields.get("rope_scaling") or {})}
    rope = _Fields(full, {}, f"{fields.where}: rope parameters")
    theta = rope.number("rope_theta", fields.number("rope_theta"))
    local = None
    if gemma:
        sliding = parameters.get("sliding_attention") or {} if nested else {}
        local = _Fields(sliding, {}, rope.where).number(
            "rope_theta", fields.number("rope_local_base_freq")
        )
    return theta, _rope_scaling(rope, fields), local


def _rope_scaling(rope: _Fields, fields: _Fields) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(rope_type=kind, factor=rope.number("factor"))
    if kind == "llama3":
        return RopeScaling(
            rope_type=kind,
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_position_embeddings=rope.integer("original_max_position_embeddings"),
        )
    rope.fail("rope_type", kind, "default, linear or llama3")


def _layer_windows(fields: _Fields, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    """One window (or None) a layer; () where every layer attends to everything."""
    if architecture == "LlamaForCausalLM":
        return ()
    window = fields.get("sliding_window")
    qwen = architecture.startswith("Qwen")
    if window is None or (qwen and not fields.boolean("use_sliding_window")):
        return ()
    window = fields.integer("sliding_window")
    types = None if architecture == "MistralForCausalLM" else fields.get("layer_types")
    if types is not None:
        known = {"sliding_attention": window, "full_attention": None}
        if not isinstance(types, list) or len(types) != num_layers or set(types) - set(known):
            fields.fail("layer_types", types, f"{num_layers} of {', '.join(known)}")
        windows = tuple(known[kind] for kind in types)
    elif qwen:
        first = fields.get("max_window_layers")
        windows = tuple(window if i >= first else None for i in range(num_layers))
    elif architecture == "MistralForCausalLM":
        windows = (window,) * num_layers
    else:  # Gemma 3: every sixth layer attends to everything
        pattern = fields.integer("sliding_window_pattern")
        windows = tuple(window if (i + 1) % pattern else None for i in range(num_layers))
    return windows if any(w is not None for w in windows) else ()


def _token_ids(fields: _Fields, value: object) -> tuple[int, ...]:
    """An id, a list of ids or nothing, as a tuple."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        fields.fail("eos_token_id", value, "a token id or a list of them")
    return tuple(ids)
