"""How a batch of attention is cut into items for the threads."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.cpu.attention_plan import UNLIMITED, most_items, plan_items, sequences_fit
from refengine.cpu.attention_tile import NARROW_ROWS, TILE_ROWS, tile_tokens


@st.composite
def batches(draw):
    """(seq_len, query_len) of up to eight sequences, empty ones among them."""
    lengths = []
    for _ in range(draw(st.integers(0, 8))):
        seq_len = draw(st.integers(0, 300))
        lengths.append((seq_len, draw(st.integers(0, seq_len))))
    return lengths


def plan(lengths, group, num_kv_heads, window, workers):
    seq_lens = np.array([length for length, _ in lengths], np.int32)
    starts = np.cumsum([0, *(new for _, new in lengths)]).astype(np.int32)
    room = most_items(starts, group, num_kv_heads)
    items = np.full((room, 6), -7, np.int64)
    count, products = plan_items(seq_lens, starts, group, num_kv_heads, window, workers, items)
    assert count <= room
    return items[:count], starts, products


@settings(deadline=None, max_examples=200)
@given(
    lengths=batches(),
    group=st.sampled_from([1, 3, 4, 7, 60]),
    num_kv_heads=st.integers(1, 4),
    window=st.sampled_from([1, 16, UNLIMITED]),
    workers=st.integers(1, 4),
)
def test_every_token_and_head_is_in_one_item(lengths, group, num_kv_heads, window, workers):
    items, starts, products = plan(lengths, group, num_kv_heads, window, workers)
    seen = np.zeros((starts[-1], num_kv_heads), int)
    work = []
    for seq, token, count, position, kv_head, heads in items:
        seq_len, query_len = lengths[seq]
        assert starts[seq] <= token < token + count <= starts[seq + 1]
        assert position == seq_len - query_len + token - starts[seq]
        assert 1 <= count <= tile_tokens(group)
        assert heads == 1 or count * group <= NARROW_ROWS
        seen[token : token + count, kv_head : kv_head + heads] += 1
        work.append(heads * group * count * min(position + count, window + count))
    assert (seen == 1).all()
    assert products == sum(work)
    classes = np.log2(work).astype(int)
    assert (np.diff(classes) <= 0).all()  # most work first


def test_tiles_hold_some_rows_whatever_the_group():
    assert [tile_tokens(group) for group in (1, 3, 48, 49, 1000)] == [TILE_ROWS, 16, 1, 1, 1]


def test_heads_of_few_sequences_are_shared_out():
    few, _, _ = plan([(50, 1)] * 3, 3, 3, UNLIMITED, 2)
    many, _, _ = plan([(50, 1)] * 4, 3, 3, UNLIMITED, 2)
    assert few[:, 5].tolist() == [1] * 9
    assert many[:, 5].tolist() == [3] * 4


def test_sequences_fit():
    tables = np.array([[0, 4], [2, 99]], np.int32)
    starts = np.array([0, 2, 3], np.int32)

    def fits(seq_lens, starts=starts, window=UNLIMITED, num_tokens=3):
        lengths = np.array(seq_lens, np.int32)
        return sequences_fit(num_tokens, 5, 4, tables, lengths, starts, window)

    assert fits([8, 4])
    assert not fits([8, 5])  # block 99
    assert not fits([9, 4])  # more than the table holds
    assert not fits([1, 4])  # fewer tokens than queries
    assert not fits([-1, 4])
    assert not fits([8, 4], num_tokens=4)
    assert not fits([8, 4], starts=np.array([0, 4, 3], np.int32))
    tables[0, 0] = -1
    assert not fits([8, 4])
    assert fits([8, 4], window=3)  # block 0 has left the window
    assert not fits([8, 4], window=4)
