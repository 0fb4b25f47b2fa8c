"""What a check says, to a person and to a program."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from refengine.conformance.budget import LIMIT

MAX_SHOWN = 8
_INDENT = "    "


@dataclass
class Failure:
    """One failing case.

    ``error_ratio`` is None where there is no result to measure. ``token`` is the row of ``out``,
    ``position`` its place in the sequence; what does not apply is None.
    """

    case: str
    kind: str
    message: str
    error_ratio: float | None = None
    sequence: int | None = None
    token: int | None = None
    position: int | None = None
    head: int | None = None
    dim: int | None = None
    block: int | None = None
    slot: int | None = None
    array: str | None = None
    got: float | None = None
    expected: float | None = None
    num_wrong: int = 0
    num_nan: int = 0
    num_inf: int = 0
    num_elements: int = 0
    hint: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    smallest: Failure | None = None

    def where(self) -> str:
        """The place of the worst element in words."""
        names = ("array", "sequence", "token", "position", "head", "dim", "block", "slot")
        parts = [f"{n} {getattr(self, n)}" for n in names if getattr(self, n) is not None]
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``: numbers and texts; NaN and infinity become texts."""
        names = ("case", "kind", "message", "error_ratio", "sequence", "token", "position", "head",
                 "dim", "block", "slot", "array", "num_wrong", "num_nan", "num_inf",
                 "num_elements", "hint", "values")  # fmt: skip
        out = {name: getattr(self, name) for name in names}
        out.update(got=_plain(self.got), expected=_plain(self.expected))
        out["smallest"] = None if self.smallest is None else self.smallest.as_dict()
        return out

    def lines(self) -> list[str]:
        """For a person."""
        if self.error_ratio is None:
            out = [f"{self.case}: {self.message}"]
        else:
            out = [f"{self.case}: {self.message}", f"{_INDENT}worst at {self.where()}"]
            out.append(
                f"{_INDENT}got {_show(self.got)}, expected {_show(self.expected)}; "
                f"{self.num_wrong} of {self.num_elements} elements wrong, "
                f"{self.num_nan} NaN, {self.num_inf} infinite"
            )
        if self.hint:
            out.append(f"{_INDENT}looks like: {self.hint}")
        if self.smallest is not None:
            small = self.smallest
            values = ", ".join(f"{key} {value}" for key, value in small.values.items())
            out.append(f"{_INDENT}smallest failing case: {values or 'the defaults'}")
            if small.error_ratio is not None:
                out.append(
                    f"{_INDENT * 2}worst at {small.where()}: "
                    f"got {_show(small.got)}, expected {_show(small.expected)}"
                )
        return out


@dataclass
class Report:
    """The verdict on one implementation of one kernel."""

    kernel: str
    implementation: str
    num_cases: int = 0
    failures: list[Failure] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    worst_ratio: float = 0.0
    worst_case: str = ""
    not_repeatable: list[str] = field(default_factory=list)
    batch_invariant: bool | None = None
    seconds: float = 0.0
    timings: list[dict[str, Any]] = field(default_factory=list)
    accesses: list[dict[str, Any]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every case passed; a check of nothing does not pass."""
        return not self.failures and self.num_cases > 0

    def _alike(self) -> list[list[Failure]]:
        """Failures in groups that say the same: by what happened, and by the guess."""
        groups: dict[tuple[str, str], list[Failure]] = {}
        for failure in self.failures:
            says = failure.hint or ("" if failure.error_ratio is not None else failure.message)
            says = re.sub(r"[0-9]+", "0", says)
            groups.setdefault((failure.kind, says), []).append(failure)
        return list(groups.values())

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "kernel": self.kernel,
            "implementation": self.implementation,
            "passed": self.passed,
            "cases": self.num_cases,
            "failures": [failure.as_dict() for failure in self.failures],
            "limit": LIMIT,
            "worst_error_ratio": round(self.worst_ratio, 4),
            "worst_case": self.worst_case or None,
            "not_repeatable": self.not_repeatable,
            "batch_invariant": self.batch_invariant,
            "skipped": self.skipped,
            "seconds": round(self.seconds, 3),
            "timings": self.timings,
            "accesses": self.accesses,
        }

    def text(self) -> str:
        """For a person: the verdict first, then each failure, the smallest case and the guess."""
        verdict = "passed" if self.passed else "FAILED"
        head = f"{verdict}: {self.kernel}, {self.implementation}: "
        if self.passed:
            head += f"{self.num_cases} cases"
            if self.worst_case and self.worst_ratio:
                head += (
                    f"; worst error {self.worst_ratio:.2f} times the dense computation's "
                    f"(limit {LIMIT:g}), in {self.worst_case}"
                )
        else:
            head += f"{len(self.failures)} of {self.num_cases} cases"
        lines = [head]
        alike = self._alike()
        for first, *others in alike[:MAX_SHOWN]:
            lines += ["", *first.lines()]
            if others:
                names = ", ".join(other.case for other in others[:MAX_SHOWN])
                more = f" and {len(others) - MAX_SHOWN} more" if len(others) > MAX_SHOWN else ""
                lines += textwrap.wrap(
                    f"the same in {names}{more}",
                    96,
                    initial_indent=_INDENT,
                    subsequent_indent=_INDENT,
                    break_on_hyphens=False,
                )
        rest = [failure.case for group in alike[MAX_SHOWN:] for failure in group]
        if rest:
            lines += ["", *textwrap.wrap(f"and {len(rest)} more: {', '.join(rest)}", 96)]
        if self.not_repeatable:
            lines.append(f"{_INDENT}other bits from run to run in {', '.join(self.not_repeatable)}")
        if self.batch_invariant is not None:
            says = "the same bits" if self.batch_invariant else "other bits"
            lines.append(f"{_INDENT}a sequence gets {says} alone as in a batch")
        lines += [f"{_INDENT}skipped {case}: {why}" for case, why in self.skipped.items()]
        return "\n".join(lines)


def combined(reports: Sequence[Report], kernel: str) -> dict[str, Any]:
    """Several reports as one object for ``--json``; of one report, that report."""
    if len(reports) == 1:
        return reports[0].as_dict()
    failures = [
        {"kernel": r.kernel, "implementation": r.implementation, **f.as_dict()}
        for r in reports
        for f in r.failures
    ]
    return {
        "kernel": kernel,
        "passed": bool(reports) and all(r.passed for r in reports),
        "cases": sum(r.num_cases for r in reports),
        "failures": failures,
        "reports": [r.as_dict() for r in reports],
    }


def _show(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.6g}"


def _plain(value: float | None) -> float | str | None:
    if value is None or abs(value) < float("inf"):
        return value
    return "nan" if value != value else str(value)  # noqa: PLR0124
