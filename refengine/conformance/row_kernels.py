"""What the suite knows about kernels that work row by row: norms, gates, rotation, merging."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from refengine.conformance.budget import scale_unit
from refengine.conformance.case import Case
from refengine.conformance.precision import (
    SINGLE,
    UNIT_ROUNDOFF,
    Array,
    Float64,
    activation_dtype,
    budget_unit,
    format_name,
    is_low,
    rounded,
    single,
    wide,
)
from refengine.conformance.problem import Expected, Location, Mistake, Problem
from refengine.conformance.shrinking import smaller_numbers

Arguments = dict[str, Any]


class RowKernel:
    """What they share: one row a token, the last axis summed or paired."""

    name: str
    arguments: tuple[str, ...]
    defaults: Mapping[str, int]
    steps: Mapping[str, tuple[int, ...]]

    def _value(self, case: Case, key: str) -> Any:
        return case.get(key, self.defaults[key])

    def locate(
        self, problem: Problem, output: str, index: tuple[int, ...], got: Array, expected: Expected
    ) -> Location:
        """Token, head where there are heads, and dim."""
        head = index[1] if len(index) == 3 else None
        return Location(token=index[0], head=head, dim=index[-1], array=output)

    def smaller(self, values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Smaller sizes, then fewer properties."""
        for key, sizes in self.steps.items():
            yield from smaller_numbers(values, key, self.defaults[key], sizes)
        for key in ("strided", "repeats", "in_place", "large", "previous", "extremes"):
            if key in values:
                yield {k: v for k, v in values.items() if k != key}

    def traffic(self, problem: Problem) -> tuple[int, int]:
        """Every array once, and a few operations an element."""
        arrays = {k: v for k, v in problem.arguments.items() if isinstance(v, np.ndarray)}
        moved = sum(a.nbytes for a in arrays.values())
        moved += sum(arrays[n].nbytes for n in problem.outputs if n != "out")  # read and written
        return moved, 8 * max(a.size for a in arrays.values())


def _sum_of_squares(x: Array) -> Array:
    """One after another in float32: the plainest order."""
    total: Array = np.cumsum(x * x, axis=-1, dtype=np.float32)[..., -1:]
    return total


class RmsNorm(RowKernel):
    """``rms_norm`` and ``fused_add_rms_norm``."""

    defaults = {"num_tokens": 5, "width": 64, "num_heads": 0}  # noqa: RUF012
    steps = {"num_tokens": (1, 2, 4), "width": (1, 2, 4, 8, 16, 64), "num_heads": (0, 1)}  # noqa: RUF012

    def __init__(self, fused: bool) -> None:
        self.fused = fused
        self.name = "fused_add_rms_norm" if fused else "rms_norm"
        self.arguments = ("x", *(("residual",) if fused else ()), "weight", "eps", "out")

    def build(self, case: Case, variation: int = 0) -> Problem:
        """Rows of normal size, or tiny ones, where eps decides."""
        rng = np.random.default_rng([case.seed, variation])
        tokens, width = self._value(case, "num_tokens"), self._value(case, "width")
        heads, dtype = self._value(case, "num_heads"), activation_dtype(case.dtype)
        shape = (tokens, heads, width) if heads else (tokens, width)
        size = float(case.get("size", 1.0))
        arguments: Arguments = {"x": rounded(rng.standard_normal(shape) * size, dtype)}
        if self.fused:
            arguments["residual"] = rounded(rng.standard_normal(shape) * size, dtype)
        weight = rng.standard_normal(width) + 1
        arguments["weight"] = rounded(weight, dtype)
        arguments["eps"] = float(case.get("eps", 1e-5))
        arguments["out"] = np.empty(shape, dtype)
        gap = 16 if case.get("strided") else 0
        strided = [name for name in ("x", "residual", "out") if gap and name in arguments]
        gaps: dict[str, int] = dict.fromkeys(strided, gap)
        aliases = {"out": "x"} if case.get("in_place") else {}
        outputs = ("residual", "out") if self.fused else ("out",)
        return Problem(case, arguments, outputs, {} if aliases else gaps, aliases=aliases)

    def expected(self, problem: Problem) -> dict[str, Expected]:
        """Float64; the residual's sum is rounded to its dtype before it is normalised."""
        a = problem.arguments
        x, dtype = a["x"], a["out"].dtype
        out: dict[str, Expected] = {}
        if self.fused:
            x = rounded(single(a["residual"]) + single(x), dtype)
            out["residual"] = Expected(x)
        exact = _norm(wide(x), wide(a["weight"]), a["eps"])
        s = single(x)
        inverse = np.float32(1) / np.sqrt(
            _sum_of_squares(s) / np.float32(s.shape[-1]) + np.float32(a["eps"])
        )
        dense = rounded(s * inverse * single(a["weight"]), dtype)
        first_order = budget_unit(format_name(dtype), exact) + 3 * SINGLE * np.abs(exact)
        if is_low(dtype):  # x may be rounded before it is multiplied by the weight
            first_order += 0.5 * UNIT_ROUNDOFF[format_name(dtype)] * np.abs(exact)
        out["out"] = Expected(exact, scale_unit(first_order, dense, exact))
        return out

    def mistakes(self, problem: Problem) -> list[Mistake]:
        """Known mistakes of normalising."""
        fused = self.fused

        def with_rule(rule: Callable[[Float64, Float64, float], Float64]) -> Any:
            def compute(problem: Problem) -> dict[str, Array]:
                a = problem.arguments
                x = wide(a["x"]) + (wide(a["residual"]) if fused else 0)
                return {"out": rule(x, wide(a["weight"]), a["eps"])}

            return compute

        def mean(x: Float64) -> Float64:
            out: Float64 = np.mean(x, axis=-1, keepdims=True)
            return out

        rules: dict[str, Callable[[Float64, Float64, float], Float64]] = {
            "eps ignored": lambda x, w, eps: _norm(x, w, 0.0),
            "eps added after the square root": lambda x, w, eps: (
                x / (np.sqrt(mean(x * x)) + eps) * w
            ),
            "the sum of squares is not divided by the width": lambda x, w, eps: (
                x / np.sqrt(x.shape[-1] * mean(x * x) + eps) * w
            ),
            "the mean is subtracted: layer norm, not RMS norm": lambda x, w, eps: (
                (x - mean(x)) / np.sqrt(mean((x - mean(x)) ** 2) + eps) * w
            ),
            "the weight is ignored": lambda x, w, eps: _norm(x, w * 0 + 1, eps),
            "the weight is taken as 1 + weight": lambda x, w, eps: _norm(x, w + 1, eps),
        }
        found = [Mistake(hint, with_rule(rule)) for hint, rule in rules.items()]
        if fused:
            found.append(
                Mistake(
                    "the residual is not added before the norm",
                    lambda p: {
                        "out": _norm(
                            wide(p.arguments["x"]), wide(p.arguments["weight"]), p.arguments["eps"]
                        )
                    },
                )
            )
        return found


def _norm(x: Float64, weight: Float64, eps: float) -> Float64:
    with np.errstate(all="ignore"):
        out: Float64 = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight
    return out


class Gated(RowKernel):
    """``silu_and_mul`` and ``gelu_tanh_and_mul``."""

    arguments = ("x", "out")
    defaults = {"num_tokens": 5, "width": 32}  # noqa: RUF012
    steps = {"num_tokens": (1, 2, 4), "width": (1, 2, 4, 8, 16)}  # noqa: RUF012

    def __init__(self, activation: str) -> None:
        self.activation = activation
        self.name = f"{activation}_and_mul"

    def build(self, case: Case, variation: int = 0) -> Problem:
        """Gates of either sign; ``large`` ones overflow exp."""
        rng = np.random.default_rng([case.seed, variation])
        tokens, width = self._value(case, "num_tokens"), self._value(case, "width")
        dtype = activation_dtype(case.dtype)
        size = 100.0 if case.get("large") else 2.0
        x = rounded(rng.standard_normal((tokens, 2 * width)) * size, dtype)
        gaps = {"x": 8, "out": 8} if case.get("strided") else {}
        arguments = {"x": x, "out": np.empty((tokens, width), dtype)}
        return Problem(case, arguments, ("out",), gaps)

    def _gate(self, gate: Array) -> Array:
        with np.errstate(over="ignore"):
            if self.activation == "silu":
                out: Array = gate / (1 + np.exp(-gate))
            else:
                inside = gate.dtype.type(np.sqrt(2 / np.pi)) * (
                    gate + gate.dtype.type(0.044715) * gate**3
                )
                out = gate / 2 * (1 + np.tanh(inside))
        return out

    def expected(self, problem: Problem) -> dict[str, Expected]:
        """Float64; where the gate nearly closes, only its absolute error counts for gelu."""
        x, dtype = problem.arguments["x"], problem.arguments["out"].dtype
        gate, up = np.split(wide(x), 2, axis=1)
        exact = self._gate(gate) * up
        dense = rounded(np.multiply(*_halves(single(x), self._gate)), dtype)
        first_order = budget_unit(format_name(dtype), exact)
        low = UNIT_ROUNDOFF[format_name(dtype)]
        if self.activation == "silu":
            # Hardware's exp2 and division are off by two units each; exp magnifies its argument's.
            first_order += SINGLE * (6 + 2 * np.abs(gate)) * np.abs(exact)
            first_order += low * np.abs(exact) / 2
            # exp overflows in float32 beyond 88: what is left is below its smallest number.
            first_order += np.abs(up * gate) * 2.0**-126
        else:
            # 1 + tanh cancels for negative gates; a tanh may be off by two units in the last place.
            first_order += 1.5 * low * np.abs(gate * up) + SINGLE * np.abs(exact) * (6 + gate**2)
        return {"out": Expected(exact, scale_unit(first_order, dense, exact))}

    def mistakes(self, problem: Problem) -> list[Mistake]:
        """Known mistakes of gating."""
        other = Gated("gelu_tanh" if self.activation == "silu" else "silu")

        def exchanged(problem: Problem) -> dict[str, Array]:
            gate, up = np.split(wide(problem.arguments["x"]), 2, axis=1)
            return {"out": self._gate(up) * gate}

        def interleaved(problem: Problem) -> dict[str, Array]:
            x = wide(problem.arguments["x"])
            return {"out": self._gate(x[:, ::2]) * x[:, 1::2]}

        def wrong_gate(problem: Problem) -> dict[str, Array]:
            gate, up = np.split(wide(problem.arguments["x"]), 2, axis=1)
            return {"out": other._gate(gate) * up}

        def sigmoid(problem: Problem) -> dict[str, Array]:
            gate, up = np.split(wide(problem.arguments["x"]), 2, axis=1)
            with np.errstate(over="ignore"):
                return {"out": up / (1 + np.exp(-gate))}

        def overflowing(problem: Problem) -> dict[str, Array]:
            gate, up = np.split(single(problem.arguments["x"]), 2, axis=1)
            with np.errstate(all="ignore"):
                e = np.exp(gate)
                return {"out": wide(gate * e / (1 + e) * up)}

        return [
            Mistake("gate and up exchanged: the first half is the gate", exchanged),
            Mistake("gate and up read as neighbours, not as halves", interleaved),
            Mistake(f"another activation: {other.activation}", wrong_gate),
            Mistake("sigmoid, not multiplied by the gate", sigmoid),
            Mistake("exp of a large gate overflows: exp(x) / (1 + exp(x)) is NaN", overflowing),
        ]


def _halves(x: Array, gate: Callable[[Array], Array]) -> tuple[Array, Array]:
    first, second = np.split(x, 2, axis=1)
    return gate(first), second
