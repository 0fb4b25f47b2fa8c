"""Every rung of the attention ladder against float64, and what must hold to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cuda_arrays import SIMULATED, TOLERANCE, Problem, bits_of, on_host, relative_error

from refengine.cuda import launch
from refengine.cuda import paged_attention as module

HOPPER = SIMULATED or launch.compute_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="wants a Hopper GPU (sm_90)")
Rung = Callable[[module.Problem], None]
RUNGS: dict[str, Rung] = {
    "plain": module.run_plain,
    "grouped": module.run_grouped,
    "vectors": lambda p: module.run_vectors(p, split=False),
    "vectors split": lambda p: module.run_vectors(p, split=True),
    "decode": lambda p: module.run_decode(p, module.UNLIMITED, bulk=False),
    "decode bulk": lambda p: module.run_decode(p, module.UNLIMITED, bulk=True),
    "prefill": lambda p: module.run_prefill(p, 0, bulk=False),
    "prefill bulk": lambda p: module.run_prefill(p, 0, bulk=True),
}
HALF_ONLY = ("decode", "prefill")


def run(rung: Rung, problem: Problem) -> Any:
    """Run one rung; the output as it lies on the device."""
    arguments = problem.arguments()
    rung(module._problem(*arguments))
    return arguments[-1]


SMALL = [
    pytest.param({"lens": [5, 0, 17], "news": [1, 1, 2], "heads": (2, 1)}, id="ragged and empty"),
    pytest.param({"lens": [21], "news": [3], "heads": (3, 1), "window": 6}, id="window"),
    pytest.param({"lens": [18], "news": [2], "heads": (2, 2), "cap": 3.0}, id="soft cap"),
    pytest.param({"lens": [11], "news": [1], "heads": (9, 1), "head_dim": 32}, id="9 of a group"),
    pytest.param({"lens": [33], "news": [1], "dtype": "float16", "magnitude": 60.0}, id="peaked"),
    pytest.param(
        {"lens": [20], "news": [1], "block_size": 8, "head_dim": 128, "heads": (1, 1)},
        id="blocks of 8",
    ),
]


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("case", SMALL)
def test_small_cases_on_every_rung(rung: str, case: dict[str, Any]) -> None:
    if "bulk" in rung and not HOPPER:
        pytest.skip("wants a Hopper GPU (sm_90)")
    problem = Problem(**case)
    got = on_host(run(RUNGS[rung], problem))
    assert relative_error(got, problem.reference()) < TOLERANCE[problem.dtype]


@pytest.mark.parametrize("rung", ["plain", "grouped", "vectors", "vectors split"])
def test_float32_is_exact_to_rounding(rung: str) -> None:
    problem = Problem([13, 40], [2, 1], dtype="float32", head_dim=16, block_size=4, window=30)
    got = on_host(run(RUNGS[rung], problem))
    assert relative_error(got, problem.reference()) < TOLERANCE["float32"]


@pytest.mark.parametrize("rung", ["plain", "grouped"])
def test_odd_head_sizes(rung: str) -> None:
    problem = Problem([9], [2], head_dim=5, block_size=3)
    got = on_host(run(RUNGS[rung], problem))
    assert relative_error(got, problem.reference()) < TOLERANCE["bfloat16"]


@pytest.mark.parametrize("rung", ["decode", "prefill"])
def test_blocks_of_one_token(rung: str) -> None:
    problem = Problem([23], [2], block_size=1, head_dim=32)
    got = on_host(run(RUNGS[rung], problem))
    assert relative_error(got, problem.reference()) < TOLERANCE["bfloat16"]


@pytest.mark.parametrize("rung", ["prefill", pytest.param("prefill bulk", marks=needs_hopper)])
def test_prefill_across_tiles(rung: str) -> None:
    problem = Problem([150, 20], [140, 20], heads=(1, 1), head_dim=16, window=50)
    got = on_host(run(RUNGS[rung], problem))
    assert relative_error(got, problem.reference()) < TOLERANCE["bfloat16"]


@pytest.mark.parametrize(
    "rung", ["plain", "decode", pytest.param("decode bulk", marks=needs_hopper)]
)
def test_logits_of_half_a_million(rung: str) -> None:
    problem = Problem([20], [1], magnitude=400.0)
    got = on_host(run(RUNGS[rung], problem))
    assert relative_error(got, problem.reference()) < TOLERANCE["bfloat16"]


@pytest.mark.parametrize("bulk", [False, pytest.param(True, marks=needs_hopper)])
def test_blocks_that_share_a_sequence_do_not_change_its_bits(bulk: bool) -> None:
    problem = Problem([600, 40], [1, 1], heads=(4, 1))
    outputs = []
    for parts in (1, 2, 3):
        out = run(lambda p, n=parts: module.run_decode(p, 4, parts=n, bulk=bulk), problem)
        outputs.append(bits_of(out))
    assert outputs[0] == outputs[1] == outputs[2]
    again = run(lambda p: module.run_decode(p, 4, parts=2, bulk=bulk), problem)
    assert bits_of(again) == outputs[0]


def test_a_sequence_is_the_same_to_the_bit_in_any_batch() -> None:
    lens, news = [40, 270, 9], [1, 1, 6]
    together = Problem(lens, news)
    arguments = together.arguments()
    module.paged_attention(*arguments)
    assert relative_error(on_host(arguments[-1]), together.reference()) < TOLERANCE["bfloat16"]
    for i, (length, new) in enumerate(zip(lens, news, strict=True)):
        alone = Problem([length], [new]).arguments()
        module.paged_attention(*alone)
        rows = slice(int(together.starts[i]), int(together.starts[i + 1]))
        assert bits_of(alone[-1]) == bits_of(arguments[-1][rows])


def test_as_many_tokens_as_sequences_need_not_be_one_each() -> None:
    problem = Problem([8, 3, 7, 4, 5, 9], [6, 0, 0, 0, 0, 0])
    arguments = problem.arguments()
    module.paged_attention(*arguments)
    assert relative_error(on_host(arguments[-1]), problem.reference()) < TOLERANCE["bfloat16"]


def test_queries_may_be_a_slice_of_a_fused_product() -> None:
    problem = Problem([20], [2])
    arguments = problem.arguments()
    module.paged_attention(*arguments)
    import numpy as np
    from cuda_arrays import on_device

    fused = np.full((2, 9, 64), np.nan, np.float32).astype(problem.query.dtype)
    fused[:, :4] = problem.query
    strided = problem.arguments()
    strided[0] = on_device(fused)[:, :4]
    module.paged_attention(*strided)
    assert bits_of(strided[-1]) == bits_of(arguments[-1])


def test_rows_of_no_sequence_are_left_alone() -> None:
    problem = Problem([20, 7], [2, 1])
    problem.starts[2] = 2  # the last row is padding
    problem.seq_lens[1] = 0
    arguments = problem.arguments()
    module.paged_attention(*arguments)
    got = on_host(arguments[-1])
    assert not (got[:2] != got[:2]).any()
    assert (got[2] != got[2]).all()
