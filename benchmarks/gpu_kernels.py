"""Checks every CUDA kernel against float64, then times it beside the card's ceilings and peers.

On a machine with an NVIDIA GPU: ``python benchmarks/gpu_kernels.py [--json FILE] [--only TEXT]``.

Times are medians over replays of a CUDA graph that holds many launches and rotates among inputs
larger than the L2 cache together, so neither the host nor the cache flatters them. Attention's
share is of the read ceiling (keys and values) or in TFLOP/s (of the causal triangle alone).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from refengine.cuda import activation, blocks, launch, paged_attention, rms_norm, rotary, write_kv

Run = Callable[[], object]
L2_BYTES = 200e6  # what rotated inputs exceed together
DEVICE = "cuda"


# ---------------------------------------------------------------- timing


def graph_time(runs: Sequence[Run], *, target_ms: float = 6.0, replays: int = 7) -> float:
    """Microseconds of one run: median over replays of a graph that goes through ``runs``."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    runs[0]()
    stop.record()
    torch.cuda.synchronize()
    once = max(start.elapsed_time(stop), 2e-3)
    count = max(len(runs), min(64, int(target_ms / once)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for i in range(count):
            runs[i % len(runs)]()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / count * 1e3)
    return statistics.median(times)


def host_time(run: Run, count: int = 400) -> float:
    """Microseconds that one launch keeps the host busy."""
    import time

    for _ in range(20):
        run()
    rounds = []
    for _ in range(9):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            run()
        rounds.append((time.perf_counter() - begin) / count * 1e6)
    torch.cuda.synchronize()
    return statistics.median(rounds)


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """``|out - reference| / |reference|``; NaN anywhere gives NaN."""
    difference = torch.linalg.norm(out.double() - reference.double())
    return float(difference / torch.linalg.norm(reference.double()))


def ceilings() -> dict[str, float]:
    """What this card does here and now: copy and read in TB/s, bf16 products in TFLOP/s."""
    a = torch.randn(2**28, device=DEVICE)
    b = torch.empty_like(a)
    copy = 2 * a.nbytes / graph_time([partial(torch.neg, a, out=b)]) / 1e6
    read = a.nbytes / graph_time([partial(torch.sum, a)]) / 1e6
    x, y = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = partial(torch.matmul, x, y, out=torch.empty_like(x))
    gemm = 2 * 8192**3 / graph_time([product]) / 1e6
    return {"copy TB/s": copy, "read TB/s": read, "bf16 GEMM TFLOP/s": gemm}


# ---------------------------------------------------------------- attention


class Attention:
    """One batch of paged attention: caches full of NaN where no sequence owns the slot."""

    def __init__(
        self,
        lens: Sequence[int],
        news: Sequence[int],
        *,
        heads: tuple[int, int] = (32, 8),
        head_dim: int = 128,
        block_size: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        window: int | None = None,
        cap: float | None = None,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator(device=DEVICE).manual_seed(seed)
        self.lens, self.news, self.window, self.cap = list(lens), list(news), window, cap
        self.num_q, self.num_kv = heads
        self.head_dim, self.block_size, self.dtype = head_dim, block_size, dtype
        counts = [-(-n // block_size) for n in lens]
        total = sum(counts) + 1
        shape = (total, block_size, self.num_kv, head_dim)
        self.key_cache = torch.empty(shape, device=DEVICE, dtype=dtype)
        self.value_cache = torch.empty(shape, device=DEVICE, dtype=dtype)
        for cache in (self.key_cache, self.value_cache):
            for part in cache.split(4096):
                part.copy_(torch.randn(part.shape, device=DEVICE, generator=generator))
        order = torch.randperm(total, device=DEVICE, generator=generator).to(torch.int32)
        self.tables = torch.zeros(len(lens), max([*counts, 1]), device=DEVICE, dtype=torch.int32)
        first = 0
        for i, (count, length) in enumerate(zip(counts, lens, strict=True)):
            self.tables[i, :count] = order[first : first + count]
            first += count
            if length % block_size:
                for cache in (self.key_cache, self.value_cache):
                    cache[self.tables[i, count - 1].long(), length % block_size :] = torch.nan
        self.seq_lens = torch.tensor(lens, device=DEVICE, dtype=torch.int32)
        starts = torch.tensor([0, *news]).cumsum(0)
        self.starts = starts.to(device=DEVICE, dtype=torch.int32)
        tokens = int(starts[-1])
        shape = (tokens, self.num_q, head_dim)
        self.query = torch.randn(shape, device=DEVICE, generator=generator).to(dtype)
        self.out = torch.full_like(self.query, torch.nan)
        self.scale = head_dim**-0.5

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (
            *(self.query, self.key_cache, self.value_cache, self.tables, self.seq_lens),
            *(self.starts, self.scale, self.window, self.cap, self.out),
        )

    def run(self) -> None:
        """Through the public function."""
        paged_attention.paged_attention(*self.arguments)

    @property
    def kv_bytes(self) -> int:
        seen = [min(n, self.window or n) for n in self.lens]
        return 2 * sum(seen) * self.num_kv * self.head_dim * self.key_cache.element_size()

    @property
    def flops(self) -> int:
        pairs = 0
        for length, new in zip(self.lens, self.news, strict=True):
            limit = self.window or length
            pairs += sum(min(at + 1, limit) for at in range(length - new, length))
        return 4 * pairs * self.num_q * self.head_dim

    def contiguous(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequence ``i``'s keys and values, ``[length, heads, head_dim]``."""
        length = self.lens[i]
        blocks = self.tables[i, : -(-length // self.block_size)].long()
        rows = (length, self.num_kv, self.head_dim)
        return tuple(
            cache[blocks].flatten(0, 1)[:length].reshape(rows)
            for cache in (self.key_cache, self.value_cache)
        )  # type: ignore[return-value]

    def error(self, sequences: Sequence[int], rows: int = 256) -> float:
        """Against float64, for the last ``rows`` new tokens of some sequences; worst of them."""
        worst = 0.0
        for i in sequences:
            length, new = self.lens[i], min(self.news[i], rows)
            if not new:
                continue
            end = int(self.starts[i + 1])
            keys, values = (x.double().movedim(1, 0) for x in self.contiguous(i))
            group = self.num_q // self.num_kv
            query = self.query[end - new : end].double().movedim(1, 0)
            result = torch.empty_like(query)
            at = torch.arange(length - new, length, device=DEVICE)[:, None]
            key_at = torch.arange(length, device=DEVICE)[None]
            seen = (key_at <= at) & (key_at > at - (self.window or length))
            for h in range(self.num_q):
                scores = query[h] @ keys[h // group].T * self.scale
                if self.cap:
                    scores = self.cap * torch.tanh(scores / self.cap)
                weights = torch.softmax(scores.masked_fill(~seen, -math.inf), -1)
                result[h] = weights @ values[h // group]
            got = self.out[end - new : end].movedim(1, 0)
            error = relative_error(got, result)
            worst = error if math.isnan(error) else max(worst, error)
        return worst


def sdpa(problem: Attention, backend: Any) -> Run | None:
    """torch's attention on contiguous keys and values, where it takes such a batch."""
    if len(set(problem.lens)) > 1 or len(set(problem.news)) > 1 or problem.window or problem.cap:
        return None
    count, new, length = len(problem.lens), problem.news[0], problem.lens[0]
    if new not in (1, length):
        return None
    pairs = [problem.contiguous(i) for i in range(count)]
    keys = torch.stack([k for k, _ in pairs]).transpose(1, 2)  # [seqs, heads, length, dim]
    values = torch.stack([v for _, v in pairs]).transpose(1, 2)
    query = problem.query.view(count, new, problem.num_q, problem.head_dim).transpose(1, 2)

    def run() -> None:
        with torch.nn.attention.sdpa_kernel(backend):
            torch.nn.functional.scaled_dot_product_attention(
                query, keys, values, is_causal=new > 1, enable_gqa=True
            )

    try:
        run()
    except RuntimeError:
        return None
    return run


DECODE = {
    "decode 64 x 512": {"lens": [512] * 64},
    "decode 64 x 2048": {"lens": [2048] * 64},
    "decode 64 x 8192": {"lens": [8192] * 64},
    "decode 1 x 32768": {"lens": [32768]},
    "decode 64 x 2048, 14/2/64": {"lens": [2048] * 64, "heads": (14, 2), "head_dim": 64},
    "decode 1 x 2048": {"lens": [2048]},
    "decode 64 ragged": {"lens": [64 * (i + 1) for i in range(64)]},
    "decode 256 x 700": {"lens": [700] * 256},
    "decode 64 x 2048, float16": {"lens": [2048] * 64, "dtype": torch.float16},
    "decode 64 x 2048, head_dim 64": {"lens": [2048] * 64, "head_dim": 64},
    "decode 64 x 2048, head_dim 80": {"lens": [2048] * 64, "head_dim": 80},
    "decode 64 x 2048, head_dim 96": {"lens": [2048] * 64, "head_dim": 96},
    "decode 64 x 2048, head_dim 256": {"lens": [2048] * 64, "head_dim": 256, "heads": (16, 4)},
    "decode 64 x 2048, 64/4 heads": {"lens": [2048] * 64, "heads": (64, 4)},
    "decode 64 x 2048, 9/3/64": {"lens": [2048] * 64, "heads": (9, 3), "head_dim": 64},
    "decode 64 x 8192, window 1024": {"lens": [8192] * 64, "window": 1024},
    "decode 64 x 2048, blocks of 1": {"lens": [2048] * 64, "block_size": 1},
    "decode 64 x 2048, blocks of 8": {"lens": [2048] * 64, "block_size": 8},
    "decode 16 x 2048, float32": {"lens": [2048] * 16, "dtype": torch.float32},
}
PREFILL = {
    "prefill 1 x 8192": {"lens": [8192], "news": [8192]},
    "prefill 8 x 1024": {"lens": [1024] * 8, "news": [1024] * 8},
    "prefill 4 x 512 over 3584": {"lens": [4096] * 4, "news": [512] * 4},
    "prefill ragged": {"lens": [37, 511, 1300, 2048, 700], "news": [37, 511, 1300, 2048, 700]},
    "prefill 1 x 8192, head_dim 64": {"lens": [8192], "news": [8192], "head_dim": 64},
    "prefill 1 x 8192, head_dim 256": {
        "lens": [8192], "news": [8192], "head_dim": 256, "heads": (16, 4),
    },
    "prefill 1 x 8192, window 1024": {"lens": [8192], "news": [8192], "window": 1024},
    "prefill 1 x 8192, soft cap": {"lens": [8192], "news": [8192], "cap": 50.0},
}  # fmt: skip


def attention_row(name: str, case: dict[str, Any], read: float) -> dict[str, Any]:
    """One attention case: error, time, share of the bound, peers."""
    from torch.nn.attention import SDPBackend

    decodes = name in DECODE
    case = {"news": [1] * len(case["lens"]), **case}
    problem = Attention(**case)
    problem.run()
    torch.cuda.synchronize()
    error = problem.error([0, len(problem.lens) // 2, len(problem.lens) - 1])
    copies = min(18, 1 + int(L2_BYTES / problem.kv_bytes)) if decodes else 2
    problems = [problem, *(Attention(**case, seed=1 + i) for i in range(copies - 1))]

    def share(time: float) -> str:
        if decodes:
            return f"{problem.kv_bytes / time / 1e6 / read:.1%}"
        return f"{problem.flops / time / 1e6:.0f} TFLOP/s"

    time = graph_time([p.run for p in problems])
    row: dict[str, Any] = {"case": name, "us": time, "error": error, "reached": share(time)}
    peers = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    for peer, backend in peers.items():
        if problem.dtype != torch.float32:
            runs = [run for p in problems if (run := sdpa(p, backend)) is not None]
            if runs:
                row[peer] = share(graph_time(runs))
    return row


def attention_rows(only: str, read: float) -> list[dict[str, Any]]:
    """Every attention case."""
    rows = []
    for name, case in {**DECODE, **PREFILL}.items():
        if only in name:
            rows.append(attention_row(name, case, read))
            print_row(rows[-1])
            torch.cuda.empty_cache()
    return rows


# ---------------------------------------------------------------- the copying kernels


def torch_copy(caches: Sequence[torch.Tensor], order: torch.Tensor) -> None:
    """``copy_blocks`` as torch has it."""
    for cache in caches:
        cache[0].index_copy_(0, order[:, 1], cache[0][order[:, 0]])


def torch_write(
    caches: Sequence[torch.Tensor], new: Sequence[torch.Tensor], slots: torch.Tensor
) -> None:
    """``write_kv`` as torch has it."""
    for cache, rows in zip(caches, new, strict=True):
        cache.view(-1, *rows.shape[1:]).index_copy_(0, slots, rows)


def copy_rows(only: str, copy: float) -> list[dict[str, Any]]:
    """Kernels that move bytes: checked against torch in float64, share of the copy ceiling."""
    rows = []
    torch.manual_seed(0)

    def add(
        name: str, runs: list[Run], num_bytes: int, error: float, peer: Run | None = None
    ) -> None:
        time = graph_time(runs)
        row = {"case": name, "us": time, "error": error, "TB/s": num_bytes / time / 1e6}
        row["reached"] = f"{num_bytes / time / 1e6 / copy:.1%}"
        if peer is not None:
            row["torch"] = f"{num_bytes / graph_time([peer]) / 1e6 / copy:.1%}"
        rows.append(row)
        print_row(row)

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)

    for pairs in (64, 1024, 8192):
        name = f"copy_blocks {pairs} pairs"
        if only not in name:
            continue
        caches = half(1, 2 * pairs, 16, 8, 128), half(1, 2 * pairs, 16, 8, 128)
        order = torch.randperm(2 * pairs, device=DEVICE).view(pairs, 2)
        want = [cache[0, order[:, 0]].clone() for cache in caches]
        blocks.copy_blocks(*caches, order)
        same = all(torch.equal(c[0, order[:, 1]], w) for c, w in zip(caches, want, strict=True))
        run = partial(blocks.copy_blocks, *caches, order)
        error = 0.0 if same else math.nan
        add(name, [run], 4 * pairs * 16 * 8 * 128 * 2, error, partial(torch_copy, caches, order))
    for tokens in (64, 8192, 65536):
        name = f"write_kv {tokens} tokens"
        if only not in name:
            continue
        caches = half(tokens // 8, 16, 8, 128), half(tokens // 8, 16, 8, 128)
        sets = [(half(tokens, 8, 128), half(tokens, 8, 128)) for _ in range(2)]
        slots = torch.randperm(2 * tokens, device=DEVICE)[:tokens]
        write_kv.write_kv(*sets[0], *caches, slots)
        same = all(
            torch.equal(c.view(-1, 8, 128)[slots], x) for c, x in zip(caches, sets[0], strict=True)
        )
        runs = [partial(write_kv.write_kv, *new, *caches, slots) for new in sets]
        error = 0.0 if same else math.nan
        peer = partial(torch_write, caches, sets[0], slots)
        add(name, list(runs), 4 * tokens * 8 * 128 * 2, error, peer)
    for tokens in (64, 8192):
        if only in "elementwise":
            x, residual, weight = half(tokens, 4096), half(tokens, 4096), half(4096)
            out = torch.empty_like(x)
            rms_norm.rms_norm(x, weight, 1e-6, out)
            wide = x.double()
            want = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
            error = relative_error(out, want)
            add(f"rms_norm {tokens} x 4096", [partial(rms_norm.rms_norm, x, weight, 1e-6, out)],
                2 * x.nbytes, error)  # fmt: skip
            add(f"fused_add_rms_norm {tokens} x 4096",
                [partial(rms_norm.fused_add_rms_norm, x, residual, weight, 1e-6, out)],
                4 * x.nbytes, error)  # fmt: skip
            gate = half(tokens, 2 * 14336)
            out = half(tokens, 14336)
            activation.silu_and_mul(gate, out)
            a, b = gate.double().chunk(2, -1)
            error = relative_error(out, torch.nn.functional.silu(a) * b)
            add(f"silu_and_mul {tokens} x 14336", [partial(activation.silu_and_mul, gate, out)],
                3 * out.nbytes, error)  # fmt: skip
            heads = half(tokens, 48, 128)
            positions = torch.arange(tokens, device=DEVICE)
            angles = torch.randn(tokens, 64, device=DEVICE)
            table = torch.cat([angles.cos(), angles.sin()], -1).contiguous()
            before = heads[:, :40].double()
            query, key = heads[:, :32], heads[:, 32:40]
            rotary.rotary_embedding(positions, query, key, table)
            cos, sin = table.double()[:, None].chunk(2, -1)
            first, second = before.chunk(2, -1)
            want = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
            error = relative_error(heads[:, :40], want)
            add(f"rotary {tokens} x 40 heads",
                [partial(rotary.rotary_embedding, positions, query, key, table)],
                2 * tokens * 40 * 128 * 2 + table.nbytes, error)  # fmt: skip
    return rows


def launch_rows() -> list[dict[str, Any]]:
    """What a launch costs the host."""
    caches = [torch.zeros(16, 16, 8, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
    new = [torch.zeros(1, 8, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
    slots = torch.zeros(1, device=DEVICE, dtype=torch.int64)
    kernel = write_kv._kernel(1024, 2, True)
    tensors = (*new, *caches, slots)

    def bare() -> None:
        kernel((1, 1, 1), *(t.data_ptr() for t in tensors), 1, 1024, 1024)

    problem = Attention([128], [1])
    rows = [
        {"case": "launch, 8 arguments", "us": host_time(bare)},
        {
            "case": "write_kv, checks and launch",
            "us": host_time(lambda: write_kv.write_kv(*tensors)),
        },
        {"case": "paged_attention, checks and launch", "us": host_time(problem.run)},
    ]
    for row in rows:
        print_row(row)
    return rows


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    numbers = {k: f"{v:.2e}" if k == "error" else f"{v:.2f}" if isinstance(v, float) else v
               for k, v in row.items()}  # fmt: skip
    print(
        "  ".join(f"{k} {v}" if k != "case" else f"{v:36s}" for k, v in numbers.items()), flush=True
    )


def main() -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    options = parser.parse_args()
    stream = torch.cuda.Stream()
    torch.cuda.set_stream(stream)
    launch.set_stream(stream.cuda_stream)
    import numba

    versions = {"card": torch.cuda.get_device_name(), "torch": torch.__version__,
                "numba": numba.__version__, "python": platform.python_version()}  # fmt: skip
    print(versions)
    limits = ceilings()
    print({k: round(v, 3) for k, v in limits.items()}, flush=True)
    rows = launch_rows() if not options.only else []
    rows += copy_rows(options.only, limits["copy TB/s"])
    rows += attention_rows(options.only, limits["read TB/s"])
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"versions": versions, "ceilings": limits, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
