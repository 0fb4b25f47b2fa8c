"""What only a GPU can show: the full grid of shapes, huge caches, graphs, streams, host memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_arrays import SIMULATED, TOLERANCE, Problem, bits_of, on_host, relative_error

from refengine.cuda import blocks, launch, paged_attention, write_kv

pytestmark = [
    pytest.mark.skipif(SIMULATED, reason="wants a GPU"),
    pytest.mark.gpu,
]
RAGGED: dict[str, Any] = {"lens": [1, 700, 33, 0, 5000, 128], "news": [1, 1, 33, 0, 1, 100]}
GRID = [
    {},
    {"dtype": "float16", "cap": 30.0},
    {"dtype": "float32"},
    {"head_dim": 80, "heads": (12, 4)},
    {"head_dim": 96, "heads": (7, 7), "window": 100},
    {"head_dim": 128, "heads": (32, 2)},
    {"head_dim": 256, "heads": (4, 4), "dtype": "float16"},
    {"head_dim": 128, "heads": (71, 1), "block_size": 32},
    {"block_size": 1},
    {"block_size": 8, "window": 17},
    {"block_size": 24, "cap": 5.0},
    {"head_dim": 40, "heads": (3, 1)},
    {"head_dim": 5, "dtype": "float32", "block_size": 7},
    {"magnitude": 250.0},
]


@pytest.mark.parametrize("case", GRID, ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()))
def test_the_full_grid(case: dict[str, Any]) -> None:
    problem = Problem(**{**RAGGED, **case})
    arguments = problem.arguments()
    paged_attention.paged_attention(*arguments)
    got = arguments[-1]
    tolerance = max(TOLERANCE[problem.dtype], 1e-5)
    assert relative_error(on_host(got), problem.reference()) < tolerance
    first = bits_of(got)
    for _ in range(5):
        got.fill_(float("nan"))
        paged_attention.paged_attention(*arguments)
        assert bits_of(got) == first


@pytest.mark.parametrize("new", [1, 40])
def test_a_cache_of_more_than_two_billion_elements(new: int) -> None:
    import torch

    small = Problem([600], [new], heads=(4, 1), head_dim=128)
    arguments = small.arguments()
    paged_attention.paged_attention(*arguments)
    num_blocks = 2**31 // (16 * 128) + 100
    for i in (1, 2):
        huge = torch.empty((num_blocks, 16, 1, 128), dtype=torch.bfloat16, device="cuda")
        huge[-len(arguments[i]) :] = arguments[i]
        arguments[i] = huge
    arguments[3] = arguments[3] + (num_blocks - len(small.keys))
    out = torch.full_like(arguments[-1], float("nan"))
    paged_attention.paged_attention(*arguments[:-1], out)
    assert bits_of(out) == bits_of(arguments[-1])
    # Writing and copying reach that far too.
    row = torch.randn(1, 1, 128, dtype=torch.bfloat16, device="cuda")
    slot = torch.tensor([num_blocks * 16 - 1], device="cuda")
    write_kv.write_kv(row, row, arguments[1], arguments[2], slot)
    assert torch.equal(arguments[1][-1, -1], row[0])
    pair = torch.tensor([[num_blocks - 1, 0]], device="cuda")
    blocks.copy_blocks(arguments[1][None], arguments[2][None], pair)
    assert torch.equal(arguments[1][0].view(torch.int16), arguments[1][-1].view(torch.int16))


def test_launches_are_captured_on_the_stream_that_was_set() -> None:
    import torch

    problem = Problem([300, 20, 60], [1, 1, 30])
    arguments = problem.arguments()
    stream = torch.cuda.Stream()
    before = launch.stream()
    launch.set_stream(stream.cuda_stream)
    try:
        with torch.cuda.stream(stream):
            paged_attention.paged_attention(*arguments)
            want = arguments[-1].clone()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                paged_attention.paged_attention(*arguments)
            for _ in range(3):
                arguments[-1].fill_(float("nan"))
                graph.replay()
                assert bits_of(arguments[-1]) == bits_of(want)
    finally:
        launch.set_stream(before)


def test_blocks_swap_to_page_locked_memory_and_back() -> None:
    import torch

    shape = (2, 6, 16, 2, 64)
    device = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    host = [torch.zeros((2, 9, *shape[2:]), dtype=torch.bfloat16).pin_memory() for _ in range(2)]
    there = torch.tensor([[1, 8], [4, 2]], device="cuda")
    blocks.swap_blocks(*device, *host, there)
    torch.cuda.synchronize()
    for near, far in zip(device, host, strict=True):
        assert torch.equal(near[:, [1, 4]].cpu(), far[:, [8, 2]])
    back = [torch.zeros_like(x) for x in device]
    blocks.swap_blocks(*host, *back, there.flip(1))
    for near, again in zip(device, back, strict=True):
        assert torch.equal(near[:, [1, 4]], again[:, [1, 4]])
    pageable = torch.zeros_like(host[0]).clone()
    with pytest.raises(ValueError, match="wanted a CUDA tensor or page-locked host memory"):
        blocks.swap_blocks(*device, pageable, pageable, there)


def test_decodes_in_a_large_batch_are_those_alone() -> None:
    rng = np.random.default_rng(0)
    lens = [int(n) for n in rng.integers(1, 3000, 40)]
    together = Problem(lens, [1] * 40, heads=(4, 1), head_dim=128)
    arguments = together.arguments()
    paged_attention.paged_attention(*arguments)
    for i in range(0, 40, 7):
        alone = Problem([lens[i]], [1], heads=(4, 1), head_dim=128).arguments()
        paged_attention.paged_attention(*alone)
        assert bits_of(alone[-1]) == bits_of(arguments[-1][i : i + 1])
