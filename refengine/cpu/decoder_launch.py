"""Starting a decoder step: check the batch, plan its attention, let all threads run."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from refengine.cpu.attention_plan import plan_items, sequences_fit
from refengine.cpu.calls import call_address
from refengine.cpu.decoder_layout import address_of
from refengine.cpu.jit import inner, parallel

FITS, BAD_TOKEN, BAD_POSITION, BAD_SLOT, BAD_SEQUENCE = range(5)
# Tokens that a thread takes at a time, where there are many.
_ITEM_TOKENS = 8


@inner
def _batch_fits(
    token_ids: Any, positions: Any, slot_mapping: Any, seq_lens: Any, query_start_loc: Any,
    vocab_size: int, num_positions: int, num_slots: int,
) -> int:  # fmt: skip
    """What is wrong with a batch's numbers, sequences' tables aside."""
    for t in range(token_ids.shape[0]):
        if token_ids[t] < 0 or token_ids[t] >= vocab_size:
            return BAD_TOKEN
        if positions[t] < 0 or positions[t] >= num_positions:
            return BAD_POSITION
        if slot_mapping[t] < -1 or slot_mapping[t] >= num_slots:
            return BAD_SLOT
    for seq in range(seq_lens.shape[0]):
        if query_start_loc[seq + 1] - query_start_loc[seq] > seq_lens[seq]:
            return BAD_SEQUENCE
    return FITS


@parallel
def launch(
    worker_address: int, steps: Any, embedding: Any, words: Any,
    token_ids: Any, positions: Any, slot_mapping: Any, block_tables: Any, seq_lens: Any,
    query_start_loc: Any, key_caches: Any, value_caches: Any, items: Any, stages: Any,
    out: Any, vocab_size: int, num_positions: int, window: int, workers: int,
) -> int:  # fmt: skip
    """Check, plan, and let the workers run. Returns ``FITS``, or what does not fit."""
    step = steps[0]
    num_tokens = token_ids.shape[0]
    num_blocks, block_size = key_caches.shape[1], key_caches.shape[2]
    # 1 Nothing is touched unless everything named exists.
    if not sequences_fit(
        num_tokens, num_blocks, block_size, block_tables, seq_lens, query_start_loc, window
    ):
        return BAD_SEQUENCE
    code = _batch_fits(
        token_ids, positions, slot_mapping, seq_lens, query_start_loc,
        vocab_size, num_positions, num_blocks * block_size,
    )  # fmt: skip
    if code != FITS:
        return code
    # 2 The batch, and its tiles of tokens.
    step.token_ids, step.positions = address_of(token_ids), address_of(positions)
    step.slot_mapping, step.block_tables = address_of(slot_mapping), address_of(block_tables)
    step.key_caches, step.value_caches = address_of(key_caches), address_of(value_caches)
    step.normalised = address_of(out)
    step.num_tokens = num_tokens
    # Neighbouring rows lie together, and are read ahead; but nobody should wait for the last item.
    step.item_tokens = max(1, min(_ITEM_TOKENS, num_tokens // (4 * workers)))
    step.max_blocks = block_tables.shape[1]
    step.num_blocks, step.block_size = num_blocks, block_size
    group = step.q_heads // step.kv_heads
    step.num_items, _ = plan_items(
        seq_lens, query_start_loc, group, step.kv_heads, window, workers, items
    )
    # 3 All threads at once.
    step_address = address_of(steps)
    stages[:] = 0
    if workers == 1:
        call_address(worker_address, 0, 1, step_address, embedding, words)
    else:
        for worker in numba.prange(workers):
            call_address(worker_address, np.int64(worker), workers, step_address, embedding, words)
    return FITS
