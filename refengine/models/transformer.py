"""The decoder: one forward pass over a flat batch of tokens, written once for every backend.

Llama, Mistral, Qwen2, Qwen3 and Gemma 3 differ in a handful of switches (``ModelConfig``), not in
structure, so there is one class. What differs between machines is the ``KernelSet``: NumPy,
Numba or CUDA functions of the same names.

Shapes: T tokens in the batch, S sequences, R rows that sample, H hidden size, D head_dim,
Q query heads, K key-value heads, I intermediate size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refengine.config import ModelConfig
from refengine.execution.kernels import Array, KernelSet
from refengine.models.decoder_weights import DecoderWeights, LayerWeights

if TYPE_CHECKING:
    from refengine.execution.batch import BatchArrays


class Transformer:
    """A decoder-only transformer over a paged KV cache.

    Args:
        config: the model's numbers.
        weights: its weights, laid out by ``kernels``.
        kernels: the backend's functions.
    """

    def __init__(self, config: ModelConfig, weights: DecoderWeights, kernels: KernelSet) -> None:
        self.config = config
        self.weights = weights
        self.kernels = kernels
        activations = {"silu": kernels.silu_and_mul, "gelu_pytorch_tanh": kernels.gelu_tanh_and_mul}
        self.activation_and_mul = activations[config.hidden_act]

    def forward(self, batch: BatchArrays, key_caches: Array, value_caches: Array) -> Array:
        """Run every layer, writing the new keys and values into the cache.

        Args:
            batch: the step's flat arrays.
            key_caches: ``[num_layers, num_blocks, block_size, K, D]``.
            value_caches: the same shape.

        Returns:
            Hidden states after the final norm, ``[T, H]``.
        """
        config, kernels, weights = self.config, self.kernels, self.weights
        num_tokens = batch.token_ids.shape[0]
        # 1 Token ids to vectors. The residual stream runs through all layers.
        residual = kernels.empty((num_tokens, config.hidden_size))  # [T, H]
        kernels.embedding(batch.token_ids, weights.embedding, residual)
        if config.embedding_multiplier != 1.0:
            residual *= config.embedding_multiplier
        # 2 Each layer reads the normalised stream and adds to it. A sublayer's addition and the
        #   next norm are one kernel, so x is always "what the next sublayer reads".
        x = kernels.empty((num_tokens, config.hidden_size))  # [T, H]
        kernels.rms_norm(residual, weights.layers[0].input_norm, config.rms_norm_eps, x)
        for index, layer in enumerate(weights.layers):
            attention = self._attention(
                x, layer, index, batch, key_caches[index], value_caches[index]
            )  # [T, H]
            self._add_and_norm(
                attention, residual, layer.post_attention_norm, layer.pre_mlp_norm, x
            )
            mlp = self._mlp(x, layer)  # [T, H]
            last = index + 1 == len(weights.layers)
            next_norm = weights.final_norm if last else weights.layers[index + 1].input_norm
            self._add_and_norm(mlp, residual, layer.post_mlp_norm, next_norm, x)
        return x

    def logits(self, hidden: Array) -> Array:
        """Scores of every vocabulary entry, ``[R, H]`` to ``[R, V]`` float32."""
        out = self.kernels.empty((hidden.shape[0], self.config.vocab_size))
        self.kernels.linear(hidden, self.weights.lm_head, None, out)
        cap = self.config.final_logits_soft_cap
        if cap is not None:
            self.kernels.soft_cap(out, cap)
        return out

    def _attention(
        self,
        x: Array,
        layer: LayerWeights,
        index: int,
        batch: BatchArrays,
        key_cache: Array,
        value_cache: Array,
    ) -> Array:
        """Project, rotate, write to the cache, attend over the pages, project back."""
        config, kernels = self.config, self.kernels
        num_tokens, head_dim = x.shape[0], config.head_dim
        num_q, num_kv = config.num_attention_heads, config.num_key_value_heads
        # 1 One product gives query, key and value side by side.
        qkv = kernels.empty((num_tokens, (num_q + 2 * num_kv) * head_dim))  # [T, (Q + 2K) D]
        kernels.linear(x, layer.qkv, layer.qkv_bias, qkv)
        heads = qkv.reshape(num_tokens, num_q + 2 * num_kv, head_dim)
        query = heads[:, :num_q]  # [T, Q, D]
        key = heads[:, num_q : num_q + num_kv]  # [T, K, D]
        value = heads[:, num_q + num_kv :]  # [T, K, D]
        # 2 Positions enter by rotation (Qwen3 and Gemma normalise each head first).
        if layer.q_norm is not None and layer.k_norm is not None:
            kernels.rms_norm(query, layer.q_norm, config.rms_norm_eps, query)
            kernels.rms_norm(key, layer.k_norm, config.rms_norm_eps, key)
        windowed = config.window(index) is not None
        local = windowed and self.weights.local_cos_sin_cache is not None
        cos_sin = self.weights.local_cos_sin_cache if local else self.weights.cos_sin_cache
        kernels.rotary_embedding(batch.positions, query, key, cos_sin)
        # 3 Write this step's keys and values first: the new tokens attend to each other too.
        kernels.write_kv(key, value, key_cache, value_cache, batch.slot_mapping)
        out = kernels.empty((num_tokens, num_q, head_dim))  # [T, Q, D]
        kernels.paged_attention(
            query,
            key_cache,
            value_cache,
            batch.block_tables,
            batch.seq_lens,
            batch.query_start_loc,
            config.scale,
            config.window(index),
            config.attention_logits_soft_cap,
            out,
        )
        projected = kernels.empty((num_tokens, config.hidden_size))  # [T, H]
        kernels.linear(out.reshape(num_tokens, num_q * head_dim), layer.o, layer.o_bias, projected)
        return projected

    def _mlp(self, x: Array, layer: LayerWeights) -> Array:
        """``down(act(gate(x)) * up(x))``, with gate and up as one product."""
        kernels, width = self.kernels, self.config.intermediate_size
        gate_up = kernels.empty((x.shape[0], 2 * width))  # [T, 2 I]
        kernels.linear(x, layer.gate_up, None, gate_up)
        gated = kernels.empty((x.shape[0], width))  # [T, I]
        self.activation_and_mul(gate_up, gated)
        out = kernels.empty((x.shape[0], self.config.hidden_size))  # [T, H]
        kernels.linear(gated, layer.down, None, out)
        return out

    def _add_and_norm(
        self, x: Array, residual: Array, own_norm: Any, next_norm: Array, out: Array
    ) -> None:
        """Add a sublayer's result to the stream and normalise it for the next sublayer."""
        if own_norm is not None:  # Gemma normalises a sublayer's result before adding it
            self.kernels.rms_norm(x, own_norm, self.config.rms_norm_eps, x)
        self.kernels.fused_add_rms_norm(x, residual, next_norm, self.config.rms_norm_eps, out)
