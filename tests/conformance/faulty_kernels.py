"""Functions that misbehave in other ways than by computing something wrong."""

from __future__ import annotations

import os
import time

import numpy as np

from refengine.reference import paged_attention as right


def raises(*arguments):
    raise KeyError("no such thing")


def returns_another_shape(*arguments):
    return np.zeros((3, 3))


def returns_text(*arguments):
    return "done"


def does_nothing(*arguments):
    pass


def writes_after_the_end(*arguments):
    right(*arguments)
    out = arguments[-1]
    longer = np.lib.stride_tricks.as_strided(out, (out.shape[0] + 1, *out.shape[1:]))
    longer[-1] = 0


def writes_before_the_start(*arguments):
    right(*arguments)
    out = arguments[-1]
    memory = np.lib.stride_tricks.as_strided(out, (1,), (4,))
    address = memory.__array_interface__["data"][0]
    import ctypes

    ctypes.memset(address - 8, 0, 8)


def changes_its_query(*arguments):
    right(*arguments)
    arguments[0][...] *= 2


def changes_the_cache(*arguments):
    right(*arguments)
    arguments[1][...] = np.nan_to_num(arguments[1])


def hangs_on_empty_sequences(*arguments):
    if 0 in arguments[4]:
        time.sleep(1000)
    right(*arguments)


def always_hangs(*arguments):
    time.sleep(1000)


def crashes_on_pages_of_one(*arguments):
    if arguments[1].shape[1] == 1:
        import ctypes

        ctypes.string_at(0)
    right(*arguments)


def exits(*arguments):
    if arguments[1].shape[1] == 8:
        os._exit(3)
    print("what a kernel prints must not spoil the report")
    right(*arguments)


def returns_the_result(
    query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, scale,
    sliding_window, logits_soft_cap,
):  # fmt: skip
    out = np.empty_like(query)
    right(
        query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, scale,
        sliding_window, logits_soft_cap, out,
    )  # fmt: skip
    return out


def another_order_of_names(
    out, query, scale, key_cache, value_cache, seq_lens, block_tables, query_start_loc,
    logits_soft_cap, sliding_window,
):  # fmt: skip
    right(
        query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, scale,
        sliding_window, logits_soft_cap, out,
    )  # fmt: skip


not_a_function = 3
