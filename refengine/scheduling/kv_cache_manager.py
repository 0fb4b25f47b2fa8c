"""KVCacheManager: which blocks hold the keys and values of which request.

A request's block table lists its blocks in the order of its tokens: token ``t`` lies in block
``table[t // block_size]`` at offset ``t % block_size`` (PagedAttention, Kwon et al. 2023,
arXiv 2309.06180, section 4). Blocks are shared in two ways, and neither is ever written while
shared: full blocks that the hash index finds (prefix caching), and the blocks of a fork, whose
partly filled last one is copied before its first write (copy-on-write).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import sha256
from typing import NamedTuple

from refengine.request import Request
from refengine.scheduling.block_pool import Block, BlockPool


class NewBlocks(NamedTuple):
    """Blocks added to a table: at its end, or from index ``start`` on after a copy-on-write."""

    block_ids: tuple[int, ...] = ()
    start: int | None = None


NO_NEW_BLOCKS = NewBlocks()


def _needs_every_token(request: Request) -> bool:
    """Whether a runner must compute the whole prompt at one go, for more than its last logits."""
    params = request.sampling_params
    return params.prompt_logprobs is not None or params.pooling == "mean"


class BlockTable:
    """What the manager keeps of one request."""

    __slots__ = ("blocks", "forked", "hashes", "host_blocks", "stale")

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.hashes: list[bytes] = []  # of its full blocks, as far as they have been needed
        self.host_blocks: list[int] = []  # where its blocks lie while it is swapped out
        self.forked = False  # it shares, or has shared, blocks that are not full
        self.stale = False  # computed before the cache was reset: never to be found


class KVCacheManager:
    """Block tables over one pool, and host memory to swap to.

    Args:
        num_blocks: blocks of the KV cache.
        block_size: tokens a block.
        enable_prefix_caching: let requests find the full blocks that others have computed.
        num_host_blocks: blocks of host memory.
        reserved_tokens: tokens that every table has room for from the start.

    Raises:
        ValueError: if ``block_size`` or ``num_blocks`` is below 1.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = False,
        num_host_blocks: int = 0,
        reserved_tokens: int = 0,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1 token, got {block_size}")
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.enable_prefix_caching = enable_prefix_caching
        self.num_host_blocks = num_host_blocks
        self.reserved_tokens = reserved_tokens
        self._tables: dict[str, BlockTable] = {}
        self._free_host = list(range(num_host_blocks))
        # What the next step has to move, and what must stay as it is until then.
        self._copies: list[tuple[Block, Block]] = []
        self._swap_out: list[tuple[int, int]] = []
        self._swap_in: list[tuple[int, int]] = []

    @property
    def usage(self) -> float:
        """The share of blocks that tables hold, 0 to 1."""
        return 1 - self.pool.num_free / self.pool.num_blocks

    @property
    def num_free_host_blocks(self) -> int:
        """Blocks of host memory that hold nothing."""
        return len(self._free_host)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def block_ids(self, request_id: str) -> tuple[int, ...]:
        """A request's whole table; empty if it holds nothing."""
        table = self._tables.get(request_id)
        return tuple(block.block_id for block in table.blocks) if table else ()

    def match_prefix(self, request: Request) -> list[Block]:
        """The longest run of full blocks at a request's beginning that the cache holds.

        Its last token always stays to be computed, since only computing gives logits; so does the
        whole prompt where all of its tokens give something.
        """
        found: list[Block] = []
        if self.enable_prefix_caching and not _needs_every_token(request):
            usable = (request.num_tokens - 1) // self.block_size
            for block_hash in self._hashes(request, usable)[:usable]:
                block = self.pool.find(block_hash)
                if block is None:
                    break
                found.append(block)
        return found

    def allocate(
        self, request: Request, num_tokens: int, cached: Sequence[Block] = ()
    ) -> NewBlocks | None:
        """Give a request slots for its next ``num_tokens`` tokens.

        Args:
            request: who; tokens count from its ``num_computed_tokens``, or from the end of
                ``cached`` if that is further.
            num_tokens: how many.
            cached: what ``match_prefix`` found, for a request that holds no blocks yet.

        Returns:
            What was added to its table, or None, with nothing changed, if too few blocks are
            free: ``blocks_short`` says how many.
        """
        table = self._table(request.request_id)
        blocks = table.blocks
        start = request.num_computed_tokens
        if not table.forked and start + num_tokens <= len(blocks) * self.block_size:
            return NO_NEW_BLOCKS
        if self.blocks_short(request, num_tokens, cached):
            return None
        # 1 What the prefix cache found.
        for block in cached:
            self.pool.acquire(block)
        blocks.extend(cached)
        start = max(start, len(cached) * self.block_size)
        first_new, replaced = 0 if cached else len(blocks), None
        # 2 A block that is about to be written must be nobody else's, and not be found.
        first = start // self.block_size
        if table.forked and first < len(blocks):
            if self._is_shared(blocks[first]):
                copy = self.pool.allocate()
                self._copies.append((blocks[first], copy))
                blocks[first] = copy
                first_new = replaced = first
            else:
                self.pool.unindex(blocks[first])
        # 3 New blocks.
        end = max(start + num_tokens, self.reserved_tokens)
        while len(blocks) * self.block_size < end:
            blocks.append(self.pool.allocate())
        # 4 What lies in host memory comes back, except for what was found in the cache.
        if table.host_blocks:
            kept = len(cached)
            self._free_host += table.host_blocks[:kept]
            for host_block, block in zip(table.host_blocks[kept:], blocks[kept:], strict=False):
                self._swap_in.append((host_block, block.block_id))
            table.host_blocks = []
        return NewBlocks(tuple(block.block_id for block in blocks[first_new:]), replaced)

    def blocks_short(self, request: Request, num_tokens: int, cached: Sequence[Block] = ()) -> int:
        """Free blocks that are missing for ``allocate`` to succeed; 0 if none are."""
        table = self._table(request.request_id)
        start = max(request.num_computed_tokens, len(cached) * self.block_size)
        end = max(start + num_tokens, self.reserved_tokens)
        needed = max(0, self.num_blocks_for(end) - len(table.blocks) - len(cached))
        needed += sum(block.ref_count == 0 for block in cached)  # they are free, and will not be
        first = start // self.block_size
        needed += first < len(table.blocks) and self._is_shared(table.blocks[first])
        return max(0, needed - self.pool.num_free)

    def index_computed(self, request: Request, start: int) -> None:
        """Let those blocks be found that computing tokens from ``start`` on has filled."""
        table = self._tables[request.request_id]
        if self.enable_prefix_caching and not table.stale:
            end = request.num_computed_tokens // self.block_size
            hashes = self._hashes(request, end)
            for index in range(start // self.block_size, end):
                self.pool.index(table.blocks[index], hashes[index])

    def reset_prefix_cache(self) -> None:
        """Forget everything that was computed until now; running requests keep their blocks."""
        self.pool.reset_index()
        for table in self._tables.values():
            table.stale = bool(table.blocks or table.host_blocks)

    def fork(self, parent_id: str, child: Request) -> None:
        """Share with ``child`` the parent's blocks of the first ``num_computed_tokens`` tokens."""
        parent = self._tables[parent_id]
        table = self._table(child.request_id)
        table.blocks = parent.blocks[: self.num_blocks_for(child.num_computed_tokens)]
        for block in table.blocks:
            self.pool.acquire(block)
        table.hashes = parent.hashes[: child.num_computed_tokens // self.block_size]
        table.forked = parent.forked = True
        table.stale = parent.stale

    def swap_out(self, request: Request) -> bool:
        """Move what a request has computed to host memory; False if it can't, or has no room."""
        table = self._tables[request.request_id]
        count = self.num_blocks_for(request.num_computed_tokens)
        if not 0 < count <= len(self._free_host) or _needs_every_token(request):
            return False
        table.host_blocks = [self._free_host.pop() for _ in range(count)]
        for block, host_block in zip(table.blocks, table.host_blocks, strict=False):
            self._swap_out.append((block.block_id, host_block))
        self._release_blocks(table)
        return True

    def free(self, request_id: str) -> None:
        """Give back all that a request holds, if it holds anything."""
        table = self._tables.pop(request_id, None)
        if table is not None:
            self._release_blocks(table)
            self._free_host += table.host_blocks

    def take_moves(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Block copies, swaps out and swaps in, as pairs (source, destination), for one step.

        A runner does all swaps out, then all swaps in, then all copies. Sources that somebody
        else could overwrite in this very step are only free from now on.
        """
        copies = tuple((source.block_id, copy.block_id) for source, copy in self._copies)
        moves = copies, tuple(self._swap_out), tuple(self._swap_in)
        for source, _ in self._copies:
            self.pool.release(source)
        self._free_host += [host_block for host_block, _ in self._swap_in]
        for pending in (self._copies, self._swap_out, self._swap_in):
            pending.clear()
        return moves

    def check_invariants(self) -> None:
        """Walk every table and the pool; a test calls this after every step.

        Raises:
            RuntimeError: naming the first rule that is broken.
        """
        self.pool.check_invariants()
        references = [0] * self.pool.num_blocks
        host = sorted(self._free_host)
        for request_id, table in self._tables.items():
            host += table.host_blocks
            for index, block in enumerate(table.blocks):
                references[block.block_id] += 1
                if block.ref_count == 0:
                    raise RuntimeError(f"the table of {request_id!r} names {block}, which is free")
                known = table.hashes[index : index + 1]
                if known and block.block_hash not in (None, *known):
                    raise RuntimeError(f"{block} is found by other tokens than {request_id!r} has")
        for block, count in zip(self.pool.blocks, references, strict=True):
            if block.ref_count != count:
                raise RuntimeError(f"{block} stands in {count} tables")
        if sorted(host) != list(range(self.num_host_blocks)):
            raise RuntimeError(f"of {self.num_host_blocks} host blocks, {sorted(host)} are known")

    def _is_shared(self, block: Block) -> bool:
        """Whether more than one table names a block; sources of copies to come do not count.

        Copies are made before anything is computed, so the last table may write to the source.
        """
        return block.ref_count - sum(source is block for source, _ in self._copies) > 1

    def _table(self, request_id: str) -> BlockTable:
        table = self._tables.get(request_id)
        if table is None:
            table = self._tables[request_id] = BlockTable()
        return table

    def _hashes(self, request: Request, count: int) -> list[bytes]:
        """The hashes of at least the first ``count`` blocks of a request, all of them full.

        Each is the SHA-256 of the hash before it and its tokens; the chain begins with the salt. So
        equal hashes mean equal tokens from the very beginning, and nobody can forge another's.
        """
        hashes = self._table(request.request_id).hashes
        size = self.block_size
        if len(hashes) < count:
            token_ids = request.token_ids(len(hashes) * size, count * size)
            parent = hashes[-1] if hashes else sha256(ascii(request.cache_salt).encode()).digest()
            for begin in range(0, len(token_ids), size):
                content = array("q", token_ids[begin : begin + size]).tobytes()
                parent = sha256(parent + content).digest()
                hashes.append(parent)
        return hashes

    def _release_blocks(self, table: BlockTable) -> None:
        """Free a table's blocks, the last one first, so that prefixes live longest."""
        for block in reversed(table.blocks):
            self.pool.release(block)
        table.blocks = []
        table.forked = False
