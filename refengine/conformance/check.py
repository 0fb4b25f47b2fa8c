"""Checking an implementation: run the cases, judge each, shrink what fails, guess why."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from refengine.conformance.answers import answer
from refengine.conformance.budget import CEILING, LIMIT, Comparison, compare
from refengine.conformance.calling import Outcome
from refengine.conformance.case import Case, load_cases
from refengine.conformance.hints import (
    RACE,
    choose,
    explaining_mistakes,
    other_hint,
    pattern_hint,
    refutes,
)
from refengine.conformance.implementation import Implementation
from refengine.conformance.kernels import find_kernel
from refengine.conformance.precision import DTYPES, Array, wide
from refengine.conformance.problem import Expected, KernelSpec, Problem
from refengine.conformance.report import Failure, Report
from refengine.conformance.runner import Runner, make_runner
from refengine.conformance.shrinking import shrink
from refengine.errors import RefengineError

SHRINK_SECONDS = 6.0
MAX_SHRUNK = 3
MAX_REFUTING = 25


def check_kernel(
    kernel: str,
    implementation: str | Callable[..., Any] | Implementation,
    *,
    cases: str = "quick",
    dtypes: Iterable[str] = (),
    kind: str = "numpy",
    device: str = "cpu",
    adapter: str | None = None,
    layout: str = "NHD",
    without: Iterable[str] = (),
    where: Mapping[str, Iterable[Any]] | None = None,
    time_limit: float | None = None,
    shrinking: bool = True,
    stop_at_first: bool = False,
    environment: Mapping[str, str] | None = None,
    progress: Callable[[Iterable[Case]], Iterable[Case]] = lambda cases: cases,
) -> Report:
    """Check one implementation of a kernel of the contract.

    Args:
        kernel: the contract's name, such as "paged_attention".
        implementation: "module:function", which runs in a process of its own with a time limit, or
            a callable, which runs in this one.
        cases: "quick", "full" or a TOML file.
        dtypes: "float32", "float16", "bfloat16", or a 16-bit cache under float32 activations:
            "float16-cache", "bfloat16-cache". Default float32; with torch also bfloat16.
        kind: whose arrays it takes: "numpy", "torch" or "cupy".
        device: "cpu" or "cuda".
        adapter: for another signature: "vllm", "flash_attn" or "flashinfer".
        layout: of its caches, "NHD" or "HND".
        without: tags of cases to leave out.
        where: values to keep, such as ``{"head_dim": [64, 128]}``.
        time_limit: seconds a case may take; None for 10, and 30 more for the first case of each
            dtype, since kernels may be compiled in it.
        shrinking: look for the smallest failing case.
        stop_at_first: end at the first failure.
        environment: additions to the environment of the process that it runs in.
        progress: wraps the cases, as tqdm does.

    Raises:
        RefengineError: where nothing can be run: no such kernel, function, device or case.
    """
    spec = find_kernel(kernel)
    if not isinstance(implementation, Implementation):
        target = implementation if isinstance(implementation, str) else ""
        function = None if isinstance(implementation, str) else implementation
        implementation = Implementation(kernel, target, function, kind, device, adapter, layout)
    chosen = tuple(dtypes) or default_dtypes(implementation.kind)
    for dtype in chosen:
        if dtype not in DTYPES:
            raise RefengineError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    left_out = set(without)
    if implementation.layout == "HND" or implementation.kind == "cupy":
        left_out.add("huge")  # turning such a cache round, or moving it whole, takes its full size
    todo = load_cases(kernel, cases, dtypes=chosen, without=left_out, where=where)
    if not todo:
        raise RefengineError(f"no case of {kernel} is left to check in {cases}")
    began = time.monotonic()
    report = Report(kernel, implementation.name)
    runner = make_runner(implementation, time_limit, environment)
    try:
        checker = _Checker(spec, runner, report)
        for case in progress(todo):
            checker.check(case)
            if stop_at_first and report.failures:
                break
        checker.guess()
        if shrinking:
            checker.shrink()
    finally:
        runner.close()
    report.seconds = time.monotonic() - began
    return report


def check_one(case: Case, runner: Runner) -> Report:
    """Check one case on a runner that stays open."""
    report = Report(case.kernel, runner.implementation.name)
    checker = _Checker(find_kernel(case.kernel), runner, report)
    checker.check(case)
    checker.guess()
    checker.shrink()
    return report


def default_dtypes(kind: str) -> tuple[str, ...]:
    """What is checked where nobody says: what every such array can hold."""
    return ("float32",) if kind == "numpy" else ("float32", "bfloat16")


@dataclass
class _Judged:
    """A case's verdict, with what guessing needs."""

    failure: Failure | None
    ratio: float = 0.0
    got: dict[str, Array] | None = None
    fallback: str | None = None
    repeatable: bool = True


class _Checker:
    """One implementation's run through the cases."""

    def __init__(self, spec: KernelSpec, runner: Runner, report: Report) -> None:
        self.spec, self.runner, self.report = spec, runner, report
        self._failed: list[tuple[Case, _Judged]] = []
        self._explained: list[dict[str, float]] = []
        self._passed: list[Case] = []

    def check(self, case: Case) -> None:
        """Run one case and judge it; the answer is computed while the kernel runs."""
        self.runner.start("case", case)
        try:
            problem, expected = answer(self.spec, case)
        except MemoryError:
            self.runner.finish()
            self.report.skipped[case.label] = "not enough memory for it here"
            return
        outcome: Outcome = self.runner.finish()
        report = self.report
        report.num_cases += 1
        judged = judge(self.spec, case, problem, expected, outcome)
        if not judged.repeatable:
            report.not_repeatable.append(case.label)
        if judged.failure is not None:
            report.failures.append(judged.failure)
            self._failed.append((case, judged))
            explained = {}
            if judged.got is not None and judged.failure.kind == "wrong result":
                explained = explaining_mistakes(self.spec, problem, judged.got, expected)
            self._explained.append(explained)
            return
        self._passed.append(case)
        if judged.ratio >= report.worst_ratio:
            report.worst_ratio, report.worst_case = judged.ratio, case.label
        if case.get("alone"):
            self.runner.start("alone", case)
            same = self.runner.finish()
            if isinstance(same, bool):
                report.batch_invariant = same and report.batch_invariant is not False

    def guess(self) -> None:
        """Give every failure its hint, once all of them are known."""
        hints = choose(self._explained, self._refuted)
        races = any(judged.fallback == RACE for _, judged in self._failed)
        for (_, judged), hint in zip(self._failed, hints, strict=True):
            if judged.failure is None:
                continue
            if judged.fallback == RACE:
                judged.failure.hint = RACE
            else:
                judged.failure.hint = hint or judged.fallback or (RACE if races else None)

    def _refuted(self, hint: str) -> int:
        """How many of the first passing cases a mistake would have failed."""
        count = 0
        for case in self._passed[:MAX_REFUTING]:
            problem, expected = answer(self.spec, case)
            if problem.sparse is None:
                count += refutes(self.spec, problem, expected, hint)
        return count

    def shrink(self) -> None:
        """Find the smallest failing case of the first failure of each kind."""
        seen: set[tuple[str, str | None]] = set()
        until = time.monotonic() + SHRINK_SECONDS
        for case, judged in self._failed:
            failure = judged.failure
            if failure is None or failure.kind in ("hung", "not run") or len(seen) >= MAX_SHRUNK:
                continue
            key = failure.kind, failure.hint
            if key in seen:
                continue
            seen.add(key)
            tries = 20 if failure.kind == "crashed" else 300
            seconds = max(0.0, until - time.monotonic())
            kind, hint = failure.kind, failure.hint
            small = shrink(
                case,
                self.spec.smaller,
                partial(self._still_fails, kind, hint),
                max_tries=tries,
                seconds=seconds,
            )
            if small is not case:
                failure.smallest = self._fails(small, kind, hint)

    def _still_fails(self, kind: str, hint: str | None, case: Case) -> bool:
        return self._fails(case, kind, hint) is not None

    def _fails(self, case: Case, kind: str, hint: str | None) -> Failure | None:
        """The failure of a smaller case, if it is one of the same kind and with the same hint."""
        self.runner.start("case", case)
        try:
            problem = self.spec.build(case)
            expected = self.spec.expected(problem)
        except Exception:  # a proposal that is no problem at all
            self.runner.finish()
            return None
        judged = judge(self.spec, case, problem, expected, self.runner.finish())
        failure = judged.failure
        if failure is None or failure.kind != kind:
            return None
        failure.hint = judged.fallback
        if kind == "wrong result" and judged.got is not None:
            found = explaining_mistakes(self.spec, problem, judged.got, expected)
            if hint in found:
                failure.hint = hint
        return failure if failure.hint == hint else None


def judge(
    spec: KernelSpec,
    case: Case,
    problem: Problem,
    expected: Mapping[str, Expected],
    outcome: Outcome,
) -> _Judged:
    """Compare everything that a kernel did with what it should have done."""
    if outcome.status != "ok":
        failure = Failure(case.label, outcome.status, outcome.message, values=dict(case.values))
        return _Judged(failure, fallback=other_hint(case, outcome))
    worst: tuple[Comparison, str, dict[str, Array]] | None = None
    passed_runs = 0
    for run in outcome.runs:
        run_passed = True
        for name, want in expected.items():
            comparison = compare(run[name], want)
            run_passed &= comparison.passed
            if worst is None or comparison.ratio > worst[0].ratio:
                worst = comparison, name, run
        passed_runs += run_passed
    repeatable = len(outcome.runs) <= 1
    if worst is None or worst[0].passed or worst[0].index is None:
        return _Judged(None, worst[0].ratio if worst else 0.0, repeatable=repeatable)
    comparison, name, run = worst
    index = comparison.index or ()
    want = expected[name]
    got, right = float(wide(run[name])[index]), float(wide(want.exact)[index])
    location = spec.locate(problem, name, index, run[name], want)
    failure = Failure(
        case.label,
        "wrong result",
        _message(comparison, name, want),
        comparison.ratio,
        got=got,
        expected=right,
        num_wrong=comparison.num_wrong,
        num_nan=comparison.num_nan,
        num_inf=comparison.num_inf,
        num_elements=comparison.size,
        values=dict(case.values),
        **_plain(location),
    )
    fallback: str | None = RACE
    if repeatable or passed_runs == 0:
        fallback = pattern_hint(run[name], want, comparison.num_wrong, comparison.num_nan)
    return _Judged(failure, comparison.ratio, run, fallback, repeatable)


def _plain(location: Any) -> dict[str, Any]:
    names = ("sequence", "token", "position", "head", "dim", "block", "slot", "array")
    values = {name: getattr(location, name) for name in names}
    return {k: int(v) if isinstance(v, np.integer) else v for k, v in values.items()}


def _message(comparison: Comparison, name: str, want: Expected) -> str:
    if want.unit is None:
        return f"{name} is not what it must be, to the bit"
    if comparison.ratio >= CEILING:
        what = "is not finite" if comparison.num_nan + comparison.num_inf else "is far off"
        return f"{name} {what}: no rounding in this precision explains that"
    return (
        f"error {comparison.ratio:.3g} times that of the same mathematics done densely "
        f"in this precision (limit {LIMIT:g})"
    )
