"""Guessing the mistake: which known wrong kernel gives what this one gave?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from refengine.conformance.budget import LIMIT, compare
from refengine.conformance.calling import Outcome
from refengine.conformance.case import Case
from refengine.conformance.precision import Array, wide
from refengine.conformance.problem import Expected, KernelSpec, Problem

# A mistake explains a failure where at most this share of the error is left.
EXPLAINED = 0.2
RACE = "not the same in every run: a race (a missing barrier?), or memory that is read unset"
PAST_TABLE = "table read past its end: the entries there are not blocks"
ROUNDED = "small errors everywhere: something is rounded to 16 bits on the way"
NAN = "NaN: something read a slot that no sequence owns, or divided 0 by 0"


def explaining_mistakes(
    spec: KernelSpec,
    problem: Problem,
    got: Mapping[str, Array],
    expected: Mapping[str, Expected],
) -> dict[str, float]:
    """The known mistakes that give the same result, with the share of the error left over."""
    found: dict[str, float] = {}
    for mistake in spec.mistakes(problem):
        with np.errstate(all="ignore"):
            try:
                wrong = mistake.compute(problem)
            except (IndexError, ValueError):  # this mistake makes no sense here
                continue
        share = _share_left(got, wrong, expected)
        if share < EXPLAINED:
            found[mistake.hint] = share
    return found


def _share_left(
    got: Mapping[str, Array], wrong: Mapping[str, Array], expected: Mapping[str, Expected]
) -> float:
    """How much of the error remains if the mistake is taken for the truth; 1 or more: no match."""
    left = total = noise = 0.0
    odd = False
    for name, claim in wrong.items():
        if name not in expected:
            continue
        want = expected[name]
        mine, theirs, right = wide(got[name]), wide(claim), wide(want.exact)
        fine = np.isfinite(mine)
        # NaN and infinity must be where the mistake has them (which of the two does not matter).
        if mine.shape != theirs.shape or (fine != np.isfinite(theirs)).any():
            return 1.0
        odd |= bool((fine != np.isfinite(right)).any())
        both = fine & np.isfinite(right)
        apart = np.abs(mine - theirs)
        if want.unit is not None:  # rounding, which the mistake has as well, is no difference
            apart = np.maximum(apart - LIMIT * want.unit, 0)
        left += float((apart[fine] ** 2).sum())
        total += float(((mine - right)[both] ** 2).sum())
        if want.unit is not None:
            noise += float((want.unit[both] ** 2).sum())
    noise *= LIMIT**2
    if total <= noise:  # nothing wrong in the finite part: the odd elements are all there is
        return 0.0 if odd and left <= noise else 1.0
    return float(np.sqrt(left / total))


def choose(
    candidates: Sequence[Mapping[str, float]], refuted: Callable[[str], int]
) -> list[str | None]:
    """One hint a failure: of those that explain it, the one that fits all cases best.

    Args:
        candidates: for each failure, the mistakes that explain it.
        refuted: how many passing cases a mistake would have failed.
    """
    votes = Counter(hint for found in candidates for hint in found)
    contested = {hint for found in candidates if len(found) > 1 for hint in found}
    contested |= {hint for found in candidates if len(found) < len(candidates) for hint in found}
    score = {hint: votes[hint] - (refuted(hint) if hint in contested else 0) for hint in votes}
    chosen = [
        max(found, key=lambda hint: (score[hint], -found[hint])) if found else None
        for found in candidates
    ]
    return [hint if hint is not None and score[hint] > 0 else None for hint in chosen]


def refutes(
    spec: KernelSpec, problem: Problem, expected: Mapping[str, Expected], hint: str
) -> bool:
    """Whether a mistake would have shown on a problem."""
    for mistake in spec.mistakes(problem):
        if mistake.hint != hint:
            continue
        with np.errstate(all="ignore"):
            try:
                wrong = mistake.compute(problem)
            except (IndexError, ValueError):
                return False
        return any(
            not compare(claim, expected[name]).passed
            for name, claim in wrong.items()
            if name in expected and claim.shape == expected[name].exact.shape
        )
    return False


def other_hint(case: Case, outcome: Outcome) -> str | None:
    """What can be said about a call that gave no result."""
    if outcome.status in ("raised", "crashed"):
        if case.get("garbage") == "wild":
            return PAST_TABLE
        if case.get("huge"):
            return "32-bit slot arithmetic: element offsets past 2**31 wrap round"
    return None


def pattern_hint(got: Array, expected: Expected, wrong: int, nan: int) -> str | None:
    """What can be said without knowing the mistake, from how large the errors are."""
    if expected.unit is None:
        return None
    if nan:
        return NAN
    error, size = np.abs(wide(got) - expected.exact), np.abs(expected.exact).max()
    if wrong > got.size / 3 and got.dtype == np.float32 and error.max() < 0.02 * size:
        return ROUNDED
    return None
