"""The decoder's weights in the layout that a backend computes with.

Tensors are read one at a time and written straight into their final place, so that a model is in
memory once: one stacked array for each kind of matrix, ``[num_layers, ...]``, of which a layer's
weight is a view.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from refengine.config import ModelConfig
from refengine.execution.kernels import Array, KernelSet
from refengine.reference.rotary import build_cos_sin_cache

Tensor = npt.NDArray[Any]


class WeightSource(Protocol):
    """Where tensors come from: safetensors, GGUF, or random numbers; Hugging Face's names."""

    def read(self, name: str) -> Tensor:
        """One tensor, checked against its expected shape."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's weights; matrices are ``[out, in]`` in the backend's layout."""

    qkv: Any  # [(Q + 2K) * D, H]: query, key and value projections, one below the other
    o: Any  # [H, Q * D]
    gate_up: Any  # [2 * I, H]
    down: Any  # [H, I]
    input_norm: Array  # [H]
    pre_mlp_norm: Array  # [H]
    qkv_bias: Array | None = None  # [(Q + 2K) * D]
    o_bias: Array | None = None  # [H]
    q_norm: Array | None = None  # [D]
    k_norm: Array | None = None  # [D]
    post_attention_norm: Array | None = None  # [H], of the sublayer's result (Gemma)
    post_mlp_norm: Array | None = None  # [H], likewise


@dataclass(slots=True)
class DecoderWeights:
    """All weights of a decoder.

    The stacks are what the backend's ``allocate_weights`` gave; ``layers`` are views into them.
    """

    embedding: Any  # [V, H]
    lm_head: Any  # [V, H]; the embedding itself where they are tied
    final_norm: Array  # [H]
    cos_sin_cache: Array  # [max_model_len, D] float32: cosines, then sines
    local_cos_sin_cache: Array | None  # for windowed layers with a rotary base of their own
    qkv: Any
    o: Any
    gate_up: Any
    down: Any
    layers: list[LayerWeights] = field(default_factory=list)


def load_decoder_weights(
    config: ModelConfig,
    source: WeightSource,
    kernels: KernelSet,
    *,
    dtype: str,
    max_model_len: int,
    progress: Iterable[int] | None = None,
) -> DecoderWeights:
    """Read a model's tensors into a backend's layout.

    Args:
        config: the model's numbers.
        source: gives tensors by their Hugging Face names.
        kernels: the backend.
        dtype: "float32", "bfloat16" or "float16": what matrices are stored as.
        max_model_len: positions that rotary tables are built for.
        progress: the layers' numbers, wrapped in a progress bar.

    Raises:
        ModelLoadError: where a tensor is missing or has another shape.
    """
    hidden, head_dim, width = config.hidden_size, config.head_dim, config.intermediate_size
    q_size = config.num_attention_heads * head_dim
    kv_size = config.num_key_value_heads * head_dim
    count = config.num_hidden_layers

    def norm(name: str) -> Array:
        return kernels.store_vector(
            source.read(name).astype(np.float32) + config.norm_weight_offset
        )

    def vectors(*names: str) -> Array:
        return kernels.store_vector(np.concatenate([source.read(n) for n in names]))

    # 1 Embedding and output layer; tied, they are one matrix.
    embedding = kernels.allocate_weights(1, config.vocab_size, hidden, dtype)
    kernels.store_weight(embedding, 0, source.read("model.embed_tokens.weight"))
    lm_head = embedding
    if not config.tie_word_embeddings:
        lm_head = kernels.allocate_weights(1, config.vocab_size, hidden, dtype)
        kernels.store_weight(lm_head, 0, source.read("lm_head.weight"))
    weights = DecoderWeights(
        embedding=embedding[0],
        lm_head=lm_head[0],
        final_norm=norm("model.norm.weight"),
        cos_sin_cache=_cos_sin(config, kernels, max_model_len, local=False),
        local_cos_sin_cache=None
        if config.rope_local_theta is None
        else _cos_sin(config, kernels, max_model_len, local=True),
        qkv=kernels.allocate_weights(count, q_size + 2 * kv_size, hidden, dtype),
        o=kernels.allocate_weights(count, hidden, q_size, dtype),
        gate_up=kernels.allocate_weights(count, 2 * width, hidden, dtype),
        down=kernels.allocate_weights(count, hidden, width, dtype),
    )
    # 2 Layer by layer. Projections that read the same input become one matrix.
    for index in range(count) if progress is None else progress:
        at = f"model.layers.{index}"
        attention, mlp = f"{at}.self_attn", f"{at}.mlp"
        qkv = [source.read(f"{attention}.{part}_proj.weight") for part in "qkv"]
        kernels.store_weight(weights.qkv, index, np.concatenate(qkv))
        kernels.store_weight(weights.o, index, source.read(f"{attention}.o_proj.weight"))
        gate_up = [source.read(f"{mlp}.{part}_proj.weight") for part in ("gate", "up")]
        kernels.store_weight(weights.gate_up, index, np.concatenate(gate_up))
        kernels.store_weight(weights.down, index, source.read(f"{mlp}.down_proj.weight"))
        # Gemma's "post_attention_layernorm" is applied to the attention's result; everyone else's
        # is the norm before the MLP.
        before_mlp = (
            "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
        )
        biases = tuple(f"{attention}.{part}_proj.bias" for part in "qkv")
        weights.layers.append(
            LayerWeights(
                qkv=weights.qkv[index],
                o=weights.o[index],
                gate_up=weights.gate_up[index],
                down=weights.down[index],
                input_norm=norm(f"{at}.input_layernorm.weight"),
                pre_mlp_norm=norm(f"{at}.{before_mlp}.weight"),
                qkv_bias=vectors(*biases) if config.attention_bias else None,
                o_bias=vectors(f"{attention}.o_proj.bias")
                if config.attention_output_bias
                else None,
                q_norm=norm(f"{attention}.q_norm.weight") if config.qk_norm else None,
                k_norm=norm(f"{attention}.k_norm.weight") if config.qk_norm else None,
                post_attention_norm=norm(f"{at}.post_attention_layernorm.weight")
                if config.post_norms
                else None,
                post_mlp_norm=norm(f"{at}.post_feedforward_layernorm.weight")
                if config.post_norms
                else None,
            )
        )
    return weights


def _cos_sin(config: ModelConfig, kernels: KernelSet, positions: int, *, local: bool) -> Array:
    """Rotary tables, ``[positions, D]`` float32."""
    scaling = None if local else config.rope_scaling
    theta = config.rope_local_theta if local else config.rope_theta
    return kernels.store_vector(
        build_cos_sin_cache(config.head_dim, positions, float(theta or 0.0), scaling)
    )
