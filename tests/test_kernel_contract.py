"""Every backend offers the same functions, in modules of the same names, with the same arguments.

``cuda/`` is read, not imported, so that this runs where there is no driver.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from refengine import cpu, reference
from refengine.execution.kernels import KernelSet

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = {"reference": reference, "cpu": cpu}
# The kernels that students meet as twins: the module in which each backend has them.
TWINS = {
    "copy_blocks": "blocks",
    "fused_add_rms_norm": "rms_norm",
    "gelu_tanh_and_mul": "activation",
    "merge_partial_attention": "merge_partial_attention",
    "paged_attention": "paged_attention",
    "rms_norm": "rms_norm",
    "rotary_embedding": "rotary",
    "silu_and_mul": "activation",
    "soft_cap": "activation",
    "swap_blocks": "blocks",
    "write_kv": "write_kv",
}


def protocol():
    """The functions of ``KernelSet`` and their argument names."""
    return {
        name: list(inspect.signature(function).parameters)[1:]
        for name, function in vars(KernelSet).items()
        if inspect.isfunction(function) and not name.startswith("_")
    }


def arguments_of(function):
    return [
        (parameter.name, parameter.kind, parameter.default)
        for parameter in inspect.signature(function).parameters.values()
    ]


def test_the_protocol_has_the_twins():
    names = protocol()
    assert set(TWINS) - {"merge_partial_attention"} <= set(names)
    assert "linear" in names


@pytest.mark.parametrize("function", sorted({*TWINS, *protocol()}))
def test_reference_and_cpu_have_one_signature(function):
    assert arguments_of(getattr(cpu, function)) == arguments_of(getattr(reference, function))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", protocol())
def test_backends_satisfy_the_protocol(backend, function):
    names = [name for name, _, _ in arguments_of(getattr(BACKENDS[backend], function))]
    assert names == protocol()[function]


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_say_their_names(backend):
    assert BACKENDS[backend].name == backend


@pytest.mark.parametrize("function", TWINS)
def test_twins_live_in_modules_of_one_name(function):
    for backend, module in BACKENDS.items():
        home = sys.modules[getattr(module, function).__module__]
        assert home.__name__ == f"refengine.{backend}.{TWINS[function]}"


def cuda_arguments(function):
    """Argument names of a function in its module of ``cuda/``, or None while it has none."""
    path = ROOT / "cuda" / f"{TWINS[function]}.py"
    if not path.exists():
        return None
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            assert not node.args.kwonlyargs
            assert node.args.vararg is node.args.kwarg is None
            return [argument.arg for argument in node.args.posonlyargs + node.args.args]
    return None


@pytest.mark.parametrize("function", TWINS)
def test_cuda_has_the_same_arguments(function):
    names = cuda_arguments(function)
    if names is None:
        pytest.skip(f"cuda/ has no {function} yet")
    assert names == [name for name, _, _ in arguments_of(getattr(reference, function))]


def test_the_reference_runs_where_there_is_only_numpy():
    """Not even ml_dtypes is needed: a bfloat16 cache is then uint16."""
    code = (
        "import sys\n"
        "for name in ('numba', 'ml_dtypes', 'torch', 'scipy'): sys.modules[name] = None\n"
        "import numpy as np\n"
        "from refengine import reference\n"
        "keys, values = (c[0] for c in reference.allocate_cache(1, 2, 4, 1, 8, 'bfloat16'))\n"
        "ones, out = np.ones((3, 1, 8), np.float32), np.empty((3, 1, 8), np.float32)\n"
        "reference.write_kv(ones, ones, keys, values, np.array([4, 5, 6]))\n"
        "tables = np.array([[1]], np.int32)\n"
        "lengths, starts = np.array([3], np.int32), np.array([0, 3], np.int32)\n"
        "reference.paged_attention(\n"
        "    ones, keys, values, tables, lengths, starts, 1.0, None, None, out)\n"
        "assert (out == 1).all()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
