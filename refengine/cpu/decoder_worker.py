"""One thread's part of a decoder step: all layers, and in each what it gets hold of.

This is ``Transformer.forward`` as a GPU's block would run it. All threads go through the same
stages, whose items they share (team.py). The items call the same functions on rows, tiles and heads
as the kernels of this folder do, with the same sums, so the result has the same bits.

Stages of a layer, and their items:

1. query, key and value product             group of outputs by block of tokens
2. head norms, rotation, write to the cache  some tokens
3. attention                                 tile of tokens by KV heads
4. output product                            as 1
5. add to the stream, norm                   some tokens
6. gate and up product                       as 1
7. activation                                some tokens
8. down product                              as 1
9. add to the stream, the next layer's norm  some tokens
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import carray, types

from refengine.cpu.activation import gelu_tanh_and_mul_row, silu_and_mul_row
from refengine.cpu.attention_tile import TILE_KEYS
from refengine.cpu.calls import call_address
from refengine.cpu.decoder_layout import PARTS, array_at, step_at
from refengine.cpu.jit import compiled_address, inner
from refengine.cpu.matrix_product import multiply_item, product_items
from refengine.cpu.packing import unpack_row
from refengine.cpu.rms_norm import fused_add_rms_norm_row, rms_norm_row
from refengine.cpu.rotary import rotate_head
from refengine.cpu.simd import LANES
from refengine.cpu.team import finish, read_clock, take
from refengine.cpu.tile_kernels import PANEL
from refengine.cpu.words import fill_words
from refengine.cpu.write_kv import write_kv_head

_UNBOUNDED = (2**40,)


(_EMBED, _QKV, _ROTATE, _ATTENTION, _OUTPUT, _NORM, _GATE_UP, _ACTIVATION, _DOWN) = map(
    np.int64, range(len(PARTS))
)


def num_stages(num_layers: int) -> int:
    """Stages of a step at most: two before the layers, ten in each."""
    return 2 + 10 * num_layers


@cache
def worker_address(weights: np.dtype[Any], words: np.dtype[Any]) -> int:
    """The address of ``_run_worker`` for weights and words of these dtypes.

    Called with: worker, workers, the address of a ``STEP`` record, the embedding's panels, the
    arena of words.
    """
    pointers = [types.CPointer(numba.from_dtype(np.dtype(d))) for d in (weights, words)]
    return compiled_address(_run_worker, types.void(*[types.int64] * 3, *pointers))


def _run_worker(worker: int, workers: int, step_address: int, embedding: Any, words: Any) -> None:
    step = step_at(step_address)[0]
    embedding, words = carray(embedding, _UNBOUNDED), carray(words, _UNBOUNDED)
    hidden, q_width = step.hidden, step.q_heads * step.head_dim
    qkv_width = q_width + 2 * step.kv_heads * step.head_dim
    aligned = q_width // step.kv_heads % LANES == 0
    stage, time, none = 0, read_clock(), np.int64(-1)
    # 0 Token ids to vectors; the first norm.
    _embed(step, worker, stage, embedding)
    _norm_rows(step, worker, stage + 1, none, step.input_norm_at, embedding, words)
    stage, time = stage + 2, _lap(step, worker, _EMBED, time)
    for layer in range(step.num_layers):
        at = layer * hidden
        # 1 One product gives query, key and value side by side.
        bias_at = step.qkv_bias_at + layer * step.qkv_bias_stride
        _product(step, stage, step.qkv, layer, hidden, qkv_width, embedding, words,
                 step.x_words_at, step.x_words, bias_at, step.qkv_at)  # fmt: skip
        stage, time = stage + 1, _lap(step, worker, _QKV, time)
        # 2 Positions enter by rotation; then the new keys and values are written, since the new
        #   tokens attend to each other too.
        _finish_heads(step, stage, layer, embedding)
        stage, time = stage + 1, _lap(step, worker, _ROTATE, time)
        # 3 Attention over the pages.
        _attend(step, worker, stage, layer, embedding, words, aligned)
        stage += 1
        if not aligned:
            _fill_attention(step, stage, embedding, words)
            stage += 1
        time = _lap(step, worker, _ATTENTION, time)
        # 4 Back to the stream's width.
        bias_at = step.o_bias_at + layer * step.o_bias_stride
        _product(step, stage, step.o, layer, q_width, hidden, embedding, words,
                 step.attention_words_at, step.attention_words, bias_at,
                 step.result_at)  # fmt: skip
        stage, time = stage + 1, _lap(step, worker, _OUTPUT, time)
        # 5 Add; what the MLP reads.
        own = step.post_attention_norm_at
        _norm_rows(step, worker, stage, own if own < 0 else own + at, step.pre_mlp_norm_at + at,
                   embedding, words)  # fmt: skip
        stage, time = stage + 1, _lap(step, worker, _NORM, time)
        # 6 Gate and up are one product.
        _product(step, stage, step.gate_up, layer, hidden, 2 * step.width, embedding,
                 words, step.x_words_at, step.x_words, step.zeros_at, step.gate_up_at)  # fmt: skip
        stage, time = stage + 1, _lap(step, worker, _GATE_UP, time)
        # 7 Activation.
        _gate(step, worker, stage, embedding, words)
        stage, time = stage + 1, _lap(step, worker, _ACTIVATION, time)
        # 8 Back to the stream's width.
        _product(step, stage, step.down, layer, step.width, hidden, embedding, words,
                 step.gated_words_at, step.gated_words, step.zeros_at, step.result_at)  # fmt: skip
        stage, time = stage + 1, _lap(step, worker, _DOWN, time)
        # 9 Add; what the next layer reads, or the final norm.
        own = step.post_mlp_norm_at
        _norm_rows(step, worker, stage, own if own < 0 else own + at,
                   step.input_norm_at + at + hidden, embedding, words)  # fmt: skip
        stage, time = stage + 1, _lap(step, worker, _NORM, time)


@inner
def _lap(step: Any, worker: int, part: Any, since: int) -> int:
    """Book the time since the last lap; return the time now."""
    now = read_clock()
    if worker == 0:
        array_at(step.ticks, np.int64)[part] += now - since
    return now  # type: ignore[no-any-return]


@inner
def _token_items(step: Any) -> int:
    """How many items the tokens make, in stages that take tokens one by one."""
    return (step.num_tokens + step.item_tokens - 1) // step.item_tokens  # type: ignore[no-any-return]


@inner
def _tokens(step: Any, item: int) -> tuple[int, int]:
    """The first token of an item, and the one after its last."""
    return item * step.item_tokens, min((item + 1) * step.item_tokens, step.num_tokens)


@inner
def _product(
    step: Any, stage: int, address: int, layer: int, in_features: int,
    out_features: int, embedding: Any, words: Any, words_at: int, words_stride: int,
    init_at: int, out_at: int,
) -> None:  # fmt: skip
    """One layer's product with the stacked weights at ``address``."""
    stages = array_at(step.stages, np.int64)
    width = 4 // embedding.itemsize  # inputs a step: two where weights are bfloat16
    steps = (in_features + width - 1) // width
    layer_size = (out_features + PANEL - 1) // PANEL * steps * PANEL * width
    items, mine = product_items(step.num_tokens, out_features), 0
    item = take(stages, stage)
    while item < items:
        multiply_item(
            step.block_kernel, item,
            array_at(address, embedding), layer * layer_size, steps,
            array_at(step.words + 4 * words_at, words), words_stride,
            array_at(step.vectors, np.float32), init_at,
            array_at(step.floats + 4 * out_at, np.float32), step.num_tokens, out_features,
        )  # fmt: skip
        item, mine = take(stages, stage), mine + 1
    finish(stages, stage, items, mine)


@inner
def _embed(step: Any, worker: int, stage: int, embedding: Any) -> None:
    """Rows of the embedding into the stream."""
    stages, floats = array_at(step.stages, np.int64), array_at(step.floats, np.float32)
    token_ids = array_at(step.token_ids, np.int64)
    width = 4 // embedding.itemsize
    steps = (step.hidden + width - 1) // width
    row_at = step.rows_at + worker * step.row_stride
    items, mine, item = _token_items(step), 0, take(stages, stage)
    while item < items:
        first, last = _tokens(step, item)
        for t in range(first, last):
            # An odd row is one element longer packed than it is in the stream.
            unpack_row(embedding, token_ids[t], steps, width, floats, row_at)
            residual_at = step.residual_at + t * step.hidden
            for i in range(step.hidden):
                floats[residual_at + i] = floats[row_at + i] * step.embedding_multiplier
        mine, item = mine + 1, take(stages, stage)
    finish(stages, stage, items, mine)


@inner
def _norm_rows(
    step: Any, worker: int, stage: int, own_at: Any, norm_at: int, embedding: Any,
    words: Any,
) -> None:  # fmt: skip
    """Add the last sublayer's result to the stream, and normalise the stream for the next.

    The first norm has nothing to add; the last one's rows are the step's result, not words.

    Args:
        step: the record.
        worker: which.
        stage: which.
        own_at: offset of the weight that the result itself is normalised with, or -1.
        norm_at: offset of the next sublayer's norm weight.
        embedding: for its type.
        words: for its type.
    """
    stages, floats = array_at(step.stages, np.int64), array_at(step.floats, np.float32)
    arena, size, eps = array_at(step.words, words), step.hidden, step.eps
    norm = array_at(step.vectors + 4 * norm_at, np.float32)
    own = array_at(step.vectors + 4 * max(own_at, 0), np.float32)
    normalised = array_at(step.normalised, np.float32)
    row_at = step.rows_at + worker * step.row_stride
    add = norm_at != step.input_norm_at
    to_words = norm_at != step.input_norm_at + step.num_layers * size
    items, mine, item = _token_items(step), 0, take(stages, stage)
    while item < items:
        first, last = _tokens(step, item)
        for t in range(first, last):
            result_at, stream_at = step.result_at + t * size, step.residual_at + t * size
            if own_at >= 0:
                rms_norm_row(floats, result_at, own, size, eps, floats, result_at)
            if add:
                fused_add_rms_norm_row(
                    floats, result_at, floats, stream_at, norm, size, eps, floats, row_at
                )
            else:
                rms_norm_row(floats, stream_at, norm, size, eps, floats, row_at)
            if to_words:
                at = step.x_words_at + t * step.x_words
                fill_words(floats, row_at, embedding, arena, at, 0, size)
            else:
                for i in range(size):
                    normalised[t * size + i] = floats[row_at + i]
        mine, item = mine + 1, take(stages, stage)
    finish(stages, stage, items, mine)


@inner
def _finish_heads(step: Any, stage: int, layer: int, embedding: Any) -> None:
    """Normalise and rotate heads where that is their part; write keys and values to the cache."""
    head_dim, q_heads, kv_heads = step.head_dim, step.q_heads, step.kv_heads
    stages, floats = array_at(step.stages, np.int64), array_at(step.floats, np.float32)
    positions = array_at(step.positions, np.int64)
    slots = array_at(step.slot_mapping, np.int64)
    rotary = array_at(array_at(step.rotary, np.int64)[layer], np.float32)
    layer_bytes = step.num_blocks * step.block_size * kv_heads * head_dim * embedding.itemsize
    key_cache = array_at(step.key_caches + layer * layer_bytes, embedding)
    value_cache = array_at(step.value_caches + layer * layer_bytes, embedding)
    heads = q_heads + 2 * kv_heads
    items, mine, item = _token_items(step), 0, take(stages, stage)
    while item < items:
        first, last = _tokens(step, item)
        for t in range(first, last):
            for head in range(heads):
                at = step.qkv_at + (t * heads + head) * head_dim
                if head < q_heads + kv_heads:
                    norm_at = step.q_norm_at if head < q_heads else step.k_norm_at
                    if norm_at >= 0:
                        norm = array_at(step.vectors + 4 * (norm_at + layer * head_dim), np.float32)
                        rms_norm_row(floats, at, norm, head_dim, step.eps, floats, at)
                    rotate_head(floats, at, rotary, positions[t] * step.rotary_dim, step.rotary_dim)
            if slots[t] >= 0:
                key_at = step.qkv_at + (t * heads + q_heads) * head_dim
                size = kv_heads * head_dim  # a token's heads lie together
                write_kv_head(floats, key_at, key_cache, slots[t] * size, size)
                write_kv_head(floats, key_at + size, value_cache, slots[t] * size, size)
        mine, item = mine + 1, take(stages, stage)
    finish(stages, stage, items, mine)


@inner
def _attend(
    step: Any, worker: int, stage: int, layer: int, embedding: Any, words: Any, aligned: bool
) -> None:
    """Attention of all tokens to the pages of their sequences; its rows as words, if aligned."""
    head_dim, kv_heads = step.head_dim, step.kv_heads
    group = step.q_heads // kv_heads
    stages, floats = array_at(step.stages, np.int64), array_at(step.floats, np.float32)
    items, arena = array_at(step.items, np.int64), array_at(step.words, words)
    window = array_at(step.windows, np.int64)[layer]
    layer_bytes = step.num_blocks * step.block_size * kv_heads * head_dim * embedding.itemsize
    q_width, qkv_width = step.q_heads * head_dim, (step.q_heads + 2 * kv_heads) * head_dim
    mine, item = 0, take(stages, stage)
    while item < step.num_items:
        at = item * 6
        seq, token, count, position = items[at], items[at + 1], items[at + 2], items[at + 3]
        kv_head, heads = items[at + 4], items[at + 5]
        head = kv_head * group * head_dim
        call_address(
            step.attend,
            floats, step.qkv_at + token * qkv_width + head, qkv_width, group, count, position,
            array_at(step.key_caches + layer * layer_bytes, embedding),
            array_at(step.value_caches + layer * layer_bytes, embedding),
            kv_heads, head_dim, kv_head, heads,
            array_at(step.block_tables, np.int32), seq * step.max_blocks, step.block_size,
            step.scale, window, step.soft_cap,
            floats, step.attention_at + token * q_width + head, q_width,
            floats, step.scratch_at + worker * step.scratch_stride,
            array_at(step.offsets + 8 * 3 * TILE_KEYS * worker, np.int64),
        )  # fmt: skip
        if aligned:
            for t in range(token, token + count):
                fill_words(
                    floats, step.attention_at + t * q_width, embedding, arena,
                    step.attention_words_at + t * step.attention_words,
                    head, heads * group * head_dim,
                )  # fmt: skip
        mine, item = mine + 1, take(stages, stage)
    finish(stages, stage, step.num_items, mine)


@inner
def _fill_attention(step: Any, stage: int, embedding: Any, words: Any) -> None:
    """Attention's rows as words, where a group of heads does not end on a multiple of 16."""
    stages, floats = array_at(step.stages, np.int64), array_at(step.floats, np.float32)
    arena, size = array_at(step.words, words), step.q_heads * step.head_dim
    items, mine, item = _token_items(step), 0, take(stages, stage)
    while item < items:
        first, last = _tokens(step, item)
        for t in range(first, last):
            at = step.attention_words_at + t * step.attention_words
            fill_words(floats, step.attention_at + t * size, embedding, arena, at, 0, size)
        mine, item = mine + 1, take(stages, stage)
    finish(stages, stage, items, mine)


@inner
def _gate(step: Any, worker: int, stage: int, embedding: Any, words: Any) -> None:
    """``act(gate) * up`` of each token, as words."""
    stages, floats = array_at(step.stages, np.int64), array_at(step.floats, np.float32)
    arena, size = array_at(step.words, words), step.width
    row_at = step.rows_at + worker * step.row_stride
    items, mine, item = _token_items(step), 0, take(stages, stage)
    while item < items:
        first, last = _tokens(step, item)
        for t in range(first, last):
            gate_up_at = step.gate_up_at + t * 2 * size
            if step.gelu:
                gelu_tanh_and_mul_row(floats, gate_up_at, size, floats, row_at)
            else:
                silu_and_mul_row(floats, gate_up_at, size, floats, row_at)
            at = step.gated_words_at + t * step.gated_words
            fill_words(floats, row_at, embedding, arena, at, 0, size)
        mine, item = mine + 1, take(stages, stage)
    finish(stages, stage, items, mine)
