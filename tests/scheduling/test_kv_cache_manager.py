from __future__ import annotations

import pytest
from scheduling_mocks import make_request

from refengine.scheduling.kv_cache_manager import KVCacheManager


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)]
)
def test_a_table_has_just_the_blocks_that_its_tokens_need(num_tokens: int, num_blocks: int) -> None:
    kv = KVCacheManager(num_blocks=5, block_size=4)
    new_blocks = kv.allocate(make_request("a"), num_tokens)
    assert new_blocks is not None
    assert len(new_blocks.block_ids) == num_blocks == kv.num_blocks_for(num_tokens)
    assert kv.block_ids("a") == new_blocks.block_ids
    assert new_blocks.start is None
    assert kv.usage == pytest.approx(num_blocks / 5)
    kv.check_invariants()


def test_a_table_grows_only_when_a_block_is_full() -> None:
    kv = KVCacheManager(num_blocks=5, block_size=4)
    request = make_request("a")
    added = []
    for num_computed in range(9):
        request.num_computed_tokens = num_computed
        new_blocks = kv.allocate(request, 1)
        assert new_blocks is not None
        added.append(len(new_blocks.block_ids))
    assert added == [1, 0, 0, 0, 1, 0, 0, 0, 1]


def test_too_few_free_blocks_change_nothing_and_are_counted() -> None:
    kv = KVCacheManager(num_blocks=3, block_size=4)
    assert kv.allocate(make_request("a"), 8)
    request = make_request("b")
    assert kv.allocate(request, 12) is None
    assert kv.blocks_short(request, 12) == 2
    assert kv.block_ids("b") == ()
    assert kv.pool.num_free == 1
    assert kv.allocate(request, 4)
    request.num_computed_tokens = 4
    assert kv.allocate(request, 5) is None
    assert kv.blocks_short(request, 5) == 2
    assert kv.blocks_short(make_request("c"), 0) == 0
    kv.check_invariants()


def test_free_gives_all_back_and_may_be_repeated() -> None:
    kv = KVCacheManager(num_blocks=3, block_size=4)
    kv.allocate(make_request("a"), 12)
    kv.free("a")
    kv.free("a")
    kv.free("never seen")
    assert kv.pool.num_free == 3
    assert kv.usage == 0
    kv.check_invariants()


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="block_size must be at least 1 token, got 0"):
        KVCacheManager(4, 0)
    with pytest.raises(ValueError, match="at least 1 block, got -1"):
        KVCacheManager(-1, 4)


def test_check_invariants_sees_a_table_that_names_a_free_block() -> None:
    kv = KVCacheManager(num_blocks=3, block_size=4)
    kv.allocate(make_request("a"), 8)
    kv.pool.release(kv.pool.blocks[0])
    with pytest.raises(RuntimeError, match="table of 'a' names Block\\(0"):
        kv.check_invariants()


def test_check_invariants_sees_a_leaked_block() -> None:
    kv = KVCacheManager(num_blocks=3, block_size=4)
    kv.allocate(make_request("a"), 8)
    kv.pool.allocate()
    with pytest.raises(RuntimeError, match="Block\\(2, ref_count=1\\) stands in 0 tables"):
        kv.check_invariants()
