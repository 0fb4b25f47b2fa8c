"""The CPU's fast decoder: a whole step, all layers, in one call of one compiled function.

``Transformer`` calls some 300 kernels a step from Python; for a small model that takes as long as
reading its weights. ``DecoderStep`` computes the same, with the same bits, at a call's cost. Here
are its buffers and checks; what the threads do is in decoder_worker.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numpy as np

from refengine.config import ModelConfig
from refengine.cpu.activation import soft_cap
from refengine.cpu.arrays import Array, aligned_empty, bits
from refengine.cpu.attention_plan import UNLIMITED
from refengine.cpu.attention_tile import TILE_KEYS, attend_address, scratch_size, tile_tokens
from refengine.cpu.decoder_launch import BAD_POSITION, BAD_SEQUENCE, BAD_SLOT, FITS, launch
from refengine.cpu.decoder_layout import PARTS, STEP
from refengine.cpu.decoder_worker import num_stages, worker_address
from refengine.cpu.linear import linear
from refengine.cpu.matrix_product import block_kernel
from refengine.cpu.memory import empty
from refengine.cpu.simd import LANES
from refengine.cpu.team import SPACING
from refengine.cpu.words import word_dtype
from refengine.reference.validation import (
    check_positions,
    check_sequences,
    check_shape,
    check_slots,
)

if TYPE_CHECKING:
    from refengine.execution.batch import BatchArrays
    from refengine.models.decoder_weights import DecoderWeights

_SMALLEST_CAPACITY = 16


class DecoderStep:
    """A decoder over a paged KV cache, of the same results as ``Transformer``.

    Args:
        config: the model's numbers.
        weights: its weights, from ``load_decoder_weights`` with the CPU's kernels.

    Not for several threads at once: buffers are kept from call to call.
    """

    def __init__(self, config: ModelConfig, weights: DecoderWeights) -> None:
        self.config = config
        self.weights = weights
        self.capacity = 0  # tokens that the buffers hold
        self.workers = 0
        panels = weights.embedding.panels
        self._embedding = panels.reshape(-1)
        self._words_dtype = word_dtype(panels.dtype)
        self._worker = worker_address(panels.dtype, self._words_dtype)
        self._step = np.zeros(1, STEP)
        self._kept: dict[str, Array] = {}  # arrays that the record names by address
        self._set(
            num_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            width=config.intermediate_size,
            q_heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rotary_dim=weights.cos_sin_cache.shape[1],
            gelu=config.hidden_act == "gelu_pytorch_tanh",
            block_kernel=block_kernel(panels.dtype, self._words_dtype),
            attend=attend_address(panels.dtype),
            scale=config.scale,
            soft_cap=config.attention_logits_soft_cap or 0.0,
            eps=config.rms_norm_eps,
            embedding_multiplier=config.embedding_multiplier,
        )
        self._set_weights()
        self._stages = np.zeros(num_stages(config.num_hidden_layers) * SPACING, np.int64)
        self._ticks = np.zeros(len(PARTS), np.int64)
        self._keep(stages=self._stages, ticks=self._ticks)

    def forward(self, batch: BatchArrays, key_caches: Array, value_caches: Array) -> Array:
        """Run every layer, writing the new keys and values into the cache.

        Args:
            batch: the step's flat arrays.
            key_caches: ``[num_layers, num_blocks, block_size, K, D]``, contiguous, of the weights'
                dtype.
            value_caches: the same shape.

        Returns:
            Hidden states after the final norm, ``[T, H]`` float32.

        Raises:
            ValueError: where the batch or the caches do not fit the model or each other.
        """
        num_tokens, num_seqs = batch.token_ids.shape[0], batch.seq_lens.shape[0]
        out = np.empty((num_tokens, self.config.hidden_size), np.float32)
        if num_tokens == 0:
            return out
        workers = numba.get_num_threads()
        self._check(batch, key_caches, value_caches)
        self._make_room(num_tokens, num_seqs, workers)
        code = launch(
            self._worker,
            self._step,
            self._embedding,
            self._words,
            np.ascontiguousarray(batch.token_ids, np.int64),
            np.ascontiguousarray(batch.positions, np.int64),
            np.ascontiguousarray(batch.slot_mapping, np.int64),
            np.ascontiguousarray(batch.block_tables, np.int32),
            np.ascontiguousarray(batch.seq_lens, np.int32),
            np.ascontiguousarray(batch.query_start_loc, np.int32),
            bits(key_caches),
            bits(value_caches),
            self._kept["items"],
            self._stages,
            out,
            self.config.vocab_size,
            self.weights.cos_sin_cache.shape[0],
            self._widest_window,
            workers,
        )
        if code != FITS:
            self._explain(code, batch, key_caches)
        return out

    def logits(self, hidden: Array) -> Array:
        """Scores of every vocabulary entry, ``[R, H]`` to ``[R, V]`` float32."""
        out = empty((hidden.shape[0], self.config.vocab_size))
        linear(hidden, self.weights.lm_head, None, out)
        if self.config.final_logits_soft_cap is not None:
            soft_cap(out, self.config.final_logits_soft_cap)
        return out

    def part_shares(self) -> dict[str, float]:
        """Each part's share of all time spent in ``forward`` since the last call of this."""
        total = max(1, int(self._ticks.sum()))
        shares = {part: int(t) / total for part, t in zip(PARTS, self._ticks, strict=True)}
        self._ticks[:] = 0
        return shares

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            self._step[name] = value

    def _keep(self, **arrays: Array) -> None:
        """Enter arrays' addresses into the record, and keep the arrays alive."""
        for name, array in arrays.items():
            self._kept[name] = array
            self._step[name] = array.ctypes.data

    def _set_weights(self) -> None:
        """Enter stacked matrices by address; gather norms and biases into one array."""
        config, weights = self.config, self.weights
        layers = weights.layers
        # 1 Matrices.
        matrices = {name: getattr(weights, name).panels for name in ("qkv", "o", "gate_up", "down")}
        self._keep(**matrices)
        # 2 Vectors: [num_layers, ...] each, one behind the other.
        parts: list[Array] = []
        offsets: dict[str, int] = {}
        end = 0
        stacks: dict[str, list[Array | None]] = {
            "input_norm_at": [layer.input_norm for layer in layers] + [weights.final_norm],
            "pre_mlp_norm_at": [layer.pre_mlp_norm for layer in layers],
            "post_attention_norm_at": [layer.post_attention_norm for layer in layers],
            "post_mlp_norm_at": [layer.post_mlp_norm for layer in layers],
            "q_norm_at": [layer.q_norm for layer in layers],
            "k_norm_at": [layer.k_norm for layer in layers],
            "qkv_bias_at": [layer.qkv_bias for layer in layers],
            "o_bias_at": [layer.o_bias for layer in layers],
            "zeros_at": [np.zeros(max(len(w.no_bias) for w in self._stacks()), np.float32)],
        }
        for name, vectors in stacks.items():
            present = [vector for vector in vectors if vector is not None]
            offsets[name] = end if present else -1
            if present:
                part = np.concatenate(present).astype(np.float32)
                parts.append(np.pad(part, (0, -len(part) % LANES)))
                end += len(parts[-1])
        for name in ("qkv_bias", "o_bias"):
            has = offsets[f"{name}_at"] >= 0
            size = weights.qkv.out_features if name == "qkv_bias" else config.hidden_size
            self._set(**{f"{name}_stride": size if has else 0})
            if not has:
                offsets[f"{name}_at"] = offsets["zeros_at"]
        self._set(**offsets)
        arena = aligned_empty((end,), np.float32)
        np.concatenate(parts, out=arena)
        # 3 What differs between layers: windows and rotary tables.
        windows = [config.window(index) for index in range(config.num_hidden_layers)]
        self._widest_window = max(UNLIMITED if w is None else w for w in windows)
        full, local = weights.cos_sin_cache, weights.local_cos_sin_cache
        tables = [full if w is None or local is None else local for w in windows]
        self._keep(
            vectors=arena,
            windows=np.array([UNLIMITED if w is None else w for w in windows], np.int64),
            rotary=np.array([table.ctypes.data for table in tables], np.int64),
        )

    def _stacks(self) -> list[Any]:
        weights = self.weights
        return [weights.qkv, weights.o, weights.gate_up, weights.down]

    def _make_room(self, num_tokens: int, num_seqs: int, workers: int) -> None:
        """Grow the buffers, by doubling, to what this batch needs."""
        config = self.config
        if num_tokens > self.capacity or workers > self.workers:
            self.workers = max(workers, self.workers)
            self.capacity = max(self.capacity, _SMALLEST_CAPACITY)
            while self.capacity < num_tokens:
                self.capacity *= 2
            hidden, width = config.hidden_size, config.intermediate_size
            q_width = config.num_attention_heads * config.head_dim
            group = config.num_attention_heads // config.num_key_value_heads
            row_stride = _padded(max(hidden, width) + 1)
            scratch_stride = scratch_size(group, config.num_key_value_heads, config.head_dim)
            end, offsets = 0, {}
            for name, size in (
                ("residual_at", self.capacity * hidden),
                ("result_at", self.capacity * hidden),
                ("qkv_at", self.capacity * self.weights.qkv.out_features),
                ("attention_at", self.capacity * q_width),
                ("gate_up_at", self.capacity * 2 * width),
                ("rows_at", self.workers * row_stride),
                ("scratch_at", self.workers * scratch_stride),
            ):
                offsets[name] = end
                end += _padded(size)
            floats = aligned_empty((end,), np.float32)
            each = 2 if self._words_dtype == np.uint32 else 1  # inputs a word
            end = 0
            for name, size in (("x", hidden), ("attention", q_width), ("gated", width)):
                offsets[f"{name}_words"] = _padded(size) // each
                offsets[f"{name}_words_at"] = end
                end += self.capacity * offsets[f"{name}_words"]
            self._words = aligned_empty((end,), self._words_dtype)
            self._set(row_stride=row_stride, scratch_stride=scratch_stride, **offsets)
            self._keep(
                floats=floats,
                words=self._words,
                offsets=np.empty((self.workers, 3 * TILE_KEYS), np.int64),
            )
        tokens = tile_tokens(config.num_attention_heads // config.num_key_value_heads)
        most_items = (num_seqs + num_tokens // tokens) * config.num_key_value_heads
        if "items" not in self._kept or len(self._kept["items"]) < most_items:
            self._keep(items=np.empty((2 * most_items, 6), np.int64))

    def _check(self, batch: BatchArrays, key_caches: Array, value_caches: Array) -> None:
        """Shapes; what arrays hold is checked by the compiled function."""
        config = self.config
        num_tokens = batch.token_ids.shape[0]
        wanted = (
            config.num_hidden_layers,
            "num_blocks",
            "block_size",
            config.num_key_value_heads,
            config.head_dim,
        )
        check_shape("key_caches", key_caches, wanted, "of the model")
        check_shape("value_caches", value_caches, key_caches.shape, "as key_caches")
        for name, cache in (("key_caches", key_caches), ("value_caches", value_caches)):
            if bits(cache).dtype != self._embedding.dtype or not cache.flags.c_contiguous:
                raise ValueError(
                    f"{name} must be contiguous and of the weights' dtype "
                    f"{self.weights.embedding.dtype}, got {cache.dtype} "
                    f"with strides {list(cache.strides)} bytes"
                )
        check_shape("positions", batch.positions, (num_tokens,), "one a token")
        check_shape("slot_mapping", batch.slot_mapping, (num_tokens,), "one a token")
        num_seqs = batch.seq_lens.shape[0]
        check_shape("query_start_loc", batch.query_start_loc, (num_seqs + 1,), "sequences and one")
        check_shape("block_tables", batch.block_tables, (num_seqs, "max_blocks"), "one a sequence")

    def _explain(self, code: int, batch: BatchArrays, key_caches: Array) -> None:
        """Raise the ValueError that says what of the batch does not fit."""
        if code == BAD_POSITION:
            check_positions(batch.positions, self.weights.cos_sin_cache)
        if code == BAD_SLOT:
            check_slots(batch.slot_mapping, key_caches[0])
        if code == BAD_SEQUENCE:
            query = np.empty((batch.token_ids.shape[0], 0))
            check_sequences(
                query, key_caches[0], batch.block_tables, batch.seq_lens, batch.query_start_loc,
                None if self._widest_window == UNLIMITED else self._widest_window,
            )  # fmt: skip
            raise ValueError("every sequence of a decoder step must have as many tokens as it adds")
        raise ValueError(
            f"token_ids must be 0 to {self.config.vocab_size - 1}, "
            f"got {batch.token_ids.min()} to {batch.token_ids.max()}"
        )


def _padded(size: int) -> int:
    return -(-size // LANES) * LANES
