"""An implementation under check: what it is called with, and how a case is run on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from refengine.conformance.adapters import adapt
from refengine.conformance.answers import known_problem
from refengine.conformance.calling import Outcome, call_on_problem, load_function
from refengine.conformance.case import Case
from refengine.conformance.kernels import KERNELS
from refengine.conformance.problem import Problem
from refengine.errors import RefengineError

KINDS = ("numpy", "torch", "cupy")


@dataclass(frozen=True)
class Implementation:
    """A kernel that someone wrote, and what it takes.

    Args:
        kernel: the contract's name for what it does.
        target: "module:function"; empty where ``function`` is given.
        function: the callable itself; it then runs in this process.
        kind: whose arrays it takes: "numpy", "torch" or "cupy".
        device: "cpu" or "cuda".
        adapter: a name of ``adapters.ADAPTERS``, for another signature.
        layout: "NHD" (the contract's), or "HND": heads before slots.
    """

    kernel: str
    target: str = ""
    function: Callable[..., Any] | None = None
    kind: str = "numpy"
    device: str = "cpu"
    adapter: str | None = None
    layout: str = "NHD"

    @property
    def name(self) -> str:
        """What a report calls it."""
        return self.target or getattr(self.function, "__qualname__", repr(self.function))

    def load(self) -> Callable[..., Any]:
        """The function, adapted to the contract.

        Raises:
            RefengineError: where it, or the library of its arrays, is not there.
        """
        check_arrays(self.kind, self.device)
        function = self.function if self.function is not None else load_function(self.target)
        return adapt(function, self.kernel, self.adapter, self.layout)


def check_arrays(kind: str, device: str) -> None:
    """Whether this machine has the arrays that are asked for.

    Raises:
        RefengineError: saying what is missing.
    """
    if kind not in KINDS:
        raise RefengineError(f"backend of arrays must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "numpy":
        if device == "cuda":
            raise RefengineError(
                "NumPy arrays are on the CPU; for --device cuda take torch or cupy"
            )
        return
    try:
        module = __import__(kind)
    except ImportError as error:
        raise RefengineError(f"{kind} is not installed here ({error})") from error
    if kind == "cupy" and device == "cpu":
        raise RefengineError("CuPy arrays are on the GPU; add --device cuda")
    if device == "cuda" and kind == "torch" and not module.cuda.is_available():
        raise RefengineError("torch finds no CUDA device here; take --device cpu")


def run_case(implementation: Implementation, function: Callable[..., Any], case: Case) -> Outcome:
    """Build a case and call the function on it, all in this process."""
    spec = KERNELS[case.kernel]
    problem = known_problem(case) or spec.build(case)
    previous = spec.build(case, variation=1) if case.get("previous") else None
    return call_on_problem(
        function,
        spec,
        problem,
        kind=implementation.kind,
        device=implementation.device,
        previous=previous,
    )


def same_alone(
    implementation: Implementation, function: Callable[..., Any], case: Case
) -> bool | None:
    """Whether each sequence gets the same bits by itself as in its batch; None: it could not run.

    Batch invariance is worth having (answers that do not depend on who else is served) but is no
    part of the contract, so it is reported and not required.
    """
    spec = KERNELS[case.kernel]
    problem = spec.build(case)
    starts = problem.arguments["query_start_loc"]

    def run(part: Problem) -> Any:
        outcome = call_on_problem(
            function, spec, part, kind=implementation.kind, device=implementation.device
        )
        return outcome.runs[0]["out"] if outcome.status == "ok" else None

    whole = run(problem)
    if whole is None:
        return None
    for sequence in range(len(starts) - 1):
        rows = slice(int(starts[sequence]), int(starts[sequence + 1]))
        if rows.stop == rows.start:
            continue
        arguments = dict(problem.arguments)
        for name in ("block_tables", "seq_lens"):
            arguments[name] = arguments[name][sequence : sequence + 1].copy()
        arguments["query"], arguments["out"] = arguments["query"][rows], arguments["out"][rows]
        arguments["query_start_loc"] = (starts[sequence : sequence + 2] - starts[sequence]).copy()
        got = run(Problem(case, arguments, ("out",)))
        if got is None:
            return None
        if got.tobytes() != whole[rows].tobytes():
            return False
    return True
