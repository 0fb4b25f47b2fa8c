"""KVCacheManager: which blocks hold the keys and values of which request.

A request's block table lists its blocks in the order of its tokens: token ``t`` lies in block
``table[t // block_size]`` at offset ``t % block_size`` (PagedAttention, Kwon et al. 2023,
arXiv 2309.06180, section 4.2). Tables only grow while a request is resident, so nothing here does
work in proportion to the context's length on an ordinary step.
"""

from __future__ import annotations

from refengine.request import Request
from refengine.scheduling.block_pool import Block, BlockPool


class BlockTable:
    """What the manager keeps of one resident request."""

    __slots__ = ("blocks",)

    def __init__(self) -> None:
        self.blocks: list[Block] = []


class KVCacheManager:
    """Block tables over one pool.

    Raises:
        ValueError: if ``block_size`` or ``num_blocks`` is below 1.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1 token, got {block_size}")
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self._tables: dict[str, BlockTable] = {}

    @property
    def usage(self) -> float:
        """The share of blocks that tables hold, 0 to 1."""
        return 1 - self.pool.num_free / self.pool.num_blocks

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def block_ids(self, request_id: str) -> tuple[int, ...]:
        """A request's whole table; empty if it holds nothing."""
        table = self._tables.get(request_id)
        return tuple(block.block_id for block in table.blocks) if table else ()

    def allocate(self, request: Request, num_tokens: int) -> tuple[int, ...] | None:
        """Give a request slots for its next ``num_tokens`` tokens.

        Returns:
            The ids of the blocks added to its table, or None, with nothing changed, if too few
            are free: ``blocks_short`` says how many.
        """
        table = self._tables.get(request.request_id)
        if table is None:
            table = self._tables[request.request_id] = BlockTable()
        blocks = table.blocks
        end = request.num_computed_tokens + num_tokens
        if end <= len(blocks) * self.block_size:
            return ()
        num_new = self.num_blocks_for(end) - len(blocks)
        if num_new > self.pool.num_free:
            if not blocks:
                del self._tables[request.request_id]
            return None
        new_blocks = [self.pool.allocate() for _ in range(num_new)]
        blocks.extend(new_blocks)
        return tuple(block.block_id for block in new_blocks)

    def blocks_short(self, request: Request, num_tokens: int) -> int:
        """Free blocks that are missing for ``allocate`` to succeed; 0 if none are."""
        held = len(self.block_ids(request.request_id))
        needed = self.num_blocks_for(request.num_computed_tokens + num_tokens) - held
        return max(0, needed - self.pool.num_free)

    def free(self, request_id: str) -> None:
        """Give back all that a request holds, the last block first, so that prefixes live longest.

        A request that holds nothing may be freed too.
        """
        table = self._tables.pop(request_id, None)
        if table is not None:
            for block in reversed(table.blocks):
                self.pool.release(block)

    def check_invariants(self) -> None:
        """Walk every table and the pool; a test calls this after every step.

        Raises:
            RuntimeError: naming the first rule that is broken.
        """
        self.pool.check_invariants()
        references = [0] * self.pool.num_blocks
        for request_id, table in self._tables.items():
            for block in table.blocks:
                references[block.block_id] += 1
                if block.ref_count == 0:
                    raise RuntimeError(f"the table of {request_id!r} names {block}, which is free")
        for block, count in zip(self.pool.blocks, references, strict=True):
            if block.ref_count != count:
                raise RuntimeError(f"{block} stands in {count} tables")
