"""Runner: what carries out a ``ScheduledBatch``; and ModelRunner, which does it with a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from refengine.config import ModelConfig
from refengine.execution.batch import BatchArrays, RequestRow, RequestRows
from refengine.execution.kernels import Array, KernelSet
from refengine.execution.sampler import Sampler, SamplingInput, top_logprobs
from refengine.execution.structured_output import Matcher, StructuredOutputs
from refengine.step import Logprob, RequestStepOutput, ScheduledBatch, StepOutput

# Prompt log-probabilities need a row of logits a token; this many rows at a time bound the memory.
PROMPT_LOGPROB_ROWS = 64


class Runner(Protocol):
    """The seam between the engine and whatever computes: a model, several ranks, a simulation."""

    @property
    def num_kv_blocks(self) -> int:
        """Blocks that the device's cache holds."""

    def execute(self, batch: ScheduledBatch) -> StepOutput:
        """Carry out one step."""

    def close(self) -> None:
        """Release what the runner holds."""


class Model(Protocol):
    """A decoder: ``Transformer``, or a compiled form of it with the same results."""

    def forward(self, batch: BatchArrays, key_caches: Array, value_caches: Array) -> Array:
        """Hidden states after the final norm, ``[T, hidden]``."""

    def logits(self, hidden: Array) -> Array:
        """``[R, hidden]`` to ``[R, vocab]`` float32."""


class ModelRunner:
    """Runs a model on one device.

    Args:
        model: the decoder.
        config: its numbers.
        kernels: the backend, for the cache and for moving blocks.
        num_kv_blocks: blocks in the cache.
        block_size: tokens a block.
        max_num_seqs: requests in one step at most.
        max_model_len: tokens a request may have.
        dtype: what the cache holds.
        num_host_blocks: blocks of host memory that preempted requests may be swapped to.
        structures: compiles structured outputs; None serves requests without any.
    """

    def __init__(
        self,
        model: Model,
        config: ModelConfig,
        kernels: KernelSet,
        *,
        num_kv_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        dtype: str,
        num_host_blocks: int = 0,
        structures: StructuredOutputs | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.kernels = kernels
        self.structures = structures
        self._num_kv_blocks = num_kv_blocks
        self.rows = RequestRows(max_num_seqs, max_model_len, block_size)
        self.sampler = Sampler(config.eos_token_ids)
        shape = (block_size, config.num_key_value_heads, config.head_dim)
        layers = config.num_hidden_layers
        self.key_caches, self.value_caches = kernels.allocate_cache(
            layers, num_kv_blocks, *shape, dtype
        )
        self.host_caches = kernels.allocate_host_cache(layers, num_host_blocks, *shape, dtype)

    @property
    def num_kv_blocks(self) -> int:
        """Blocks in the cache."""
        return self._num_kv_blocks

    def execute(self, batch: ScheduledBatch) -> StepOutput:
        """Carry out one step: move blocks, compute, sample."""
        clock = _PartClock()
        # 1 Requests come and go, tables grow, blocks are copied before anything writes to them.
        self.rows.apply(batch)
        self._move_blocks(batch)
        if not batch.requests:
            return StepOutput((), clock.seconds)
        # 2 Flat arrays.
        arrays = self.rows.build(batch)
        clock.lap("prepare")
        # 3 All layers, for all tokens.
        hidden = self.model.forward(arrays, self.key_caches, self.value_caches)  # [T, H]
        clock.lap("forward")
        # 4 Logits of the rows that sample, and their tokens.
        sampled = self._sample(batch, arrays, hidden, clock.lap)
        outputs = []
        for index, scheduled in enumerate(batch.requests):
            params = self.rows[scheduled.request_id].sampling_params
            prompt_logprobs = None
            if params.prompt_logprobs is not None:
                prompt_logprobs = self._prompt_logprobs(batch, index, arrays, hidden)
            token = sampled.get(scheduled.request_id)
            outputs.append(
                RequestStepOutput(
                    request_id=scheduled.request_id,
                    token_ids=() if token is None else (token.token_id,),
                    logprobs=None if token is None or token.logprobs is None else (token.logprobs,),
                    prompt_logprobs=prompt_logprobs,
                    embedding=None
                    if params.pooling is None
                    else self._pool(batch, index, arrays, hidden),
                )
            )
            if token is not None:
                self.rows.append_token(scheduled.request_id, token.token_id)
        clock.lap("sample")
        return StepOutput(tuple(outputs), clock.seconds)

    def warm_up(self) -> None:
        """Run the model once on two made-up sequences, writing nothing to the cache."""
        arrays = BatchArrays(
            token_ids=np.zeros(4, np.int64),
            positions=np.array([0, 0, 1, 2], np.int64),
            slot_mapping=np.full(4, -1, np.int64),
            block_tables=np.zeros((2, 3), np.int32),
            seq_lens=np.array([1, 3], np.int32),
            query_start_loc=np.array([0, 1, 4], np.int32),
            logits_rows=np.array([0, 3], np.int64),
        )
        hidden = self.model.forward(arrays, self.key_caches, self.value_caches)
        self.model.logits(hidden[arrays.logits_rows])

    def close(self) -> None:
        """Drop the cache."""
        del self.key_caches, self.value_caches, self.host_caches

    def _move_blocks(self, batch: ScheduledBatch) -> None:
        """Swap out, swap in, copy, in this order: a block may be vacated and filled in one step."""
        device = (self.key_caches, self.value_caches)
        for moves, source, destination in (
            (batch.swap_out, device, self.host_caches),
            (batch.swap_in, self.host_caches, device),
        ):
            if moves:
                mapping = np.array(moves, np.int64)  # [pairs, 2]
                self.kernels.swap_blocks(*source, *destination, mapping)
        if batch.block_copies:
            mapping = np.array(batch.block_copies, np.int64)  # [pairs, 2]
            self.kernels.copy_blocks(*device, mapping)

    def _sample(
        self,
        batch: ScheduledBatch,
        arrays: BatchArrays,
        hidden: Array,
        lap: Callable[[str], None],
    ) -> dict[str, Any]:
        """Tokens by request id, for the requests whose last position this step computed."""
        ids = [scheduled.request_id for scheduled in batch.requests if scheduled.samples]
        if not ids:
            return {}
        logits = np.asarray(self.model.logits(hidden[arrays.logits_rows]))  # [R, V]
        lap("logits")
        inputs = []
        for request_id in ids:
            state = self.rows[request_id]
            prompt, output = self.rows.known_tokens(request_id)
            inputs.append(
                SamplingInput(
                    state.sampling_params,
                    state.seed,
                    prompt,
                    output,
                    state.bad_words_token_ids,
                    self._allowed(state, output),
                )
            )
        return dict(zip(ids, self.sampler.sample(logits, inputs), strict=True))

    def _allowed(self, state: RequestRow, output: Array) -> npt.NDArray[np.bool_] | None:
        """Tokens ``[vocab]`` that a request's structure allows next; None: all of them."""
        structure = state.sampling_params.structured_output
        if structure is None or self.structures is None:
            return None
        # A row is made anew after a preemption, and so is its matcher.
        matcher = state.extra.get("matcher")
        if not isinstance(matcher, Matcher):
            matcher = self.structures.matcher(structure)
            state.extra["matcher"] = matcher
        return matcher.allowed(output)

    def _pool(
        self, batch: ScheduledBatch, index: int, arrays: BatchArrays, hidden: Array
    ) -> tuple[float, ...] | None:
        """A pooling request's embedding ``[hidden]`` once its whole prompt is computed."""
        scheduled = batch.requests[index]
        state = self.rows[scheduled.request_id]
        first, end = (int(row) for row in arrays.query_start_loc[index : index + 2])
        if state.sampling_params.pooling == "last":
            pooled = np.asarray(hidden[end - 1 : end], np.float64)[0]
        else:
            # A prompt may come in several steps.
            part = np.asarray(hidden[first:end], np.float64).sum(axis=0)
            so_far: Any = state.extra.get("hidden_sum", 0.0)
            pooled = so_far + part
            state.extra["hidden_sum"] = pooled
            pooled = pooled / state.num_prompt_tokens
        return tuple(pooled.tolist()) if scheduled.samples else None

    def _prompt_logprobs(
        self, batch: ScheduledBatch, index: int, arrays: BatchArrays, hidden: Array
    ) -> tuple[dict[int, Logprob], ...]:
        """Log-probabilities of the prompt tokens that follow the positions of this step."""
        scheduled = batch.requests[index]
        state = self.rows[scheduled.request_id]
        count = state.sampling_params.prompt_logprobs
        prompt, _ = self.rows.known_tokens(scheduled.request_id)
        first = int(arrays.query_start_loc[index])
        # Position p predicts token p + 1, as long as that is still prompt.
        positions = range(
            scheduled.start, min(scheduled.start + scheduled.num_tokens, prompt.size - 1)
        )
        result = []
        for begin in range(0, len(positions), PROMPT_LOGPROB_ROWS):
            part = positions[begin : begin + PROMPT_LOGPROB_ROWS]
            rows = np.arange(len(part)) + first + begin
            logits = np.asarray(self.model.logits(hidden[rows]))  # [rows, V]
            for row, position in enumerate(part):
                result.append(top_logprobs(logits[row], int(prompt[position + 1]), count or 0))
        return tuple(result)


class _PartClock:
    """Seconds by part of a step; reported, never decided on, so it needs no injected clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now
