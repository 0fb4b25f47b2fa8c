"""From a ``ScheduledBatch`` to the flat arrays that kernels read.

The runner keeps one row per running request: its known tokens and its block table. A step's arrays
are gathered from those rows without a Python loop over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from refengine.sampling_params import SamplingParams
from refengine.step import NewRequest, ScheduledBatch

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BatchArrays:
    """One step's inputs: T tokens of S sequences, R rows whose logits are wanted."""

    token_ids: Int64  # [T]
    positions: Int64  # [T]
    slot_mapping: Int64  # [T], block * block_size + offset
    block_tables: Int32  # [S, max_blocks]
    seq_lens: Int32  # [S], tokens in the cache after this step
    query_start_loc: Int32  # [S + 1], where each sequence's tokens begin in the flat batch
    logits_rows: Int64  # [R], indices into the T tokens


@dataclass(slots=True)
class RequestRow:
    """What the runner keeps of one request, besides its row in the arrays."""

    row: int
    request_id: str
    sampling_params: SamplingParams
    seed: int
    num_prompt_tokens: int
    num_tokens: int  # known tokens: prompt and output
    num_blocks: int = 0
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    extra: dict[str, object] = field(default_factory=dict)


class RequestRows:
    """Tokens and block tables of the requests that a runner holds.

    Args:
        max_num_seqs: rows, which is how many requests may run at once.
        max_model_len: tokens a request may have.
        block_size: tokens a block.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        max_blocks = -(-max_model_len // block_size)
        self.block_size = block_size
        self.token_ids = np.zeros((max_num_seqs, max_model_len), np.int32)
        self.block_tables = np.zeros((max_num_seqs, max_blocks), np.int32)
        self.by_id: dict[str, RequestRow] = {}
        self._free_rows = list(range(max_num_seqs))[::-1]

    def __getitem__(self, request_id: str) -> RequestRow:
        return self.by_id[request_id]

    def add(self, new: NewRequest) -> RequestRow:
        """Take in a request; its blocks follow with its first scheduled part."""
        row = self._free_rows.pop()
        count = len(new.token_ids)
        self.token_ids[row, :count] = new.token_ids
        state = RequestRow(
            row=row,
            request_id=new.request_id,
            sampling_params=new.sampling_params,
            seed=new.seed,
            num_prompt_tokens=new.num_prompt_tokens,
            num_tokens=count,
            bad_words_token_ids=new.bad_words_token_ids,
        )
        self.by_id[new.request_id] = state
        return state

    def drop(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored, since it may never have started."""
        state = self.by_id.pop(request_id, None)
        if state is not None:
            self._free_rows.append(state.row)

    def append_token(self, request_id: str, token_id: int) -> None:
        """Record a sampled token, which the request's next step will compute."""
        state = self.by_id[request_id]
        if state.num_tokens < self.token_ids.shape[1]:
            self.token_ids[state.row, state.num_tokens] = token_id
        state.num_tokens += 1

    def known_tokens(self, request_id: str) -> tuple[Int32, Int32]:
        """A request's prompt tokens and output tokens, as views."""
        state = self.by_id[request_id]
        tokens = self.token_ids[state.row, : state.num_tokens]
        return tokens[: state.num_prompt_tokens], tokens[state.num_prompt_tokens :]

    def apply(self, batch: ScheduledBatch) -> None:
        """Bring the rows up to the batch: forget, take in, extend block tables."""
        for request_id in batch.dropped_request_ids:
            self.drop(request_id)
        for new in batch.new_requests:
            self.add(new)
        for scheduled in batch.requests:
            if scheduled.new_block_ids:
                state = self.by_id[scheduled.request_id]
                start = scheduled.new_blocks_start  # a copy-on-write replaces the table's end
                start = state.num_blocks if start is None else start
                end = start + len(scheduled.new_block_ids)
                self.block_tables[state.row, start:end] = scheduled.new_block_ids
                state.num_blocks = max(state.num_blocks, end)

    def build(self, batch: ScheduledBatch) -> BatchArrays:
        """Gather the arrays of a step, after ``apply``."""
        requests = batch.requests
        count = len(requests)
        rows = np.fromiter((self.by_id[r.request_id].row for r in requests), np.int64, count)
        starts = np.fromiter((r.start for r in requests), np.int64, count)
        lengths = np.fromiter((r.num_tokens for r in requests), np.int64, count)
        samples = np.fromiter((r.samples for r in requests), np.bool_, count)
        # 1 Where each sequence's tokens lie in the flat batch.
        query_start_loc = np.zeros(count + 1, np.int64)
        np.cumsum(lengths, out=query_start_loc[1:])
        # 2 Each token's sequence, position, id and slot.
        sequence = np.repeat(np.arange(count), lengths)  # [T]
        positions = np.arange(query_start_loc[-1]) + (starts - query_start_loc[:-1])[sequence]
        token_rows = rows[sequence]
        blocks = self.block_tables[token_rows, positions // self.block_size].astype(np.int64)
        # 3 Only as many table columns as the longest sequence needs.
        seq_lens = starts + lengths
        num_columns = int(-(-seq_lens.max() // self.block_size))
        return BatchArrays(
            token_ids=self.token_ids[token_rows, positions].astype(np.int64),
            positions=positions,
            slot_mapping=blocks * self.block_size + positions % self.block_size,
            block_tables=np.ascontiguousarray(self.block_tables[rows, :num_columns]),
            seq_lens=seq_lens.astype(np.int32),
            query_start_loc=query_start_loc.astype(np.int32),
            logits_rows=query_start_loc[1:][samples] - 1,
        )
