"""Tiny GGUF files, written with the ``gguf`` package as llama.cpp's converters write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from tiny_models import CHAT_TEMPLATE, SPECIAL_TOKENS, TINY_MODELS, tiny_tensors, tiny_vocabulary

from refengine.config import ModelConfig
from refengine.models.gguf_config import llama3_frequency_divisors
from refengine.models.model_config import config_from_hf

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
}
TOKEN_TYPE_NORMAL, TOKEN_TYPE_CONTROL, TOKEN_TYPE_USER = 1, 3, 4


def tiny_values(name: str) -> dict[str, Any]:
    """A tiny model's config.json, less what GGUF files cannot say."""
    values = dict(TINY_MODELS[name])
    if name == "llama3_scaling":  # files hold the result, which is known for Llama 3.1 only
        values["rope_scaling"] = {
            **values["rope_scaling"],
            "original_max_position_embeddings": 8192,
        }
        values["rope_theta"] = 500000.0
    if name == "gemma3":  # llama.cpp knows the model's own pattern and scale
        values.update(num_hidden_layers=7, query_pre_attn_scalar=16)
        del values["layer_types"], values["final_logit_softcapping"]
    if name == "qwen2_window_layers":
        values["use_sliding_window"] = False
    return values


def write_tiny_gguf(
    path: Path,
    name: str,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    arch: str | None = None,
    pre: str = "smollm",
    tokenizer_model: str = "gpt2",
    **extra: Any,
) -> dict[str, npt.NDArray[Any]]:
    """Write the tiny model called ``name``; returns its tensors in Hugging Face's names, float32.

    Args:
        path: the file to write.
        name: of ``TINY_MODELS``.
        quantization: of the projections, where their rows allow it.
        arch: another architecture name to write.
        pre: the pre-tokenizer's name.
        tokenizer_model: the tokenizer's kind.
        extra: more metadata, under the architecture's prefix.
    """
    values = tiny_values(name)
    config = config_from_hf(values)
    arch = arch or ARCHITECTURES[config.architecture]
    writer = gguf.GGUFWriter(path, arch)
    _write_numbers(writer, config)
    for key, value in extra.items():
        writer.add_uint32(f"{arch}.{key}", value)
    _write_tokenizer(writer, tokenizer_model, pre)
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[ARCHITECTURES[config.architecture].upper()], config.num_hidden_layers
    )
    tensors = {
        key: tensor.astype(np.float32)
        for key, tensor in tiny_tensors(values, seed=sorted(TINY_MODELS).index(name)).items()
    }
    for key, tensor in tensors.items():
        stored = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert stored is not None, key
        data = tensor
        if ARCHITECTURES[config.architecture] == "llama":
            if ".q_proj." in key:
                data = interleave(tensor, config.num_attention_heads)
            elif ".k_proj." in key:
                data = interleave(tensor, config.num_key_value_heads)
        if config.norm_weight_offset and key.endswith("norm.weight"):
            data = tensor + np.float32(config.norm_weight_offset)
        block = gguf.GGML_QUANT_SIZES[quantization][0]
        if data.ndim == 2 and data.shape[1] % block == 0:
            quantized = gguf.quantize(data, quantization)
            writer.add_tensor(stored, quantized, raw_dtype=quantization)
        else:
            writer.add_tensor(stored, data)
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "llama3":
        divisors = llama3_frequency_divisors(
            config.rope_scaling, config.head_dim, config.rope_theta
        )
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def interleave(tensor: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """Rows of each head from halves to adjacent pairs, one row at a time."""
    head_dim = tensor.shape[0] // num_heads
    rows = []
    for head in range(num_heads):
        for i in range(head_dim // 2):
            rows += [head * head_dim + i, head * head_dim + head_dim // 2 + i]
    return np.ascontiguousarray(tensor[rows])


def _write_numbers(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    windows = [window for window in config.layer_windows if window is not None]
    if windows:
        writer.add_sliding_window(windows[0])
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)


def _write_tokenizer(writer: gguf.GGUFWriter, model: str, pre: str) -> None:
    tokens, merges = tiny_vocabulary()
    types = [TOKEN_TYPE_NORMAL] * len(tokens) + [TOKEN_TYPE_CONTROL] * len(SPECIAL_TOKENS)
    types[len(tokens) - 1] = TOKEN_TYPE_USER
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *SPECIAL_TOKENS])
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(len(tokens))
    writer.add_eos_token_id(len(tokens) + 1)
    writer.add_eot_token_id(len(tokens) + 3)
    writer.add_chat_template(CHAT_TEMPLATE)
