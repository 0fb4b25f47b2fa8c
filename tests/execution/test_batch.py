import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.execution.batch import RequestRows
from refengine.sampling_params import SamplingParams
from refengine.step import NewRequest, ScheduledBatch, ScheduledRequest


def new_request(request_id, token_ids, num_prompt=None):
    return NewRequest(
        request_id, tuple(token_ids), num_prompt or len(token_ids), SamplingParams(), seed=0
    )


def test_a_mixed_batch_by_hand():
    rows = RequestRows(max_num_seqs=4, max_model_len=16, block_size=4)
    batch = ScheduledBatch(
        step=1,
        new_requests=(new_request("a", range(10, 16)), new_request("b", range(20, 29))),
        requests=(
            ScheduledRequest("a", start=5, num_tokens=1, new_block_ids=(7, 2), samples=True),
            ScheduledRequest("b", start=2, num_tokens=3, new_block_ids=(5, 9), samples=False),
        ),
    )
    rows.apply(batch)
    arrays = rows.build(batch)
    assert arrays.token_ids.tolist() == [15, 22, 23, 24]
    assert arrays.positions.tolist() == [5, 2, 3, 4]
    assert arrays.slot_mapping.tolist() == [2 * 4 + 1, 5 * 4 + 2, 5 * 4 + 3, 9 * 4 + 0]
    assert arrays.block_tables.tolist() == [[7, 2], [5, 9]]
    assert arrays.seq_lens.tolist() == [6, 5]
    assert arrays.query_start_loc.tolist() == [0, 1, 4]
    assert arrays.logits_rows.tolist() == [0]
    dtypes = (arrays.slot_mapping.dtype, arrays.block_tables.dtype, arrays.seq_lens.dtype)
    assert dtypes == (np.int64, np.int32, np.int32)


def test_tables_grow_by_what_each_step_adds():
    rows = RequestRows(max_num_seqs=1, max_model_len=12, block_size=2)
    first = ScheduledBatch(
        step=1,
        new_requests=(new_request("a", [1, 2, 3]),),
        requests=(ScheduledRequest("a", 0, 3, (4, 1), True),),
    )
    rows.apply(first)
    rows.append_token("a", 8)
    second = ScheduledBatch(step=2, requests=(ScheduledRequest("a", 3, 1, (), True),))
    rows.apply(second)
    rows.append_token("a", 9)
    third = ScheduledBatch(step=3, requests=(ScheduledRequest("a", 4, 1, (6,), True),))
    rows.apply(third)
    arrays = rows.build(third)
    assert arrays.block_tables.tolist() == [[4, 1, 6]]
    assert arrays.token_ids.tolist() == [9]
    assert arrays.slot_mapping.tolist() == [12]
    prompt, output = rows.known_tokens("a")
    assert (prompt.tolist(), output.tolist()) == ([1, 2, 3], [8, 9])


def test_a_dropped_request_returns_with_an_empty_table():
    rows = RequestRows(max_num_seqs=1, max_model_len=8, block_size=2)
    rows.apply(
        ScheduledBatch(
            step=1,
            new_requests=(new_request("a", [1, 2, 3]),),
            requests=(ScheduledRequest("a", 0, 3, (3, 0), True),),
        )
    )
    rows.append_token("a", 5)
    again = ScheduledBatch(
        step=2,
        dropped_request_ids=("a", "never-started"),
        new_requests=(new_request("a", [1, 2, 3, 5], num_prompt=3),),
        requests=(ScheduledRequest("a", 0, 4, (1, 2), True),),
    )
    rows.apply(again)
    arrays = rows.build(again)
    assert arrays.block_tables.tolist() == [[1, 2]]
    assert arrays.token_ids.tolist() == [1, 2, 3, 5]
    assert rows.known_tokens("a")[1].tolist() == [5]


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_every_token_lands_in_its_sequences_own_slot(data):
    block_size = data.draw(st.integers(1, 7))
    count = data.draw(st.integers(1, 6))
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))
    rows = RequestRows(count, 64, block_size)
    blocks = data.draw(st.permutations(range(sum(-(-n // block_size) for n in lengths))))
    parts, new, tables, taken = [], [], {}, 0
    for index, length in enumerate(lengths):
        needed = -(-length // block_size)
        tables[index] = blocks[taken : taken + needed]
        taken += needed
        start = data.draw(st.integers(0, length - 1))
        new.append(new_request(str(index), [index * 1000 + i for i in range(length)]))
        parts.append(
            ScheduledRequest(str(index), start, length - start, tuple(tables[index]), True)
        )
    batch = ScheduledBatch(step=1, requests=tuple(parts), new_requests=tuple(new))
    rows.apply(batch)
    arrays = rows.build(batch)
    at = 0
    for index, part in enumerate(parts):
        for position in range(part.start, part.start + part.num_tokens):
            assert arrays.token_ids[at] == index * 1000 + position
            block = tables[index][position // block_size]
            assert arrays.slot_mapping[at] == block * block_size + position % block_size
            at += 1
        assert arrays.logits_rows[index] == at - 1
    assert at == arrays.token_ids.size


def test_rows_are_given_back():
    rows = RequestRows(max_num_seqs=1, max_model_len=4, block_size=2)
    for step in range(5):
        rows.apply(
            ScheduledBatch(
                step=step,
                dropped_request_ids=(str(step - 1),),
                new_requests=(new_request(str(step), [1]),),
                requests=(ScheduledRequest(str(step), 0, 1, (0,), True),),
            )
        )
    assert list(rows.by_id) == ["4"]
    with pytest.raises(KeyError):
        rows["3"]
