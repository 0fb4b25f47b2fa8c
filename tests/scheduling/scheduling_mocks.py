"""A runner without a model, which checks every slot it reads, and short ways to make requests."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, field

from refengine.request import Request
from refengine.sampling_params import SamplingParams
from refengine.scheduling.scheduler import Scheduler, SchedulerConfig
from refengine.step import RequestStepOutput, ScheduledBatch, StepOutput

VOCAB_SIZE = 50


def digest(token_ids: tuple[int, ...], salt: str | None = None) -> bytes:
    """What a slot holds after its token was computed: it depends on all tokens up to it."""
    return hashlib.sha256(repr((token_ids, salt)).encode()).digest()


def next_token(token_ids: tuple[int, ...], seed: int) -> int:
    """The token that the mock model gives after these: of the request's own tokens and seed."""
    return digest(token_ids, str(seed))[0] % VOCAB_SIZE


def expected_tokens(request: Request, num_given: int = 0) -> list[int]:
    """What a request must give, whoever it shares its steps with, after output that was given."""
    tokens = list(request.token_ids(0, request.num_prompt_tokens + num_given))
    for _ in range((request.sampling_params.max_tokens or 0) - num_given):
        tokens.append(next_token(tuple(tokens), request.seed))
    return tokens[request.num_prompt_tokens :]


@dataclass
class Row:
    """What a runner knows of one resident request."""

    token_ids: list[int]
    seed: int
    table: list[int] = field(default_factory=list)
    num_computed: int = 0


def make_scheduler(**fields: object) -> tuple[Scheduler, MockRunner]:
    """A small scheduler, and a runner with the same blocks; prefix caching off unless asked for."""
    defaults: dict[str, object] = {
        "num_blocks": 64,
        "block_size": 4,
        "max_model_len": 64,
        "enable_prefix_caching": False,
    }
    config = SchedulerConfig(**(defaults | fields))  # type: ignore[arg-type]
    runner = MockRunner(config.num_blocks, config.block_size, config.num_host_blocks)
    return Scheduler(config, clock=itertools.count().__next__), runner


class MockRunner:
    """Carries out batches on a cache of digests; a wrong or missing slot is an AssertionError."""

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        self.block_size = block_size
        self.cache: list[list[bytes | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.host: list[list[bytes | None]] = [[None] * block_size for _ in range(num_host_blocks)]
        self.rows: dict[str, Row] = {}
        self.num_computed_tokens = 0

    def execute(self, batch: ScheduledBatch) -> StepOutput:
        for request_id in batch.dropped_request_ids:
            self.rows.pop(request_id, None)
        for new in batch.new_requests:
            assert new.request_id not in self.rows
            self.rows[new.request_id] = Row(
                list(new.token_ids), new.seed, num_computed=new.num_computed_tokens
            )
        self.move(batch)
        for scheduled in batch.requests:
            row = self.rows[scheduled.request_id]
            at = scheduled.new_blocks_start
            at = len(row.table) if at is None else at
            row.table[at:] = scheduled.new_block_ids
        # All slots are written before any is read, as in a layer of a model.
        written: list[tuple[int, int]] = []
        for scheduled in batch.requests:
            written += self.write(scheduled.request_id, scheduled.start, scheduled.num_tokens)
        assert len(written) == len(set(written)), "two requests write to one slot"
        outputs = []
        for scheduled in batch.requests:
            row = self.rows[scheduled.request_id]
            self.read(scheduled.request_id)
            assert scheduled.samples == (row.num_computed == len(row.token_ids))
            token_ids: tuple[int, ...] = ()
            if scheduled.samples:
                token_ids = (next_token(tuple(row.token_ids), row.seed),)
                row.token_ids += token_ids
            outputs.append(RequestStepOutput(scheduled.request_id, token_ids))
        return StepOutput(tuple(outputs))

    def move(self, batch: ScheduledBatch) -> None:
        for pairs, source, target in (
            (batch.swap_out, self.cache, self.host),
            (batch.swap_in, self.host, self.cache),
            (batch.block_copies, self.cache, self.cache),
        ):
            content = [list(source[src]) for src, _ in pairs]
            targets = [dst for _, dst in pairs]
            assert len(targets) == len(set(targets)), "two blocks are moved to one place"
            for dst, block in zip(targets, content, strict=True):
                target[dst] = block

    def write(self, request_id: str, start: int, num_tokens: int) -> list[tuple[int, int]]:
        row = self.rows[request_id]
        assert start == row.num_computed, "positions are computed once each, in order"
        assert 0 < num_tokens <= len(row.token_ids) - start
        row.num_computed += num_tokens
        self.num_computed_tokens += num_tokens
        slots = []
        for position in range(start, row.num_computed):
            block, offset = divmod(position, self.block_size)
            self.cache[row.table[block]][offset] = digest(tuple(row.token_ids[: position + 1]))
            slots.append((row.table[block], offset))
        return slots

    def read(self, request_id: str) -> None:
        row = self.rows[request_id]
        for position in range(row.num_computed):
            block, offset = divmod(position, self.block_size)
            held = self.cache[row.table[block]][offset]
            wanted = digest(tuple(row.token_ids[: position + 1]))
            assert held == wanted, f"{request_id} reads a wrong slot at position {position}"


def make_request(
    request_id: str = "a",
    prompt: int | tuple[int, ...] = 5,
    max_tokens: int | None = 4,
    **fields: object,
) -> Request:
    """A request with a prompt of so many tokens, or of these tokens."""
    request_fields = {name: fields.pop(name) for name in tuple(fields) if name in REQUEST_FIELDS}
    token_ids = tuple(range(100, 100 + prompt)) if isinstance(prompt, int) else prompt
    params = SamplingParams(max_tokens=max_tokens, **fields)  # type: ignore[arg-type]
    return Request(request_id, token_ids, params, **request_fields)  # type: ignore[arg-type]


REQUEST_FIELDS = {"arrival_time", "priority", "cache_salt", "seed", "eos_token_ids"}


def step(scheduler: Scheduler, runner: MockRunner) -> ScheduledBatch:
    """One step of the engine's loop, with every check that can be made from outside."""
    batch = scheduler.schedule()
    scheduler.check_invariants()
    config = scheduler.config
    assert batch.num_scheduled_tokens <= config.max_num_batched_tokens
    assert len(batch.requests) <= config.max_num_seqs
    assert batch.requests or not scheduler.has_unfinished_requests(), "nobody progresses"
    scheduler.update(batch, runner.execute(batch))
    scheduler.check_invariants()
    return batch


def drain(scheduler: Scheduler, runner: MockRunner, max_steps: int = 10_000) -> int:
    """Step until nothing is left; return the number of steps."""
    for count in range(max_steps):
        if not scheduler.has_unfinished_requests():
            assert scheduler.num_free_blocks == scheduler.num_blocks
            assert scheduler.kv.num_free_host_blocks == scheduler.config.num_host_blocks
            return count
        step(scheduler, runner)
    raise AssertionError(f"requests are left after {max_steps} steps")
