"""What every attention kernel asks first: whose token is this, and what does it see?"""

from __future__ import annotations

from typing import Any

from . import ptx
from .ptx import I32, U32, U64

NOTHING = -1e30  # the score of a token that may not be seen; its weight is exactly 0
# A row's maximum below this has seen nothing yet. Well above NOTHING, which may have been scaled:
# the rounding of its product is far larger than any exponent.
UNSEEN = -1e20


def sequence_of(query_start_loc: Any, num_seqs: Any, token: Any) -> Any:
    """The sequence that flat token ``token`` belongs to, by bisection; ``num_seqs`` if none."""
    low, high = U32(0), num_seqs
    while low < high:
        middle = U32((low + high) // U32(2))
        if U32(query_start_loc[U64(middle) + U64(1)]) > token:
            high = middle
        else:
            low = U32(middle + U32(1))
    return low


find_sequence = ptx.device(sequence_of)


def context_of(
    query_start_loc: Any, seq_lens: Any, num_seqs: Any, token: Any, window: Any
) -> tuple[Any, Any, Any, Any]:
    """What a flat token sees: ``(sequence, its new tokens, first, end)``.

    The token attends to its sequence's tokens ``first .. end - 1``, itself the last. ``end`` is 0
    where there is nothing to see; ``sequence`` is ``num_seqs`` for padding. ``window`` 0 is none.
    """
    # In a batch of decodes token i is sequence i's: three loads at once instead of in a row.
    sequence = U32(min(token, U32(num_seqs - U32(1))))
    start = U32(query_start_loc[U64(sequence)])
    stop = U32(query_start_loc[U64(sequence) + U64(1)])
    length = U32(seq_lens[U64(sequence)])
    new_tokens, first, end = U32(0), U32(0), U32(0)
    if start > token or stop <= token:
        sequence = find_sequence(query_start_loc, num_seqs, token)
        if sequence < num_seqs:
            start = U32(query_start_loc[U64(sequence)])
            stop = U32(query_start_loc[U64(sequence) + U64(1)])
            length = U32(seq_lens[U64(sequence)])
    if sequence < num_seqs:
        new_tokens = U32(stop - start)
        if length > U32(0):
            end = U32(length - new_tokens + (token - start) + U32(1))
        if U32(window) > U32(0):
            first = U32(max(I32(0), I32(end) - I32(window)))
    return sequence, new_tokens, first, end


find_context = ptx.device(context_of)


def token_of(query_start_loc: Any, num_seqs: Any, per_sequence: Any, row: Any) -> Any:
    """The flat token of a launch's row ``row``: the row itself if ``per_sequence`` is 0.

    Else every sequence has ``per_sequence`` rows, for so many of its new tokens; rows past them
    give the number of tokens, which is nobody's token.
    """
    token = row
    if per_sequence > U32(0):
        sequence = U32(row // per_sequence)
        token = U32(U32(query_start_loc[U64(sequence)]) + row % per_sequence)
        if token >= U32(query_start_loc[U64(sequence) + U64(1)]):
            token = U32(query_start_loc[U64(num_seqs)])
    return token


find_token = ptx.device(token_of)
