"""What the suite knows about ``merge_partial_attention``."""

from __future__ import annotations

from typing import Any

import numpy as np

from refengine.conformance.budget import scale_unit
from refengine.conformance.case import Case
from refengine.conformance.precision import (
    SINGLE,
    Array,
    Float64,
    activation_dtype,
    budget_unit,
    format_name,
    rounded,
    single,
    wide,
)
from refengine.conformance.problem import Expected, Mistake, Problem
from refengine.conformance.row_kernels import RowKernel


class MergePartialAttention(RowKernel):
    """``merge_partial_attention``: results over parts of the keys into one."""

    name = "merge_partial_attention"
    arguments = ("partial_outputs", "log_sum_exps", "out")
    defaults = {"num_parts": 4, "num_tokens": 5, "num_q_heads": 3, "head_dim": 32}  # noqa: RUF012
    steps = {  # noqa: RUF012
        "num_parts": (1, 2, 3),
        "num_tokens": (1, 2),
        "num_q_heads": (1, 2),
        "head_dim": (1, 2, 4, 8),
    }

    def build(self, case: Case, variation: int = 0) -> Problem:
        """Parts of unlike size; some empty, with NaN in them; a row with no keys at all."""
        rng = np.random.default_rng([case.seed, variation])
        parts, tokens = self._value(case, "num_parts"), self._value(case, "num_tokens")
        heads, head_dim = self._value(case, "num_q_heads"), self._value(case, "head_dim")
        shape = (parts, tokens, heads)
        sums = rng.standard_normal(shape) * 2 + case.get("level", 0.0)
        partial = rng.standard_normal((*shape, head_dim))
        if case.get("empty", False):
            empty = rng.random(shape) < 0.4
            empty[:, -1] = True  # the last token has no keys anywhere
            sums[empty], partial[empty] = -np.inf, np.nan
        if case.get("unlike", False):
            sums *= 40
        arguments: dict[str, Any] = {
            "partial_outputs": rounded(partial, activation_dtype(case.dtype)),
            "log_sum_exps": sums.astype(np.float32),
            "out": np.empty((tokens, heads, head_dim), activation_dtype(case.dtype)),
        }
        return Problem(case, arguments, ("out",))

    def expected(self, problem: Problem) -> dict[str, Expected]:
        """Float64 against a plain float32 sum."""
        a, dtype = problem.arguments, problem.arguments["out"].dtype
        exact, shares = _merge(wide(a["partial_outputs"]), wide(a["log_sum_exps"]))
        dense, _ = _merge(single(a["partial_outputs"]), a["log_sum_exps"])
        partial = np.nan_to_num(np.abs(wide(a["partial_outputs"])))
        level = np.where(np.isfinite(a["log_sum_exps"]), np.abs(a["log_sum_exps"]), 0)
        moved = (shares * (6 + 2 * wide(level)))[..., np.newaxis]  # exp of a rounded difference
        first_order = budget_unit(format_name(dtype), exact)
        first_order += SINGLE * (moved * partial).sum(axis=0)
        first_order += SINGLE * moved.sum(axis=0) * np.abs(exact)
        return {"out": Expected(exact, scale_unit(first_order, rounded(dense, dtype), exact))}

    def mistakes(self, problem: Problem) -> list[Mistake]:
        """Known mistakes of merging."""

        def weighted(weigh: Any) -> Any:
            def compute(problem: Problem) -> dict[str, Array]:
                a = problem.arguments
                with np.errstate(all="ignore"):
                    sums = wide(a["log_sum_exps"])
                    parts = np.where(np.isneginf(sums)[..., np.newaxis], 0, a["partial_outputs"])
                    return {"out": (weigh(sums)[..., np.newaxis] * wide(parts)).sum(axis=0)}

            return compute

        def leaking(problem: Problem) -> dict[str, Array]:
            a = problem.arguments
            _, shares = _merge(wide(a["partial_outputs"]), wide(a["log_sum_exps"]))
            return {"out": (shares[..., np.newaxis] * wide(a["partial_outputs"])).sum(axis=0)}

        def two(sums: Float64) -> Float64:
            weights = np.exp2(sums - sums.max(axis=0, initial=-1e30))
            out: Float64 = np.nan_to_num(weights / weights.sum(axis=0))
            return out

        def unshifted(sums: Float64) -> Float64:
            weights = wide(np.exp(sums.astype(np.float32)))
            out: Float64 = weights / weights.sum(axis=0)
            return out

        return [
            Mistake(
                "the merge forgets the scale: parts are averaged, not weighted by exp(log_sum_exp)",
                weighted(lambda s: np.isfinite(s) / np.maximum(np.isfinite(s).sum(axis=0), 1)),
            ),
            Mistake(
                "the merge forgets the scale: parts are added up",
                weighted(lambda s: np.isfinite(s) * 1.0),
            ),
            Mistake(
                "weights are not divided by their sum",
                weighted(lambda s: np.exp(s - s.max(axis=0, initial=-1e30))),
            ),
            Mistake("log_sum_exps taken to base 2", weighted(two)),
            Mistake("without the maximum: exp of a large log_sum_exp overflows",
                    weighted(unshifted)),
            Mistake("an empty part leaks: a weight of 0 times NaN is NaN", leaking),
            Mistake("a row without keys is 0 / 0: NaN, where zeros are wanted",
                    weighted(lambda s: np.exp(s - s.max(axis=0)) / np.exp(s - s.max(axis=0)).sum(0)
                             )),
        ]  # fmt: skip


def _merge(partial: Array, sums: Array) -> tuple[Array, Array]:
    """The merged rows, and each part's share of each row."""
    greatest = sums.max(axis=0)
    weights = np.exp(sums - np.where(np.isneginf(greatest), 0, greatest))
    total = weights.sum(axis=0)
    shares = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    out = np.zeros(partial.shape[1:], partial.dtype)
    for share, part in zip(shares[..., np.newaxis], partial, strict=True):
        out += share * np.where(share > 0, part, 0)
    return out, shares
