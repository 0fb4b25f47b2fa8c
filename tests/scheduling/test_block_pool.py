from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from refengine.scheduling.block_pool import Block, BlockPool


def test_blocks_are_handed_out_once_until_freed() -> None:
    pool = BlockPool(3)
    blocks = [pool.allocate() for _ in range(3)]
    assert sorted(block.block_id for block in blocks) == [0, 1, 2]
    assert pool.num_free == 0
    with pytest.raises(RuntimeError, match="all 3 blocks are in use"):
        pool.allocate()
    pool.release(blocks[1])
    assert pool.allocate() is blocks[1]


def test_a_shared_block_is_free_after_its_last_release() -> None:
    pool = BlockPool(1)
    block = pool.allocate()
    pool.acquire(block)
    pool.release(block)
    assert pool.num_free == 0
    pool.release(block)
    assert pool.num_free == 1
    with pytest.raises(RuntimeError, match="block 0 is freed twice"):
        pool.release(block)


def test_the_least_recently_freed_findable_block_goes_first() -> None:
    pool = BlockPool(4)
    blocks = [pool.allocate() for _ in range(4)]
    for block in blocks[:3]:
        pool.index(block, b"%d" % block.block_id)
    for block in (blocks[2], blocks[0], blocks[3], blocks[1]):
        pool.release(block)
    # Block 3 can't be found by anybody, so it is used up before the others.
    assert [pool.allocate() for _ in range(4)] == [blocks[3], blocks[2], blocks[0], blocks[1]]


def test_a_free_block_is_found_until_it_is_handed_out() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.index(block, b"x")
    pool.release(block)
    assert pool.find(b"x") is block
    other = pool.allocate()
    assert other is not block
    assert pool.find(b"x") is block
    assert pool.allocate() is block
    assert pool.find(b"x") is None
    assert block.block_hash is None


def test_a_hit_takes_a_block_out_of_the_middle_of_the_queue() -> None:
    pool = BlockPool(3)
    blocks = [pool.allocate() for _ in range(3)]
    for block in blocks:
        pool.index(block, b"%d" % block.block_id)
        pool.release(block)
    pool.acquire(blocks[1])
    pool.check_invariants()
    assert pool.num_free == 2
    assert [pool.allocate(), pool.allocate()] == [blocks[0], blocks[2]]


def test_of_two_equal_blocks_the_first_stays_findable() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(), pool.allocate()
    pool.index(first, b"x")
    pool.index(second, b"x")
    assert pool.find(b"x") is first
    assert second.block_hash is None
    pool.check_invariants()


def test_reset_forgets_all_hashes_and_keeps_references() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.index(block, b"x")
    pool.reset_index()
    assert pool.find(b"x") is None
    assert block.ref_count == 1
    pool.check_invariants()


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 block, got 0"):
        BlockPool(0)


class PoolMachine(RuleBasedStateMachine):
    """A pool against a model of it: a list for the queue and a dict for the index."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.queue = list(self.pool.blocks)  # the model: head first
        self.held: list[Block] = []  # once per reference
        self.hashes: dict[int, Block] = {}

    @precondition(lambda self: self.queue)
    @rule()
    def allocate(self) -> None:
        block = self.pool.allocate()
        assert block is self.queue.pop(0)
        assert block.ref_count == 1
        self.held.append(block)
        self.hashes = {key: other for key, other in self.hashes.items() if other is not block}

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(block)
        if block not in self.held:
            self.queue.insert(len(self.queue) if block in self.hashes.values() else 0, block)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), key=st.integers(0, 8))
    def index(self, data: st.DataObject, key: int) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.pool.index(block, bytes([key]))
        if block not in self.hashes.values():
            self.hashes.setdefault(key, block)

    @rule(key=st.integers(0, 8))
    def hit(self, key: int) -> None:
        block = self.pool.find(bytes([key]))
        assert block is self.hashes.get(key)
        if block is not None:
            self.pool.acquire(block)
            self.held.append(block)
            if block in self.queue:
                self.queue.remove(block)

    @rule()
    def reset(self) -> None:
        self.pool.reset_index()
        self.hashes.clear()

    @invariant()
    def holds(self) -> None:
        self.pool.check_invariants()
        assert self.pool.num_free == len(self.queue)
        assert self.pool.num_indexed == len(self.hashes)
        for block in self.pool.blocks:
            assert block.ref_count == self.held.count(block)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)


def _used_block(pool: BlockPool) -> Block:
    block = pool.allocate()
    pool.index(block, b"x")
    return block


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda pool, block: setattr(block, "ref_count", 0), "do not make 3"),
        (lambda pool, block: setattr(pool.blocks[2], "ref_count", 1), "in the free queue and in"),
        (lambda pool, block: setattr(pool.blocks[2], "previous", block), "broken after"),
        (lambda pool, block: setattr(pool, "num_free", 3), "counted as 3"),
        (lambda pool, block: setattr(block, "block_hash", b"y"), "under a hash"),
        (lambda pool, block: setattr(pool.blocks[2], "block_hash", b"z"), "does not know"),
    ],
)
def test_check_invariants_sees_damage(damage, message: str) -> None:  # type: ignore[no-untyped-def]
    pool = BlockPool(3)
    block = _used_block(pool)
    pool.check_invariants()
    damage(pool, block)
    with pytest.raises(RuntimeError, match=message):
        pool.check_invariants()
