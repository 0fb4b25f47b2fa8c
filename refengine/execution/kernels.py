"""KernelSet: the functions that a backend gives the decoder, one contract for all of them.

Arrays are NumPy arrays on ``reference`` and ``cpu`` and torch tensors on ``cuda``; ``Array`` stands
for either. Activations are float32 on ``reference`` and ``cpu``, and the model's dtype on ``cuda``.
"""

from __future__ import annotations

from typing import Any, Protocol

Array = Any


class KernelSet(Protocol):
    """What ``reference/``, ``refengine/cpu/`` and ``cuda/`` each offer, under the same names."""

    name: str

    def empty(self, shape: tuple[int, ...]) -> Array:
        """An uninitialised array for activations."""

    def allocate_cache(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str,
    ) -> tuple[Array, Array]:
        """Zeroed ``[num_layers, num_blocks, block_size, num_kv_heads, head_dim]``, twice."""

    def allocate_host_cache(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str,
    ) -> tuple[Array, Array]:
        """The same in host memory, for blocks of preempted requests (pinned, beside a GPU)."""

    def allocate_weights(self, count: int, out_features: int, in_features: int, dtype: str) -> Any:
        """Room for ``count`` matrices in the layout that ``linear`` multiplies fastest.

        Indexing the result with a layer's number gives that layer's weight.
        """

    def store_weight(self, weights: Any, index: int, weight: Array) -> None:
        """Put one ``[out, in]`` matrix into its place."""

    def store_vector(self, vector: Array) -> Array:
        """A norm weight, bias or table (any shape), in the dtype that the kernels read it in."""

    def embedding(self, token_ids: Array, weight: Any, out: Array) -> None:
        """``out[t] = weight[token_ids[t]]``, from the layout that ``store_weight`` wrote."""

    def linear(self, x: Array, weight: Any, bias: Array | None, out: Array) -> None:
        """``out[t, o] = sum_i x[t, i] * weight[o, i] + bias[o]``."""

    def rms_norm(self, x: Array, weight: Array, eps: float, out: Array) -> None:
        """Normalise the last axis; ``out`` may be ``x``."""

    def fused_add_rms_norm(
        self, x: Array, residual: Array, weight: Array, eps: float, out: Array
    ) -> None:
        """``residual += x``, then ``out = rms_norm(residual)``."""

    def rotary_embedding(
        self, positions: Array, query: Array, key: Array, cos_sin_cache: Array
    ) -> None:
        """Rotate query and key heads in place, halves paired (GPT-NeoX style)."""

    def silu_and_mul(self, x: Array, out: Array) -> None:
        """``out = silu(x[:, :d]) * x[:, d:]``."""

    def gelu_tanh_and_mul(self, x: Array, out: Array) -> None:
        """``out = gelu_tanh(x[:, :d]) * x[:, d:]``."""

    def soft_cap(self, x: Array, cap: float) -> None:
        """``x = cap * tanh(x / cap)``, in place."""

    def write_kv(
        self,
        key: Array,
        value: Array,
        key_cache: Array,
        value_cache: Array,
        slot_mapping: Array,
    ) -> None:
        """Scatter new keys and values into their slots; slot -1 is skipped."""

    def paged_attention(
        self,
        query: Array,
        key_cache: Array,
        value_cache: Array,
        block_tables: Array,
        seq_lens: Array,
        query_start_loc: Array,
        scale: float,
        sliding_window: int | None,
        logits_soft_cap: float | None,
        out: Array,
    ) -> None:
        """Causal attention of each sequence's newest tokens over its pages."""

    def copy_blocks(self, key_caches: Array, value_caches: Array, block_mapping: Array) -> None:
        """Copy whole blocks inside every layer's cache."""

    def swap_blocks(
        self,
        source_key_caches: Array,
        source_value_caches: Array,
        destination_key_caches: Array,
        destination_value_caches: Array,
        block_mapping: Array,
    ) -> None:
        """Copy whole blocks from one set of caches to another (device to host, or back)."""
