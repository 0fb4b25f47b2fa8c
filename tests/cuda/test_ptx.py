"""What the compiler makes of the kernels, with no GPU: wide loads, tensor cores, no spills.

Needs numba-cuda's compiler (``pip install numba-cuda[cu12]``, which also brings ``ptxas``). Budgets
are of one H100 multiprocessor: 65,536 registers and 227 KB of shared memory.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

HAS_COMPILER = importlib.util.find_spec("numba_cuda") is not None
SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")
pytestmark = [
    pytest.mark.skipif(not HAS_COMPILER, reason="wants numba-cuda[cu12], to compile to PTX"),
    pytest.mark.skipif(SIMULATED, reason="the simulator does not compile"),
    pytest.mark.filterwarnings("ignore"),
]
MODEL: tuple[Any, ...] = ("bfloat16", 8, 4, 128, 16)  # Llama-3 8B: 32 and 8 heads of 128


class Budget(NamedTuple):
    """A kernel, the architectures it is for, and what its PTX must and may hold."""

    make: Callable[[], Any]
    capabilities: tuple[tuple[int, int], ...]
    must: dict[str, int]  # text -> at least so often
    registers: int
    shared: int  # bytes, static and dynamic
    spilled: int = 0  # bytes of registers that may be put aside in memory


def _module(name: str) -> Any:
    return importlib.import_module(f"refengine.cuda.{name}")


BOTH = ((8, 0), (9, 0))
KERNELS = {
    "write_kv": Budget(
        lambda: _module("write_kv")._kernel(1024, 2, True),
        BOTH,
        {"ld.global.nc.v4": 4, "st.global.v4": 4},
        32,
        0,
    ),
    "copy_blocks": Budget(
        lambda: _module("blocks")._kernel(16384, 2, True)[0],
        BOTH,
        {"ld.global.nc.v4": 8, "st.global.v4": 8},
        32,
        0,
    ),
    "rms_norm": Budget(
        lambda: _module("rms_norm")._kernel("bfloat16", True, 4096, True)[0],
        BOTH,
        {"ld.global.nc.v4": 3, "st.global.v4": 2},
        40,
        128,
    ),
    "rotary": Budget(
        lambda: _module("rotary")._kernel("bfloat16", 32, 8, 128, 128, True),
        BOTH,
        {"ld.global.nc.v4": 6, "st.global.v4": 2},
        48,
        0,
    ),
    "silu": Budget(
        lambda: _module("activation")._kernel("silu", "bfloat16", True),
        BOTH,
        {"ld.global.nc.v4": 2, "st.global.v4": 1},
        40,
        0,
    ),
    "vectors": Budget(
        lambda: _module("attention_vectors").vector_kernel("float32", 8, 4, 128, 16, False),
        BOTH,
        {"ld.global.nc.v4": 2},
        128,
        9216,
    ),
    "decode": Budget(
        lambda: _module("attention_decode").decode_kernel(*MODEL, False, False),
        ((8, 0),),
        {"ld.global.nc.v4": 20, "mma.sync.aligned.m16n8k16": 16, "movmatrix": 2},
        168,
        16384,
    ),
    "decode bulk": Budget(
        lambda: _module("attention_decode_bulk").bulk_decode_kernel(*MODEL, False, False),
        ((9, 0),),
        {"cp.async.bulk.tensor": 2, "mma.sync.aligned.m16n8k16": 16, "ldmatrix": 16},
        128,
        (227 * 1024 - 2048) // 2,
    ),
    "prefill": Budget(
        lambda: _module("attention_prefill").prefill_kernel(*MODEL, False, False),
        BOTH,
        {"cp.async.cg": 3, "mma.sync.aligned.m16n8k16": 256, "ldmatrix": 64},
        255,
        72 * 1024,
        8,  # two words, once a launch: 128 sums and 64 scores leave little of 255 registers
    ),
    "prefill bulk": Budget(
        lambda: _module("attention_prefill_bulk").bulk_prefill_kernel(*MODEL, 16, False, False),
        ((9, 0),),
        {"cp.async.bulk.tensor": 3, "wgmma.mma_async": 24, "setmaxnreg": 2},
        168,
        227 * 1024,
    ),
}


def find_ptxas() -> str | None:
    """numba-cuda[cu12] brings the assembler along."""
    found = importlib.util.find_spec("nvidia")
    for place in found.submodule_search_locations or () if found else ():
        for path in Path(place).glob("cuda_nvcc/bin/ptxas"):
            return str(path)
    return None


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_compiled(name: str, tmp_path: Path) -> None:
    budget = KERNELS[name]
    kernel = budget.make()
    for capability in budget.capabilities:
        text = kernel.ptx(capability)
        for instruction, least in budget.must.items():
            assert text.count(instruction) >= least, f"{instruction} in sm_{capability}"
        assert "call.uni" not in text
        assert ".local" not in text, "an array lies in memory instead of registers"
        overlaps = "griddepcontrol.wait" in text
        assert overlaps == (capability >= (9, 0))
        ptxas = find_ptxas()
        if ptxas is None:
            continue
        source = tmp_path / "kernel.ptx"
        source.write_text(text)
        suffix = "a" if kernel.hopper else ""
        target = f"-arch=sm_{capability[0]}{capability[1]}{suffix}"
        command = [ptxas, "-v", target, "-o", str(tmp_path / "kernel.cubin"), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        report = done.stderr
        assert "wgmma" not in report, report  # a warning that products were made to wait
        spilled = int(re.search(r"(\d+) bytes spill stores", report)[1])  # type: ignore[index]
        assert spilled <= budget.spilled, report
        registers = int(re.search(r"Used (\d+) registers", report)[1])  # type: ignore[index]
        static = re.search(r"(\d+) bytes smem", report)
        shared = kernel.shared_bytes + (int(static[1]) if static else 0)
        assert registers <= budget.registers
        assert shared <= budget.shared


def test_a_launch_without_a_driver_says_so() -> None:
    if find_ptxas() and Path("/dev/nvidia0").exists():
        pytest.skip("there is a driver here")
    kernel = KERNELS["write_kv"].make()
    with pytest.raises((OSError, RuntimeError), match="cuda"):
        kernel((1, 1, 1), *([0] * 8))
