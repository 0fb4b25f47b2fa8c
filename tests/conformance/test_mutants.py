"""The suite can fail: every planted mistake is caught, located and, where known, named."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
from mutants import MUTANTS, Mutant

from refengine.conformance import Report, check_kernel
from refengine.conformance.case import Case
from refengine.conformance.kernels import KERNELS


def run(mutant: Mutant, cases: str) -> Report:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's, of a kernel that divides by zero
        return check_kernel(
            mutant.kernel, mutant.function, cases=cases, dtypes=mutant.dtypes, shrinking=False
        )


def test_there_are_enough_of_them() -> None:
    assert len(MUTANTS) >= 40
    assert sum(mutant.quick for mutant in MUTANTS.values()) >= 35
    assert {mutant.kernel for mutant in MUTANTS.values()} >= set(KERNELS) - {"gelu_tanh_and_mul"}


@pytest.mark.parametrize("name", [name for name, mutant in MUTANTS.items() if mutant.quick])
def test_quick_catches(name: str) -> None:
    report = run(MUTANTS[name], "quick")
    assert not report.passed
    check_hint_and_places(MUTANTS[name], report)


@pytest.mark.parametrize("name", [name for name, mutant in MUTANTS.items() if not mutant.quick])
@pytest.mark.slow
def test_full_catches_what_quick_has_no_case_for(name: str) -> None:
    report = run(MUTANTS[name], "full")
    assert not report.passed
    check_hint_and_places(MUTANTS[name], report)


def check_hint_and_places(mutant: Mutant, report: Report) -> None:
    measured = [f for f in report.failures if f.kind == "wrong result"]
    assert measured
    if mutant.hint:
        hints = Counter(f.hint for f in measured)
        named = sum(count for hint, count in hints.items() if mutant.hint in (hint or ""))
        # Other cases may show an effect (NaN, a division by zero) instead of its cause.
        assert named >= (1 if mutant.bugs.get("stale_keys") else len(measured) / 2), hints
    if mutant.where is not None:
        placed = measured
        if mutant.kernel == "paged_attention" and "end" not in mutant.hint:
            placed = [f for f in measured if f.num_nan == 0]  # NaN does not say where it came from
        right = [mutant.where(problem_of(mutant, f), f) for f in placed]
        assert placed
        # Where several mistakes add up, the slot that explains them best may be another.
        assert sum(right) >= 0.9 * len(placed), [f.where() for f in placed]


def problem_of(mutant: Mutant, failure) -> object:
    name, dtype = failure.case.rsplit("/", 1)
    case = Case(name, mutant.kernel, dtype, failure.values)
    return KERNELS[mutant.kernel].build(case)
