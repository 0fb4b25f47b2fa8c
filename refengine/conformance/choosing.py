"""What the suite knows about kernels that choose tokens: ``top_k_top_p``, ``verify_draft_tokens``.

Their results are right or wrong; what rounding leaves undecided (a boundary nearer than float32
can tell) is left free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from refengine.conformance.case import Case
from refengine.conformance.precision import Array, Float64, wide
from refengine.conformance.problem import Expected, Location, Mistake, Problem
from refengine.conformance.row_kernels import RowKernel

UNDECIDED = 2e-5  # what float32 sums over a vocabulary may be wrong by


class TopKTopP(RowKernel):
    """``top_k_top_p``: what is not kept becomes -inf."""

    name = "top_k_top_p"
    arguments = ("logits", "top_k", "top_p", "out")
    defaults = {"num_rows": 6, "vocab_size": 100}  # noqa: RUF012
    steps = {"num_rows": (1, 2, 3), "vocab_size": (1, 2, 4, 8, 16)}  # noqa: RUF012

    def build(self, case: Case, variation: int = 0) -> Problem:
        """Rows with their own k and p; 0 and 1 keep all."""
        rng = np.random.default_rng([case.seed, variation])
        rows, vocab = self._value(case, "num_rows"), self._value(case, "vocab_size")
        logits = rng.standard_normal((rows, vocab)) * case.get("spread", 3.0)
        if case.get("ties", False):
            logits = np.round(logits)
        if case.get("masked", False):
            logits[rng.random(logits.shape) < 0.5] = -np.inf
            logits[:, 0] = 1.0
        arguments: dict[str, Any] = {
            "logits": logits.astype(np.float32),
            "top_k": np.resize(np.array(case.get("top_k", [0])), rows).astype(np.int32),
            "top_p": np.resize(np.array(case.get("top_p", [1.0])), rows).astype(np.float32),
            "out": np.empty((rows, vocab), np.float32),
        }
        return Problem(case, arguments, ("out",))

    def expected(self, problem: Problem) -> dict[str, Expected]:
        """The kept logits, bit for bit."""
        kept, free = _keep(problem.arguments)
        logits = problem.arguments["logits"]
        return {"out": Expected(np.where(kept, logits, np.float32(-np.inf)), None, free)}

    def mistakes(self, problem: Problem) -> list[Mistake]:
        """Known mistakes of filtering."""

        def computer(**switches: Any) -> Callable[[Problem], dict[str, Array]]:
            def compute(problem: Problem) -> dict[str, Array]:
                kept, _ = _keep(problem.arguments, **switches)
                logits = problem.arguments["logits"]
                return {"out": np.where(kept, logits, np.float32(-np.inf))}

            return compute

        def probabilities(problem: Problem) -> dict[str, Array]:
            kept, _ = _keep(problem.arguments)
            shifted = wide(problem.arguments["logits"])
            weights = np.exp(shifted - shifted.max(axis=1, keepdims=True))
            return {"out": (kept * weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)}

        return [
            Mistake("one token too few by top_k", computer(more=-1)),
            Mistake("one token too many by top_k", computer(more=1)),
            Mistake("top_k ignored", computer(use_k=False)),
            Mistake("top_p ignored", computer(use_p=False)),
            Mistake("the token that crosses top_p is dropped", computer(crossing=False)),
            Mistake("top_p counts tokens that top_k had removed", computer(renormalise=False)),
            Mistake("every row takes the first row's top_k and top_p", computer(first_row=True)),
            Mistake("probabilities, not logits, are written", probabilities),
        ]

    def locate(
        self, problem: Problem, output: str, index: tuple[int, ...], got: Array, expected: Expected
    ) -> Location:
        """The row is the sequence; dim is the token id."""
        return Location(sequence=index[0], token=index[0], dim=index[1], array=output)


def _keep(
    arguments: dict[str, Any],
    *,
    more: int = 0,
    use_k: bool = True,
    use_p: bool = True,
    crossing: bool = True,
    renormalise: bool = True,
    first_row: bool = False,
) -> tuple[Array, Array]:
    """Which logits stay, and which may do either."""
    logits = wide(arguments["logits"])
    kept = np.ones(logits.shape, bool)
    free = np.zeros(logits.shape, bool)
    for row, values in enumerate(logits):
        source = 0 if first_row else row
        k, p = int(arguments["top_k"][source]), float(arguments["top_p"][source])
        weights = np.exp(values - values.max())
        if use_k and 0 < k < values.size:
            size = min(max(k + more, 1), values.size)
            kept[row] = values >= np.sort(values)[-size]
        if use_p and p < 1:
            candidates = np.where(kept[row], weights, 0.0) if renormalise else weights
            order = np.argsort(-candidates, kind="stable")
            share = candidates[order] / candidates.sum()
            before = np.cumsum(share) - share
            chosen = before < p if crossing else before + share <= p
            chosen[0] = True
            inside = np.zeros(values.size, bool)
            inside[order[chosen]] = True
            kept[row] &= inside
            free[row, order] = (np.abs(before - p) < UNDECIDED) & (np.arange(order.size) > 0)
            # Among equal probabilities any may stay.
            edge = candidates[order[max(int(chosen.sum()) - 1, 0)]]
            tied = candidates == edge
            if tied.sum() > 1:
                free[row] |= tied
    return kept, free


class VerifyDraftTokens:
    """``verify_draft_tokens``: speculative sampling (arXiv 2211.17192, 2302.01318)."""

    name = "verify_draft_tokens"
    arguments = ("draft_token_ids", "draft_probs", "target_probs", "uniforms", "out")

    def build(self, case: Case, variation: int = 0) -> Problem:
        """Drafts that agree with the target more or less; some sequences have fewer."""
        rng = np.random.default_rng([case.seed, variation])
        seqs, drafts = case.get("num_seqs", 8), case.get("num_drafts", 3)
        vocab, agreement = case.get("vocab_size", 20), case.get("agreement", 0.5)
        own = rng.dirichlet(np.full(vocab, 0.5), (seqs, drafts))
        other = rng.dirichlet(np.full(vocab, 0.5), (seqs, drafts + 1))
        target = other.copy()
        target[:, :drafts] = agreement * own + (1 - agreement) * other[:, :drafts]
        if case.get("one_hot", False):  # a draft that is sure of itself, as an n-gram is
            own = np.eye(vocab)[own.argmax(axis=-1)]
        tokens = np.array([[rng.choice(vocab, p=p) for p in row] for row in own]).reshape(
            seqs, drafts
        )
        counts = np.resize(np.array(case.get("counts", [drafts])), seqs)
        tokens[np.arange(drafts) >= counts[:, np.newaxis]] = -1
        arguments: dict[str, Any] = {
            "draft_token_ids": tokens.astype(np.int64),
            "draft_probs": own.astype(np.float32),
            "target_probs": target.astype(np.float32),
            "uniforms": rng.random((seqs, drafts + 1), np.float32),
            "out": np.empty((seqs, drafts + 1), np.int64),
        }
        return Problem(case, arguments, ("out",))

    def expected(self, problem: Problem) -> dict[str, Expected]:
        """Accepted drafts, then one token from the residual or the target, then -1."""
        exact, free = _verify(problem.arguments)
        return {"out": Expected(exact, None, free)}

    def locate(
        self, problem: Problem, output: str, index: tuple[int, ...], got: Array, expected: Expected
    ) -> Location:
        """Sequence, and the place in it."""
        return Location(sequence=index[0], token=index[1], array=output)

    def mistakes(self, problem: Problem) -> list[Mistake]:
        """Known mistakes of rejection sampling."""

        def computer(**switches: Any) -> Callable[[Problem], dict[str, Array]]:
            return lambda problem: {"out": _verify(problem.arguments, **switches)[0]}

        return [
            Mistake("accepted by draft / target, not target / draft", computer(inverted=True)),
            Mistake(
                "after a rejection the target is sampled, not the residual max(0, target - draft)",
                computer(residual=False),
            ),
            Mistake("drafts after a rejected one are still accepted", computer(stops=False)),
            Mistake("no token after the last accepted draft", computer(bonus=False)),
            Mistake(
                "accepted only where the draft is the target's likeliest", computer(greedy=True)
            ),
            Mistake("every draft is accepted", computer(accept_all=True)),
        ]

    def smaller(self, values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Fewer sequences, drafts and tokens."""
        for key, default in (("num_seqs", 8), ("num_drafts", 3), ("vocab_size", 20)):
            for size in (1, 2, 4, 8):
                if size < values.get(key, default):
                    yield {**values, key: size}

    def traffic(self, problem: Problem) -> tuple[int, int]:
        """Both distributions once."""
        a = problem.arguments
        return a["draft_probs"].nbytes + a["target_probs"].nbytes, 2 * a["target_probs"].size


def _verify(
    a: dict[str, Any],
    *,
    inverted: bool = False,
    residual: bool = True,
    stops: bool = True,
    bonus: bool = True,
    greedy: bool = False,
    accept_all: bool = False,
) -> tuple[Array, Array]:
    """The tokens, and which of them rounding leaves undecided."""
    out = np.full(a["out"].shape, -1, np.int64)
    free = np.zeros(out.shape, bool)
    for seq, drafts in enumerate(a["draft_token_ids"].tolist()):
        place, rejected = 0, False
        for i, token in enumerate(drafts):
            if token < 0:
                break
            p, q = float(a["target_probs"][seq, i, token]), float(a["draft_probs"][seq, i, token])
            ratio = q / max(p, 1e-30) if inverted else p / max(q, 1e-30)
            u = float(a["uniforms"][seq, i])
            accepted = accept_all or u < ratio
            if greedy:
                accepted = token == int(a["target_probs"][seq, i].argmax())
            if abs(u - ratio) < UNDECIDED:
                free[seq] = True
            if accepted:
                out[seq, place] = token
                place += 1
                continue
            rejected = True
            if stops:
                break
        if rejected or bonus:
            number = min(place, len(drafts))
            weights: Float64 = wide(a["target_probs"][seq, number])
            if rejected and residual:
                weights = np.maximum(weights - wide(a["draft_probs"][seq, number]), 0)
            cumulative = np.cumsum(weights)
            wanted = float(a["uniforms"][seq, -1]) * cumulative[-1]
            out[seq, place] = min(
                int(np.searchsorted(cumulative, wanted, side="right")), weights.size - 1
            )
            if np.abs(cumulative - wanted).min() < UNDECIDED * max(cumulative[-1], 1e-3):
                free[seq, place] = True
    return out, free
