"""``--time`` and ``--count-accesses``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from refengine.cli.check import command

CUDA_KERNELS = """
from numba import cuda

@cuda.jit
def apart(x, out):
    row = cuda.threadIdx.x
    if row < x.shape[0]:
        for i in range(out.shape[1]):
            gate = x[row, i]
            out[row, i] = gate / (1.0 + 2.718281828459045 ** -gate) * x[row, out.shape[1] + i]

@cuda.jit
def together(x, out):
    row, i = cuda.blockIdx.x, cuda.threadIdx.x
    while i < out.shape[1]:
        gate = x[row, i]
        out[row, i] = gate / (1.0 + 2.718281828459045 ** -gate) * x[row, out.shape[1] + i]
        i += 32

def slow(x, out):
    apart[1, 32](x, out)

def fast(x, out):
    together[x.shape[0], 32](x, out)
"""


def check(*arguments: str) -> dict:
    result = CliRunner().invoke(command, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_time_says_what_share_of_the_machine_is_reached() -> None:
    report = check("silu_and_mul", "--backend", "reference", "--dtype", "float32", "--time")
    (row,) = report["timings"]
    assert row["bound by"] in ("bytes", "operations")
    assert row["us"] > 0
    assert row["share %"] > 0
    assert row["MB"] == pytest.approx(2048 * 4096 * 3 * 4 / 1e6)


def test_accesses_show_why_a_plain_kernel_is_slow(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    (tmp_path / "cuda_kernels.py").write_text(CUDA_KERNELS)
    rows = {}
    for name in ("slow", "fast"):
        report = check(
            "silu_and_mul", "--impl", f"{tmp_path / 'cuda_kernels.py'}:{name}", "--count-accesses",
            "--time-limit", "200",
        )  # fmt: skip
        rows[name] = report["accesses"]
    # Two rows of 40 elements: a thread reads a row of 80 and writes 40, in 32 threads.
    slow = {row["kind"]: row for row in rows["slow"] if row["line"] == "all lines"}
    fast = {row["kind"]: row for row in rows["fast"] if row["line"] == "all lines"}
    assert slow["load"]["useful %"] == 12.5  # 4 bytes of every 32
    assert slow["load"]["warp requests"] == 80
    assert slow["load"]["sectors/request"] == 2  # two rows
    assert fast["load"]["useful %"] > 60  # all but the ends of rows, wherever the arrays lie
    assert fast["load"]["warp requests"] == 8
    line = next(row for row in rows["slow"] if row["kind"] == "store")
    assert line["source"].startswith("out[row, i] = gate")


def test_counting_what_is_no_cuda_kernel_is_an_error() -> None:
    result = CliRunner().invoke(
        command, ["silu_and_mul", "--impl", "refengine.reference:silu_and_mul", "--count-accesses"]
    )
    assert result.exit_code == 2
    assert "made no access in the CUDA simulator" in result.stderr
