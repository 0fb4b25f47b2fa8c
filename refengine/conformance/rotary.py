"""What the suite knows about ``rotary_embedding``."""

from __future__ import annotations

from typing import Any

import numpy as np

from refengine.conformance.budget import scale_unit
from refengine.conformance.case import Case
from refengine.conformance.precision import (
    SINGLE,
    UNIT_ROUNDOFF,
    Array,
    activation_dtype,
    budget_unit,
    format_name,
    rounded,
    single,
    wide,
)
from refengine.conformance.problem import Expected, Mistake, Problem
from refengine.conformance.row_kernels import RowKernel


class RotaryEmbedding(RowKernel):
    """``rotary_embedding``: in place, halves paired."""

    name = "rotary_embedding"
    arguments = ("positions", "query", "key", "cos_sin_cache")
    defaults = {  # noqa: RUF012
        "num_tokens": 6,
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "num_positions": 64,
    }
    steps = {  # noqa: RUF012
        "num_tokens": (1, 2, 4),
        "num_q_heads": (1, 2),
        "num_kv_heads": (1,),
        "head_dim": (2, 4, 8, 16),
    }

    def build(self, case: Case, variation: int = 0) -> Problem:
        """Positions in any order, some of them equal; the last of the table among them."""
        rng = np.random.default_rng([case.seed, variation])
        tokens, head_dim = self._value(case, "num_tokens"), self._value(case, "head_dim")
        limit, dtype = self._value(case, "num_positions"), activation_dtype(case.dtype)
        rotary_dim = min(case.get("rotary_dim", 0) or head_dim, head_dim)
        positions = rng.integers(0, limit, tokens)
        positions[: tokens // 2] = np.arange(limit - tokens // 2, limit)
        frequencies = 10000.0 ** -(np.arange(0, rotary_dim, 2) / rotary_dim)
        angles = np.arange(limit)[:, np.newaxis] * frequencies
        table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
        q_heads, kv_heads = self._value(case, "num_q_heads"), self._value(case, "num_kv_heads")
        arguments: dict[str, Any] = {
            "positions": positions.astype(np.int64),
            "query": rounded(rng.standard_normal((tokens, q_heads, head_dim)), dtype),
            "key": rounded(rng.standard_normal((tokens, kv_heads, head_dim)), dtype),
            "cos_sin_cache": table,
        }
        strided = case.get("strided", False)
        gaps = {"query": 2 * kv_heads * head_dim, "key": q_heads * head_dim} if strided else {}
        return Problem(case, arguments, ("query", "key"), gaps)

    def expected(self, problem: Problem) -> dict[str, Expected]:
        """Float64; a low-precision kernel may round the table to its dtype."""
        a = problem.arguments
        out = {}
        for name in ("query", "key"):
            heads = a[name]
            exact, parts = _rotate(wide(heads), a["positions"], wide(a["cos_sin_cache"]))
            dense, _ = _rotate(single(heads), a["positions"], a["cos_sin_cache"])
            low = UNIT_ROUNDOFF[format_name(heads.dtype)]
            first_order = budget_unit(format_name(heads.dtype), exact)
            first_order += (SINGLE + low / 2) * parts
            unit = scale_unit(first_order, rounded(dense, heads.dtype), exact)
            rotary_dim = a["cos_sin_cache"].shape[1]
            unit[..., rotary_dim:] = 1e-300  # the rest stays as it is
            out[name] = Expected(exact, unit)
        return out

    def mistakes(self, problem: Problem) -> list[Mistake]:
        """Known mistakes of rotating."""

        def computer(**switches: Any) -> Any:
            def compute(problem: Problem) -> dict[str, Array]:
                a = problem.arguments
                table = wide(a["cos_sin_cache"])
                return {
                    name: _rotate(wide(a[name]), a["positions"], table, **switches)[0]
                    for name in ("query", "key")
                }

            return compute

        def query_only(problem: Problem) -> dict[str, Array]:
            return {**computer()(problem), "key": wide(problem.arguments["key"])}

        return [
            Mistake(
                "pairs are neighbours (GPT-J), not halves (GPT-NeoX)", computer(neighbours=True)
            ),
            Mistake("rotated the other way: the sine's sign", computer(sign=-1.0)),
            Mistake(
                "positions ignored: token i is rotated by i, not by positions[i]",
                computer(own_positions=False),
            ),
            Mistake("positions off by one", computer(shift=1)),
            Mistake("the second half reads what the first has just written", computer(stale=True)),
            Mistake("cosines and sines exchanged", computer(exchanged=True)),
            Mistake("keys are not rotated", query_only),
        ]


def _rotate(
    heads: Array,
    positions: Array,
    table: Array,
    *,
    neighbours: bool = False,
    sign: float = 1.0,
    own_positions: bool = True,
    shift: int = 0,
    stale: bool = False,
    exchanged: bool = False,
) -> tuple[Array, Array]:
    """Rotated heads, and for each element the sum of its two products' sizes."""
    if not own_positions:
        positions = np.arange(positions.size)
    rows = table[np.minimum(positions + shift, table.shape[0] - 1)][:, np.newaxis, :]
    half = table.shape[1] // 2
    cos, sin = rows[..., :half], heads.dtype.type(sign) * rows[..., half:]
    if exchanged:
        cos, sin = sin, cos
    if neighbours:
        places = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        places = slice(0, half), slice(half, 2 * half)
    a, b = heads[..., places[0]], heads[..., places[1]]
    out, parts = heads.copy(), np.zeros_like(heads)
    out[..., places[0]] = a * cos - b * sin
    out[..., places[1]] = b * cos + (out[..., places[0]] if stale else a) * sin
    parts[..., places[0]] = np.abs(a * cos) + np.abs(b * sin)
    parts[..., places[1]] = np.abs(b * cos) + np.abs(a * sin)
    return out, parts
