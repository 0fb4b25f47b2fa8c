"""No correct implementation is refused: ours, torch's, and other orders of summation."""

from __future__ import annotations

import accepted_kernels
import mutant_kernels
import pytest

from refengine.conformance import check_kernel
from refengine.conformance.kernels import KERNELS
from refengine.conformance.own import BACKENDS, own_implementations

ALL_DTYPES = ("float32", "float16", "bfloat16", "bfloat16-cache")
OWN = [
    pytest.param(own, id=f"{own.backend}-{own.implementation.kernel}")
    for backend in BACKENDS
    if backend != "cuda"
    for own in own_implementations(None, backend)
]


@pytest.mark.parametrize("own", OWN)
def test_our_own(own) -> None:
    report = check_kernel(own.implementation.kernel, own.implementation, dtypes=own.dtypes)
    assert report.passed, report.text()
    assert report.worst_ratio < 2


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_our_own_on_a_gpu(kernel: str) -> None:
    for own in own_implementations(kernel, "cuda"):
        report = check_kernel(kernel, own.implementation, dtypes=own.dtypes)
        assert report.passed, report.text()


@pytest.mark.parametrize("function", ["backwards_attention", "split_attention"])
@pytest.mark.parametrize("cases", ["quick", pytest.param("full", marks=pytest.mark.slow)])
def test_another_order_of_summation(function: str, cases: str) -> None:
    report = check_kernel(
        "paged_attention", getattr(accepted_kernels, function), cases=cases, dtypes=ALL_DTYPES
    )
    assert report.passed, report.text()
    assert report.batch_invariant


@pytest.mark.parametrize("cases", ["quick", pytest.param("full", marks=pytest.mark.slow)])
def test_torch_attention(cases: str) -> None:
    pytest.importorskip("torch")
    report = check_kernel(
        "paged_attention",
        accepted_kernels.torch_attention,
        cases=cases,
        kind="torch",
        dtypes=ALL_DTYPES,
        where=None if cases == "full" else {"head_dim": [64, 80]},
    )
    assert report.passed, report.text()


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "gelu_tanh_and_mul"])
def test_the_mutants_without_a_mistake(kernel: str) -> None:
    maker = {"paged_attention": "attention"}.get(kernel, kernel)
    function = getattr(mutant_kernels, maker)()
    report = check_kernel(kernel, function, dtypes=ALL_DTYPES)
    assert report.passed, report.text()
