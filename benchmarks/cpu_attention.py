"""How fast the CPU's paged attention computes and reads, next to what the machine could do.

    python benchmarks/cpu_attention.py [--threads N] [--json]

Prefill is measured in GFLOP/s (of the products that the causal mask leaves), decode in GB
of cache read a second. Every call works on another layer's cache, as in a model, so that keys and
values come from memory. The bounds are read with the same number of threads: memory from end to
end, and in pages of the cache's size in any order, which is what decoding does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numba
import numpy as np

from refengine import cpu
from refengine.cpu.simd import splat, sum_lanes
from refengine.cpu.simd_memory import flat, load

NUM_LAYERS = 30
BLOCK_SIZE = 16
# (query heads, key-value heads, head_dim), SmolLM2-135M's first.
MODELS = ((9, 3, 64), (32, 8, 128), (16, 16, 64))
PREFILLS = ((1, 512, 512), (1, 2048, 2048), (1, 1024, 128))  # sequences, tokens, of them new
DECODES = ((1, 300), (16, 300), (32, 1000))  # sequences, tokens
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@numba.njit(parallel=True)
def read_pages(memory: Any, pages: Any, sums: Any) -> None:
    """Read float32 ``memory[page]`` for every page, each from its first to its last element."""
    size = memory.shape[1]
    for index in numba.prange(pages.shape[0]):
        total = splat(np.float32(0.0))
        for i in range(0, size, 16):
            total = total + load(flat(memory), pages[index] * size + i)
        sums[index] = sum_lanes(total)


def seconds(function: Callable[[], None], repeats: int = 7) -> float:
    """The median time of a call, the first one aside."""
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def read_rate(page_bytes: int, in_order: bool) -> float:
    """GB/s of reading 256 MB in pages."""
    memory = np.ones((2**28 // page_bytes, page_bytes // 4), np.float32)
    pages = np.arange(len(memory))
    if not in_order:
        np.random.default_rng(0).shuffle(pages)
    sums = np.empty(len(pages), np.float32)
    return memory.nbytes / seconds(lambda: read_pages(memory, pages, sums)) / 1e9


def measure(
    model: tuple[int, int, int], num_seqs: int, seq_len: int, query_len: int, dtype: str
) -> dict[str, Any]:
    """One layer's attention, averaged over the layers."""
    num_q_heads, num_kv_heads, head_dim = model
    random = np.random.default_rng(0)
    blocks = -(-seq_len // BLOCK_SIZE)
    size = (NUM_LAYERS, num_seqs * blocks, BLOCK_SIZE, num_kv_heads, head_dim)
    key_caches, value_caches = cpu.allocate_cache(*size, dtype)
    for caches in (key_caches, value_caches):
        caches[:] = random.standard_normal(size[2:], np.float32).astype(DTYPES[dtype])
    tables = random.permutation(num_seqs * blocks).astype(np.int32).reshape(num_seqs, blocks)
    lengths = np.full(num_seqs, seq_len, np.int32)
    starts = np.arange(num_seqs + 1, dtype=np.int32) * query_len
    query = random.standard_normal((num_seqs * query_len, num_q_heads, head_dim), np.float32)
    out = cpu.empty(query.shape)

    def every_layer() -> None:
        for keys, values in zip(key_caches, value_caches, strict=True):
            cpu.paged_attention(
                query, keys, values, tables, lengths, starts, head_dim**-0.5, None, None, out
            )

    took = seconds(every_layer) / NUM_LAYERS
    pairs = num_seqs * sum(range(seq_len - query_len + 1, seq_len + 1))
    return {
        "heads": f"{num_q_heads}/{num_kv_heads}x{head_dim}",
        "dtype": dtype,
        "sequences": num_seqs,
        "tokens": seq_len,
        "new": query_len,
        "us": round(took * 1e6, 1),
        "gflop_per_s": round(4 * pairs * num_q_heads * head_dim / took / 1e9, 1),
        "gb_per_s": round(
            2 * num_seqs * seq_len * num_kv_heads * head_dim * key_caches.itemsize / took / 1e9, 1
        ),
    }


def main() -> None:
    """Print one line a case, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=numba.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    numba.set_num_threads(options.threads)
    bounds = {"in order": round(read_rate(2**16, True), 1)}
    for page_bytes in (2**12, 2**14):
        bounds[f"pages of {page_bytes} bytes"] = round(read_rate(page_bytes, False), 1)
    if not options.json:
        print(f"{options.threads} threads; reading memory, GB/s: {bounds}")
    cases = []
    for model in MODELS:
        for dtype in DTYPES:
            shapes = [*PREFILLS, *((*decode, 1) for decode in DECODES)]
            for shape in shapes if model == MODELS[0] else (PREFILLS[0], (*DECODES[1], 1)):
                cases.append(measure(model, *shape, dtype))
                if not options.json:
                    print(*(f"{name} {value}" for name, value in cases[-1].items()), sep="  ")
    if options.json:
        print(json.dumps({"threads": options.threads, "bounds": bounds, "cases": cases}))


if __name__ == "__main__":
    main()
