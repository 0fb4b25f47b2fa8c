"""The CPU's matrix product beside this machine's ceilings, NumPy and, where installed, torch.

    python benchmarks/cpu_linear.py [--rows 1,8,32] [--shapes 3072x576] [--dtype float32] [--json]

Weights are cold, as in a decoder: each shape has copies enough to exceed the caches, and a pass
goes through all of them. Contenders take turns within each round, so that a neighbour's load meets
all of them, with a rest between, since each library's idle threads spin for a while; figures are
medians over rounds. Ceilings are measured in the same run: reading memory, and the product's own
innermost tile on operands that never leave the first-level cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import ml_dtypes
import numba
import numpy as np

from refengine.cpu import allocate_weights, linear, store_weight
from refengine.cpu.arrays import aligned_empty
from refengine.cpu.calls import call_address
from refengine.cpu.jit import parallel
from refengine.cpu.matrix_product import block_kernel
from refengine.cpu.simd import LANES, splat, sum_lanes
from refengine.cpu.simd_memory import flat, load
from refengine.cpu.tile_kernels import PANEL, TILE_ROWS
from refengine.cpu.words import word_dtype

# SmolLM2-135M: query-key-value, output, gate and up, down, and the vocabulary.
SHAPES = "960x576,576x576,3072x576,576x1536,49152x576"
ROWS = "1,2,4,8,16,32,64,128,256,512"
COLD_BYTES = 100e6  # what the copies of a shape take together
ROUND_SECONDS = 0.05  # a contender's share of a round, at least one pass
REST_SECONDS = 0.1  # until the threads of the contender before have gone to sleep
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


# ---------------------------------------------------------------- ceilings


@parallel
def _read(memory: Any, sums: Any, threads: int) -> None:
    vectors = memory.shape[0] // LANES
    for thread in numba.prange(threads):
        first, last = vectors * thread // threads, vectors * (thread + 1) // threads
        a = b = c = d = splat(np.float32(0.0))
        for i in range(first, last - 3, 4):
            at = i * LANES
            a, b = a + load(flat(memory), at), b + load(flat(memory), at + LANES)
            c, d = c + load(flat(memory), at + 2 * LANES), d + load(flat(memory), at + 3 * LANES)
        sums[thread] = sum_lanes((a + b) + (c + d))


def read_ceiling(threads: int) -> list[float]:
    """GB/s of reading 400 MB, median and best."""
    memory, sums = np.ones(100_000_000, np.float32), np.zeros(threads, np.float32)
    seconds = times_of(lambda: _read(memory, sums, threads))
    return [memory.nbytes / s / 1e9 for s in seconds]


@parallel
def _tiles(
    kernel: int, panels: Any, words: Any, init: Any, out: Any, rows: int, steps: int, repeats: int,
    threads: int,
) -> None:  # fmt: skip
    for thread in numba.prange(threads):
        for _ in range(repeats):
            call_address(
                kernel, flat(panels), 0, steps, flat(words), words.shape[1], flat(init), 0,
                flat(out[np.int64(thread)]), PANEL, 0, rows, 0,
            )  # fmt: skip


def tile_ceiling(dtype: str, threads: int) -> list[float]:
    """GFLOP/s of one tile over and over, median and best."""
    steps, repeats, inputs = 64, 20_000, 2 if dtype == "bfloat16" else 1
    stored = np.dtype(np.uint16 if dtype == "bfloat16" else np.float32)
    panels = aligned_empty((1, steps, PANEL, inputs), stored)
    words = np.zeros((TILE_ROWS, steps * 2), word_dtype(stored))
    panels[...] = 0
    init = np.zeros(PANEL, np.float32)
    out = np.zeros((threads, TILE_ROWS, PANEL), np.float32)
    kernel = block_kernel(stored, words.dtype)
    seconds = times_of(
        lambda: _tiles(kernel, panels, words, init, out, TILE_ROWS, steps, repeats, threads)
    )
    work = 2e-9 * threads * repeats * TILE_ROWS * PANEL * steps * inputs
    return [work / s for s in seconds]


def times_of(run: Callable[[], object], times: int = 9) -> list[float]:
    """Median and least seconds of some runs, after one that compiles."""
    run()
    seconds = [timed(run) for _ in range(times)]
    return [statistics.median(seconds), min(seconds)]


def timed(run: Callable[[], object]) -> float:
    """Seconds of one run."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


# ---------------------------------------------------------------- contenders


def contenders(
    out_features: int, in_features: int, rows: int, dtype: str, use_torch: bool
) -> tuple[int, dict[str, Callable[[], object]]]:
    """How many matrices a pass multiplies, and each contender's pass."""
    rng = np.random.default_rng(0)
    count = max(
        2, int(COLD_BYTES / (out_features * in_features * np.dtype(DTYPES[dtype]).itemsize))
    )
    matrix = rng.standard_normal((out_features, in_features), np.float32)
    weights = allocate_weights(count, out_features, in_features, dtype)
    for index in range(count):
        store_weight(weights, index, matrix)
    x = rng.standard_normal((rows, in_features), np.float32)
    out = np.empty((rows, out_features), np.float32)
    packed = [weights[index] for index in range(count)]
    passes: dict[str, Callable[[], object]] = {
        "refengine": lambda: [linear(x, weight, None, out) for weight in packed]
    }
    plain = [matrix.copy() for _ in range(count)]  # NumPy multiplies float32 alone
    passes["numpy float32"] = lambda: [np.matmul(x, weight.T, out=out) for weight in plain]
    if use_torch:
        import torch

        kind = getattr(torch, dtype)
        torch_weights = [torch.from_numpy(matrix).to(kind, copy=True) for _ in range(count)]
        torch_x = torch.from_numpy(x).to(kind)

        def torch_pass() -> object:
            with torch.inference_mode():
                return [torch.nn.functional.linear(torch_x, weight) for weight in torch_weights]

        passes[f"torch {dtype}"] = torch_pass
    return count, passes


def measure(
    out_features: int, in_features: int, rows: int, dtype: str, use_torch: bool, rounds: int
) -> list[dict[str, Any]]:
    """One result a contender."""
    count, passes = contenders(out_features, in_features, rows, dtype, use_torch)
    repeats = {
        name: max(1, int(ROUND_SECONDS / times_of(run, times=1)[0])) for name, run in passes.items()
    }
    times: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(rounds):
        for name, run in passes.items():
            time.sleep(REST_SECONDS)
            run()
            seconds = timed(lambda run=run, name=name: [run() for _ in range(repeats[name])])
            times[name].append(seconds / repeats[name] / count)
    results = []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        bytes_each = 4 if name.endswith("float32") else np.dtype(DTYPES[dtype]).itemsize
        results.append(
            {
                "contender": name,
                "out_features": out_features,
                "in_features": in_features,
                "rows": rows,
                "microseconds": median * 1e6,
                "gflops": 2e-9 * rows * out_features * in_features / median,
                "weight_gb_per_s": 1e-9 * bytes_each * out_features * in_features / median,
            }
        )
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--shapes", default=SHAPES, help="OUTxIN, ...")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    threads, use_torch = numba.get_num_threads(), find_spec("torch") is not None
    if use_torch:
        import torch

        torch.set_num_threads(threads)
    reading, tiles = read_ceiling(threads), tile_ceiling(arguments.dtype, threads)
    if not arguments.json:
        print(
            f"{threads} threads, median (best): reading memory {reading[0]:.1f} "
            f"({reading[1]:.1f}) GB/s; {arguments.dtype} tiles {tiles[0]:.0f} ({tiles[1]:.0f}) "
            "GFLOP/s"
        )
        print(f"{'shape':>12} {'rows':>5}  GFLOP/s (GB/s of weights)")
    results = []
    for shape in arguments.shapes.split(","):
        out_features, in_features = (int(size) for size in shape.split("x"))
        for rows in (int(count) for count in arguments.rows.split(",")):
            found = measure(
                out_features, in_features, rows, arguments.dtype, use_torch, arguments.rounds
            )
            results += found
            if not arguments.json:
                texts = (
                    f"{r['contender']} {r['gflops']:.0f} ({r['weight_gb_per_s']:.1f})"
                    for r in found
                )
                print(f"{shape:>12} {rows:>5}  {'   '.join(texts)}", flush=True)
    if arguments.json:
        names = ("median", "best")
        ceilings = {
            "read_gb_per_s": dict(zip(names, reading, strict=True)),
            "tile_gflops": dict(zip(names, tiles, strict=True)),
        }
        report = {"dtype": arguments.dtype, "threads": threads, **ceilings, "results": results}
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
