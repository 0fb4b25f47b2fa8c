"""The two products of attention over one tile of keys, four rows at a time.

Rows are one to four queries; their number is part of the compiled version's type, so that each
version keeps its products in registers. Arrays are flat float32 (keys and values also bfloat16 as
uint16); key or value ``k`` of the tile lies at ``offsets[k] + shift``.
"""

from __future__ import annotations

from typing import Any

from refengine.cpu.attention_pages import ask_for
from refengine.cpu.jit import inner
from refengine.cpu.simd import LANES
from refengine.cpu.simd_grid import (
    load_each,
    load_grid,
    multiply_rows,
    outer_fma,
    splat_each,
    store_grid,
    store_row_sums,
    zero_grid,
)


@inner
def score_rows(
    queries: Any, query: int, padded: int, count: int, keys: Any, offsets: Any,
    shift: int, first: int, stop: int, scores: Any, score: int, width: int, ask: Any,
) -> None:  # fmt: skip
    """``scores[r, k] = queries[r] . keys[k]`` for keys ``first .. stop - 1``.

    Keys are taken in fours from ``first``, a multiple of four, so up to three past ``stop`` are
    scored as well.

    Args:
        queries: row r begins at ``query + r * padded``.
        query: element offset.
        padded: length of a row, a multiple of 16.
        count: rows, 1 to 4.
        keys: rows of ``padded`` elements.
        offsets: ``[width]`` int64.
        shift: added to every offset.
        first: of the tile's keys.
        stop: of the tile's keys.
        scores: row r begins at ``score + r * width``.
        score: element offset.
        width: keys of a tile.
        ask: what memory is asked for meanwhile: key cache, value cache, where the next tile's keys
            lie, what is added to that, and elements a key (0: nothing).
    """
    q0, s0 = query, score
    q1, s1 = q0 + padded, s0 + width
    q2, s2 = q1 + padded, s1 + width
    q3, s3 = q2 + padded, s2 + width
    if count == 4:
        _score(queries, (q0, q1, q2, q3), padded, keys, offsets, shift, first, stop, scores,
               (s0, s1, s2, s3), ask)  # fmt: skip
    elif count == 3:
        _score(queries, (q0, q1, q2), padded, keys, offsets, shift, first, stop, scores,
               (s0, s1, s2), ask)  # fmt: skip
    elif count == 2:
        _score(queries, (q0, q1), padded, keys, offsets, shift, first, stop, scores,
               (s0, s1), ask)  # fmt: skip
    else:
        _score(queries, (q0,), padded, keys, offsets, shift, first, stop, scores,
               (s0,), ask)  # fmt: skip


@inner
def _score(
    queries: Any, rows: Any, padded: int, keys: Any, offsets: Any, shift: int, first: int,
    stop: int, scores: Any, score_rows: Any, ask: Any,
) -> None:  # fmt: skip
    key_cache, _, upcoming, ahead, count = ask
    for k in range(first, stop, 4):
        for j in range(k, k + 4):
            ask_for(key_cache, upcoming[j] + ahead, count)
        four = (
            offsets[k] + shift,
            offsets[k + 1] + shift,
            offsets[k + 2] + shift,
            offsets[k + 3] + shift,
        )
        products = zero_grid(rows, four)
        for i in range(0, padded, LANES):
            products = outer_fma(products, load_each(queries, rows, i), load_each(keys, four, i))
        store_row_sums(scores, score_rows, k, products)


@inner
def add_values(
    weights: Any, weight: int, width: int, scales: Any, scale: int, count: int, values: Any,
    offsets: Any, shift: int, first: int, stop: int, sums: Any, total: int, padded: int, ask: Any,
) -> None:  # fmt: skip
    """``sums[r] = sums[r] * scales[r] + sum of weights[r, k] * values[k]``, k in order.

    Args:
        weights: row r begins at ``weight + r * width``.
        weight: element offset.
        width: keys of a tile.
        scales: row r's scale is at ``scale + r``.
        scale: element offset.
        count: rows, 1 to 4.
        values: rows of ``padded`` elements.
        offsets: ``[width]`` int64.
        shift: added to every offset.
        first: of the tile's keys.
        stop: of the tile's keys.
        sums: row r begins at ``total + r * padded``.
        total: element offset.
        padded: length of a row, a multiple of 16.
        ask: as for ``score_rows``.
    """
    w0, c0, t0 = weight, scale, total
    w1, c1, t1 = w0 + width, c0 + 1, t0 + padded
    w2, c2, t2 = w1 + width, c1 + 1, t1 + padded
    w3, c3, t3 = w2 + width, c2 + 1, t2 + padded
    if count == 4:
        _add(weights, (w0, w1, w2, w3), scales, (c0, c1, c2, c3), values, offsets, shift,
             first, stop, sums, (t0, t1, t2, t3), padded, ask)  # fmt: skip
    elif count == 3:
        _add(weights, (w0, w1, w2), scales, (c0, c1, c2), values, offsets, shift,
             first, stop, sums, (t0, t1, t2), padded, ask)  # fmt: skip
    elif count == 2:
        _add(weights, (w0, w1), scales, (c0, c1), values, offsets, shift,
             first, stop, sums, (t0, t1), padded, ask)  # fmt: skip
    else:
        _add(weights, (w0,), scales, (c0,), values, offsets, shift,
             first, stop, sums, (t0,), padded, ask)  # fmt: skip


@inner
def _add(
    weights: Any, weight_rows: Any, scales: Any, scale_rows: Any, values: Any, offsets: Any,
    shift: int, first: int, stop: int, sums: Any, sum_rows: Any, padded: int, ask: Any,
) -> None:  # fmt: skip
    _, value_cache, upcoming, ahead, count = ask
    scale = splat_each(scales, scale_rows, 0)
    wide = padded - padded % (4 * LANES)
    for i in range(0, wide, 4 * LANES):
        columns = (i, i + LANES, i + 2 * LANES, i + 3 * LANES)
        grid = multiply_rows(load_grid(sums, sum_rows, columns), scale)
        for k in range(first, stop):
            if i == 0:
                ask_for(value_cache, upcoming[k] + ahead, count)
            row = load_each(values, columns, offsets[k] + shift)
            grid = outer_fma(grid, splat_each(weights, weight_rows, k), row)
        store_grid(sums, sum_rows, columns, grid)
    for i in range(wide, padded, LANES):
        column = (i,)
        narrow = multiply_rows(load_grid(sums, sum_rows, column), scale)
        for k in range(first, stop):
            if i == 0:
                ask_for(value_cache, upcoming[k] + ahead, count)
            part = load_each(values, column, offsets[k] + shift)
            narrow = outer_fma(narrow, splat_each(weights, weight_rows, k), part)
        store_grid(sums, sum_rows, column, narrow)
