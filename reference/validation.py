"""What every kernel asks of its arguments; the messages quote what came and what was wanted.

The backends share these checks. Those of shapes cost a few comparisons; those of contents (block
tables, slots, positions) read the arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def check_shape(name: str, array: Array, wanted: tuple[int | str, ...], why: str = "") -> None:
    """Compare a shape with the wanted one, in which a text stands for any length.

    Raises:
        ValueError: where they differ.
    """
    shape = array.shape
    if len(shape) != len(wanted) or any(
        not isinstance(want, str) and want != got for got, want in zip(shape, wanted, strict=True)
    ):
        text = ", ".join(str(want) for want in wanted)
        raise ValueError(
            f"{name} must have shape [{text}]{f' ({why})' if why else ''}, got {list(shape)}"
        )


def check_integers(name: str, array: Array) -> None:
    """Indices must be integers: a float would be cut off silently.

    Raises:
        ValueError: where they are not.
    """
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold integers, got {array.dtype}")


def check_caches(key_cache: Array, value_cache: Array) -> None:
    """Both caches of one layer: ``[num_blocks, block_size, num_kv_heads, head_dim]``.

    Raises:
        ValueError: where shapes or dtypes do not fit.
    """
    check_shape("key_cache", key_cache, ("num_blocks", "block_size", "num_kv_heads", "head_dim"))
    check_shape("value_cache", value_cache, key_cache.shape, "as key_cache")
    if value_cache.dtype != key_cache.dtype:
        raise ValueError(
            f"value_cache must have key_cache's dtype, {key_cache.dtype}, got {value_cache.dtype}"
        )


def check_write_kv(
    key: Array, value: Array, key_cache: Array, value_cache: Array, slot_mapping: Array
) -> None:
    """Shapes of ``write_kv``.

    Raises:
        ValueError: where one does not fit.
    """
    check_caches(key_cache, value_cache)
    check_shape("key", key, ("num_tokens", *key_cache.shape[2:]), "heads and head_dim as key_cache")
    check_shape("value", value, key.shape, "as key")
    check_shape("slot_mapping", slot_mapping, key.shape[:1], "one slot a token of key")
    check_integers("slot_mapping", slot_mapping)


def check_slots(slot_mapping: Array, key_cache: Array) -> None:
    """Every slot lies in the cache, or is -1.

    Raises:
        ValueError: naming the first that does not.
    """
    num_slots = key_cache.shape[0] * key_cache.shape[1]
    wrong = np.flatnonzero((slot_mapping < -1) | (slot_mapping >= num_slots))
    if wrong.size:
        token = int(wrong[0])
        raise ValueError(
            f"slot_mapping[{token}] must be -1 or below {num_slots} "
            f"({key_cache.shape[0]} blocks of {key_cache.shape[1]}), got {slot_mapping[token]}"
        )


def check_paged_attention(
    query: Array,
    key_cache: Array,
    value_cache: Array,
    block_tables: Array,
    seq_lens: Array,
    query_start_loc: Array,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    out: Array,
) -> None:
    """Shapes of ``paged_attention``, and its two options.

    Raises:
        ValueError: where one does not fit.
    """
    check_caches(key_cache, value_cache)
    num_kv_heads, head_dim = key_cache.shape[2:]
    check_shape("query", query, ("num_tokens", "num_q_heads", head_dim), "head_dim as key_cache")
    if num_kv_heads == 0 or query.shape[1] % num_kv_heads:
        raise ValueError(
            "query must have a multiple of the cache's key-value heads, "
            f"{num_kv_heads}, got {query.shape[1]} heads"
        )
    check_shape("out", out, query.shape, "as query")
    check_shape("seq_lens", seq_lens, ("num_seqs",))
    check_shape("block_tables", block_tables, (seq_lens.shape[0], "max_blocks"), "as seq_lens")
    wanted = (seq_lens.shape[0] + 1,)
    check_shape("query_start_loc", query_start_loc, wanted, "one more than seq_lens")
    check_integers("block_tables", block_tables)
    check_integers("seq_lens", seq_lens)
    check_integers("query_start_loc", query_start_loc)
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1 token or None, got {sliding_window}")
    if logits_soft_cap is not None and not logits_soft_cap > 0:
        raise ValueError(f"logits_soft_cap must be above 0 or None, got {logits_soft_cap}")


def check_sequences(
    query: Array,
    key_cache: Array,
    block_tables: Array,
    seq_lens: Array,
    query_start_loc: Array,
    sliding_window: int | None,
) -> None:
    """The contents of ``paged_attention``'s tables: what would be read exists.

    A sequence of length 0 is empty and reads nothing; its query tokens, if any, get zeros.

    Raises:
        ValueError: naming the first sequence that does not fit.
    """
    num_blocks, block_size = key_cache.shape[:2]
    starts = query_start_loc.tolist()
    if starts[0] != 0 or starts[-1] != query.shape[0]:
        raise ValueError(
            f"query_start_loc must run from 0 to query's number of tokens, {query.shape[0]}, "
            f"got {starts[0]} to {starts[-1]}"
        )
    for seq, seq_len in enumerate(seq_lens.tolist()):
        query_len = starts[seq + 1] - starts[seq]
        if query_len < 0:
            raise ValueError(
                "query_start_loc must not fall, "
                f"got {starts[seq]} then {starts[seq + 1]} at sequence {seq}"
            )
        room = block_tables.shape[1] * block_size
        if not 0 <= seq_len <= room:
            raise ValueError(
                f"seq_lens[{seq}] must be 0 to {room}, what {block_tables.shape[1]} blocks of "
                f"{block_size} in block_tables hold, got {seq_len}"
            )
        if seq_len == 0:
            continue
        if query_len > seq_len:
            raise ValueError(
                f"sequence {seq} must have at most as many query tokens as tokens, "
                f"{seq_len}, got {query_len}"
            )
        first = 0
        if sliding_window is not None:
            first = max(0, seq_len - query_len - sliding_window + 1) // block_size
        used = block_tables[seq, first : -(-seq_len // block_size)]
        wrong = np.flatnonzero((used < 0) | (used >= num_blocks))
        if wrong.size:
            column = first + int(wrong[0])
            raise ValueError(
                f"block_tables[{seq}, {column}] must be 0 to {num_blocks - 1}, a block of the "
                f"cache, got {block_tables[seq, column]}"
            )


def check_block_copies(
    source_key_caches: Array,
    source_value_caches: Array,
    destination_key_caches: Array,
    destination_value_caches: Array,
    block_mapping: Array,
) -> None:
    """Arguments of ``swap_blocks``, and of ``copy_blocks`` with one set of caches given twice.

    Raises:
        ValueError: where a shape, a dtype or a block does not fit.
    """
    axes = ("num_layers", "num_blocks", "block_size", "num_kv_heads", "head_dim")
    for name, key_caches, value_caches in (
        ("source", source_key_caches, source_value_caches),
        ("destination", destination_key_caches, destination_value_caches),
    ):
        check_shape(f"{name} key_caches", key_caches, axes)
        check_shape(f"{name} value_caches", value_caches, key_caches.shape, "as key_caches")
    layers, _, *block = source_key_caches.shape
    wanted = (layers, "num_blocks", *block)
    check_shape("destination key_caches", destination_key_caches, wanted, "as source key_caches")
    arrays = (source_value_caches, destination_key_caches, destination_value_caches)
    for array in arrays:
        if array.dtype != source_key_caches.dtype:
            raise ValueError(
                f"all caches must have one dtype, got {source_key_caches.dtype} and {array.dtype}"
            )
    check_shape("block_mapping", block_mapping, ("num_pairs", 2))
    check_integers("block_mapping", block_mapping)
    for column, (name, caches) in enumerate(
        (("source", source_key_caches), ("destination", destination_key_caches))
    ):
        blocks, num_blocks = block_mapping[:, column], caches.shape[1]
        wrong = np.flatnonzero((blocks < 0) | (blocks >= num_blocks))
        if wrong.size:
            pair = int(wrong[0])
            raise ValueError(
                f"block_mapping[{pair}, {column}] must be 0 to {num_blocks - 1}, a block of the "
                f"{name} caches, got {blocks[pair]}"
            )


def check_rms_norm(x: Array, weight: Array, out: Array) -> None:
    """Shapes of ``rms_norm``.

    Raises:
        ValueError: where one does not fit.
    """
    check_shape("weight", weight, x.shape[-1:], "as x's last axis")
    check_shape("out", out, x.shape, "as x")


def check_fused_add_rms_norm(x: Array, residual: Array, weight: Array, out: Array) -> None:
    """Shapes of ``fused_add_rms_norm``.

    Raises:
        ValueError: where one does not fit.
    """
    check_shape("residual", residual, x.shape, "as x")
    check_rms_norm(x, weight, out)


def check_rotary_embedding(
    positions: Array, query: Array, key: Array, cos_sin_cache: Array
) -> None:
    """Shapes of ``rotary_embedding``.

    Raises:
        ValueError: where one does not fit.
    """
    check_shape("query", query, ("num_tokens", "num_q_heads", "head_dim"))
    check_shape(
        "key", key, (query.shape[0], "num_kv_heads", query.shape[2]), "tokens, head_dim as query"
    )
    check_shape("positions", positions, query.shape[:1], "one a token of query")
    check_integers("positions", positions)
    check_shape("cos_sin_cache", cos_sin_cache, ("num_positions", "rotary_dim"))
    rotary_dim, head_dim = cos_sin_cache.shape[1], query.shape[2]
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise ValueError(
            "cos_sin_cache must have an even number of columns, at most head_dim, "
            f"{head_dim}, got {rotary_dim}"
        )


def check_positions(positions: Array, cos_sin_cache: Array) -> None:
    """Every position has a row in the table.

    Raises:
        ValueError: naming the first that has none.
    """
    rows = cos_sin_cache.shape[0]
    wrong = np.flatnonzero((positions < 0) | (positions >= rows))
    if wrong.size:
        token = int(wrong[0])
        raise ValueError(
            f"positions[{token}] must be 0 to {rows - 1}, a row of cos_sin_cache, "
            f"got {positions[token]}"
        )


def check_gated(x: Array, out: Array) -> None:
    """Shapes of ``silu_and_mul`` and ``gelu_tanh_and_mul``.

    Raises:
        ValueError: where one does not fit.
    """
    check_shape("x", x, ("num_tokens", "2 * d"))
    if x.shape[1] % 2:
        raise ValueError(f"x must have an even number of columns, got shape {list(x.shape)}")
    check_shape("out", out, (x.shape[0], x.shape[1] // 2), "half of x's columns")


def check_soft_cap(x: Array, cap: float) -> None:
    """Arguments of ``soft_cap``.

    Raises:
        ValueError: where the cap is not a positive number.
    """
    if not cap > 0:
        raise ValueError(f"cap must be above 0, got {cap}, for x of shape {list(x.shape)}")


def check_linear(x: Array, weight: Array, bias: Array | None, out: Array) -> None:
    """Shapes of ``linear`` over plain ``[out_features, in_features]`` weights.

    Raises:
        ValueError: where one does not fit.
    """
    check_shape("weight", weight, ("out_features", "in_features"))
    check_shape("x", x, ("num_tokens", weight.shape[1]), "in_features as weight")
    check_shape("out", out, (x.shape[0], weight.shape[0]), "tokens as x, out_features as weight")
    if bias is not None:
        check_shape("bias", bias, weight.shape[:1], "out_features of weight")


def check_partial_attention(partial_outputs: Array, log_sum_exps: Array, out: Array) -> None:
    """Shapes of ``merge_partial_attention``.

    Raises:
        ValueError: where one does not fit.
    """
    check_shape(
        "partial_outputs", partial_outputs, ("num_parts", "num_tokens", "num_q_heads", "head_dim")
    )
    check_shape("log_sum_exps", log_sum_exps, partial_outputs.shape[:3], "as partial_outputs")
    check_shape("out", out, partial_outputs.shape[1:], "as one part")
