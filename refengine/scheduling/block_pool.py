"""Block and BlockPool: who holds which block of the KV cache, and which one goes next.

A block is ``block_size`` token slots in every layer's cache. The pool knows blocks only by number:
it counts references, keeps the free ones in a queue, and finds blocks by the hash of the tokens
they hold. The queue is an intrusive doubly linked list, so a block that a prefix hit brings back
leaves the middle of it in O(1) (as in vLLM's block pool).
"""

from __future__ import annotations


class Block:
    """One block; ``previous`` and ``next`` are its neighbours while it is free, or itself."""

    __slots__ = ("block_hash", "block_id", "next", "previous", "ref_count")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0  # tables that name it
        self.block_hash: bytes | None = None  # set while the index finds it
        self.previous = self.next = self

    def __repr__(self) -> str:
        return f"Block({self.block_id}, ref_count={self.ref_count})"


class BlockPool:
    """``num_blocks`` blocks, all free at first.

    A freed block keeps its hash, and can be found by it, until it is handed out again (lazy
    eviction). Blocks that nobody can find go to the head of the queue, to be used up first; the
    others go to its tail, so that the least recently freed one is evicted first (LRU).

    Raises:
        ValueError: if there is not at least one block.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a block pool needs at least 1 block, got {num_blocks}")
        self.blocks = [Block(block_id) for block_id in range(num_blocks)]
        self.num_free = 0
        self._index: dict[bytes, Block] = {}
        # The queue is a ring through one block that is never handed out: no end is special.
        self._ring = Block(-1)
        for block in self.blocks:
            self._link(block, before=self._ring)

    @property
    def num_blocks(self) -> int:
        """Blocks, free or used."""
        return len(self.blocks)

    @property
    def num_indexed(self) -> int:
        """Blocks that can be found by their hash."""
        return len(self._index)

    def allocate(self) -> Block:
        """Hand out the block at the head of the queue, with one reference and no hash.

        Raises:
            RuntimeError: if no block is free; ask ``num_free`` first.
        """
        block = self._ring.next
        if block is self._ring:
            raise RuntimeError(f"all {self.num_blocks} blocks are in use")
        self._unlink(block)
        self.unindex(block)
        block.ref_count = 1
        return block

    def acquire(self, block: Block) -> None:
        """Take one more reference, bringing the block back from the queue if it was free."""
        if block.ref_count == 0:
            self._unlink(block)
        block.ref_count += 1

    def release(self, block: Block) -> None:
        """Give one reference back; with the last one the block is free.

        Raises:
            RuntimeError: if nobody holds the block.
        """
        if block.ref_count < 1:
            raise RuntimeError(f"block {block.block_id} is freed twice")
        block.ref_count -= 1
        if block.ref_count == 0:
            found = block.block_hash is not None
            self._link(block, before=self._ring if found else self._ring.next)

    def find(self, block_hash: bytes) -> Block | None:
        """The block that holds the tokens of this hash, free or not."""
        return self._index.get(block_hash)

    def index(self, block: Block, block_hash: bytes) -> None:
        """Let a full, computed block be found; where two hold the same, the first one stays."""
        if block.block_hash is None and block_hash not in self._index:
            block.block_hash = block_hash
            self._index[block_hash] = block

    def unindex(self, block: Block) -> None:
        """Let a block be found no longer: its slots are about to be written."""
        if block.block_hash is not None:
            del self._index[block.block_hash]
            block.block_hash = None

    def reset_index(self) -> None:
        """Forget what every block holds."""
        for block in self._index.values():
            block.block_hash = None
        self._index.clear()

    def check_invariants(self) -> None:
        """Walk everything; a test calls this after every step.

        Raises:
            RuntimeError: naming the first rule that is broken.
        """
        free, block = 0, self._ring
        while block.next is not self._ring:
            if block.next.previous is not block:
                raise RuntimeError(f"the free queue is broken after {block}")
            block = block.next
            free += 1
            if block.ref_count != 0:
                raise RuntimeError(f"{block} is in the free queue and in use")
            if free > self.num_blocks:
                raise RuntimeError("the free queue runs in a circle")
        used = sum(block.ref_count > 0 for block in self.blocks)
        if free != self.num_free or free + used != self.num_blocks:
            raise RuntimeError(
                f"{free} blocks in the queue (counted as {self.num_free}) and {used} in use "
                f"do not make {self.num_blocks}"
            )
        for block_hash, block in self._index.items():
            if block.block_hash != block_hash:
                raise RuntimeError(f"the index finds {block} under a hash that it does not have")
        if sum(block.block_hash is not None for block in self.blocks) != len(self._index):
            raise RuntimeError("a block has a hash that the index does not know")

    def _link(self, block: Block, before: Block) -> None:
        block.previous, block.next = before.previous, before
        before.previous.next = before.previous = block
        self.num_free += 1

    def _unlink(self, block: Block) -> None:
        block.previous.next, block.next.previous = block.next, block.previous
        block.previous = block.next = block
        self.num_free -= 1
