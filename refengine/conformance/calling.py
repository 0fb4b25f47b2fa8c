"""Calling somebody's kernel on a problem and writing down all that it did."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refengine.conformance.guarded import Guarded, Unguarded
from refengine.conformance.precision import Array
from refengine.conformance.problem import KernelSpec, Problem
from refengine.errors import RefengineError

Function = Callable[..., Any]


@dataclass
class Outcome:
    """What became of one call.

    Args:
        status: "ok", "raised", "wrong shape", "not an array", "wrote outside", "changed input",
            "wrote nothing", and from the runner "hung", "crashed" or "not run".
        message: one line about it.
        runs: the outputs of every run that gave other bits than those before.
        num_runs: how many there were.
    """

    status: str = "ok"
    message: str = ""
    runs: list[dict[str, Array]] = field(default_factory=list)
    num_runs: int = 1


def load_function(target: str) -> Function:
    """The function of ``module:function`` or ``path/to/file.py:function``.

    Raises:
        RefengineError: saying which part cannot be found.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise RefengineError(f"implementation must be written module:function, got {target!r}")
    try:
        if place.endswith(".py"):
            module = _load_file(Path(place))
        else:
            module = importlib.import_module(place)
    except Exception as error:
        raise RefengineError(f"{place} cannot be imported: {_line(error)}") from error
    function: Any = module
    for part in name.split("."):
        if not hasattr(function, part):
            raise RefengineError(f"{place} has no {name!r}")
        function = getattr(function, part)
    if not callable(function) and not hasattr(function, "plan"):
        raise RefengineError(f"{target} is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = path.stem
    folder = str(path.resolve().parent)
    if folder not in sys.path:  # its neighbours can be imported as when it is run
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def call_on_problem(
    function: Function,
    spec: KernelSpec,
    problem: Problem,
    *,
    kind: str = "numpy",
    device: str = "cpu",
    previous: Problem | None = None,
) -> Outcome:
    """Call a kernel and look at everything that it could have touched.

    Args:
        function: the kernel.
        spec: of the kernel.
        problem: its arguments.
        kind: whose arrays it takes: "numpy", "torch" or "cupy".
        device: "cpu" or "cuda".
        previous: what the same arrays held before; the kernel runs on it first.
    """
    guards: dict[str, Guarded | Unguarded] = {}
    for name, value in problem.arguments.items():
        if isinstance(value, np.ndarray) and name not in problem.aliases:
            if problem.sparse is not None and value.nbytes > 2**30:
                guards[name] = Unguarded(value, problem.sparse, kind, device)
            else:
                guards[name] = Guarded(value, problem.gaps.get(name, 0), kind, device)
    values = {
        name: guards[problem.aliases.get(name, name)].argument
        if isinstance(value, np.ndarray)
        else value
        for name, value in problem.arguments.items()
    }
    repeats = int(problem.case.get("repeats", 1))
    outcome = Outcome(num_runs=repeats)
    steps = [*([previous] if previous is not None else []), *([problem] * repeats)]
    for step in steps:
        for name, guard in guards.items():
            fresh = step.arguments[name]
            guard.fill(None if name == "out" else fresh)
        try:
            result = _call(function, spec, values)
            _synchronize(kind, device)
        except Exception as error:
            outcome.status, outcome.message = "raised", _where(error)
            return outcome
        for guard in guards.values():
            guard.fetch()
        if step is previous:
            continue
        _inspect(outcome, problem, guards, result, kind)
        if outcome.status != "ok":
            return outcome
    return outcome


def call_plain(function: Function, spec: KernelSpec, values: Mapping[str, Any]) -> Any:
    """Call a kernel with values by the contract's names, as ``call_on_problem`` does."""
    return _call(function, spec, values)


def _call(function: Function, spec: KernelSpec, values: Mapping[str, Any]) -> Any:
    """By name where the function's parameters are the contract's, else in the contract's order."""
    names = spec.arguments
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    own = {p.name for p in plain}
    required = {p.name for p in plain if p.default is p.empty}
    if own and required <= set(names) and own & set(names):
        return function(**{name: values[name] for name in names if name in own})
    return function(*(values[name] for name in names))


def _inspect(
    outcome: Outcome, problem: Problem, guards: Mapping[str, Any], result: Any, kind: str
) -> None:
    """Fill in an outcome after a call."""
    outputs = {name: problem.aliases.get(name, name) for name in problem.outputs}
    for name, guard in guards.items():
        outside = guard.written_outside()
        if outside is not None:
            count, where = outside
            outcome.status = "wrote outside"
            outcome.message = f"wrote {count} bytes outside {name}, {where}"
            return
        if name not in outputs.values() and guard.changed():
            outcome.status = "changed input"
            outcome.message = f"changed {guard.changed()} elements of its input {name}"
            return
    got = {name: guards[home].contents() for name, home in outputs.items()}
    if result is not None:
        returned, message = _returned(result, problem, kind)
        if message:
            outcome.status, outcome.message = message
            return
        # A kernel that writes in place may return its outputs as well; what it returns counts.
        got.update(returned)
    elif "out" in guards and guards["out"].untouched() and guards["out"].view.size:
        outcome.status = "wrote nothing"
        outcome.message = "returned None and wrote nothing into out"
        return
    if not outcome.runs or any(_differs(run, got) for run in outcome.runs):
        outcome.runs.append(got)


def _returned(
    result: Any, problem: Problem, kind: str
) -> tuple[dict[str, Array], tuple[str, str] | None]:
    """The outputs that a function returned, or what is wrong with them."""
    names = problem.outputs
    values = result if isinstance(result, tuple) and len(result) == len(names) > 1 else (result,)
    if len(values) == 1 < len(names):  # of several outputs the last is the main one
        names = names[-1:]
    out: dict[str, Array] = {}
    for name, value in zip(names, values, strict=True):
        array = to_numpy(value)
        if array is None:
            wanted = "an array, or None after writing the outputs in place"
            return {}, ("not an array", f"returned {_describe(value)}; wanted {wanted}")
        shape = problem.arguments[name].shape
        if problem.sparse is not None and name != "out":
            continue
        if array.shape != shape:
            text = f"returned shape {list(array.shape)}; {name} must have shape {list(shape)}"
            return {}, ("wrong shape", text)
        if array.dtype == np.uint16 and problem.arguments[name].dtype.name == "bfloat16":
            array = array.view(problem.arguments[name].dtype)
        out[name] = array
    return out, None


def to_numpy(value: Any) -> Array | None:
    """An array of any library as NumPy's; None where it is none."""
    if isinstance(value, np.ndarray):
        return np.array(value) if value.dtype.kind not in "OUSM" else None
    if hasattr(value, "detach"):  # a torch tensor, bfloat16 and device memory included
        import torch

        host = value.detach().cpu().contiguous()
        if host.dtype == torch.bfloat16:
            import ml_dtypes

            return np.array(host.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
        return np.array(host.numpy())
    for convert in (lambda v: v.get(), lambda v: v.copy_to_host(), np.from_dlpack):
        try:
            array = convert(value)
        except Exception:  # the next way may do
            continue
        if isinstance(array, np.ndarray):
            return array.copy()
    return None


def _differs(a: Mapping[str, Array], b: Mapping[str, Array]) -> bool:
    return any(a[name].tobytes() != b[name].tobytes() for name in a)


def _describe(value: Any) -> str:
    text = " ".join(repr(value).split())
    text = text if len(text) < 40 else text[:37] + "..."
    return f"{text} ({type(value).__name__})"


def _synchronize(kind: str, device: str) -> None:
    if device == "cuda":
        if kind == "torch":
            import torch

            torch.cuda.synchronize()
        else:
            import cupy

            cupy.cuda.Device().synchronize()


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else text[:297] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _where(error: BaseException) -> str:
    """The error on one line, and the line of the user's code that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if Path(f.filename).parent != Path(__file__).parent]
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return "raised " + _line(error) + place
