"""From logits to a token: penalties, filters, and one draw from a counter-based random stream.

Every function works on one row of logits ``[vocab]`` (float32) and returns a new array; removed
tokens become -inf. The order in which an engine applies them is that of this file.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

_MASK = 2**64 - 1
_STRETCH = 256  # tokens; about the square root of a vocabulary
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio: the step of SplitMix64


def uniform(seed: int, position: int, stream: int = 0) -> float:
    """A random number in [0, 1) that is a pure function of its arguments.

    A sampled token must not depend on who shares the batch, nor on whether the request was
    preempted on the way, so there is no generator whose state could differ: the position in the
    output is the counter. The mixing function is SplitMix64's (Steele, Lea, Flood 2014, "Fast
    splittable pseudorandom number generators", figure 15).

    Args:
        seed: the request's own seed; any integer, taken modulo 2**64.
        position: index of the output token.
        stream: which of several independent draws at this position.
    """
    state = _mix((seed + _GOLDEN) & _MASK)
    state = _mix((state + position * _GOLDEN) & _MASK)
    state = _mix((state + stream * _GOLDEN + 1) & _MASK)
    return (state >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def apply_penalties(
    logits: Float32,
    prompt_token_ids: npt.NDArray[np.integer],
    output_token_ids: npt.NDArray[np.integer],
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
) -> Float32:
    """Make tokens that were seen less likely.

    The repetition penalty looks at prompt and output (Keskar et al. 2019, arXiv 1909.05858,
    section 4.1); presence and frequency penalties look at the output alone, as OpenAI's API says.

    Args:
        logits: ``[vocab]``.
        prompt_token_ids: ``[num_prompt_tokens]``.
        output_token_ids: ``[num_output_tokens]``.
        repetition_penalty: above 1 discourages; divides positive and multiplies negative logits.
        presence_penalty: subtracted once from every token in the output.
        frequency_penalty: subtracted once per occurrence in the output.
    """
    logits = logits.copy()
    if repetition_penalty != 1.0:
        seen = np.unique(np.concatenate([prompt_token_ids, output_token_ids]))
        values = logits[seen]
        scaled = np.where(values > 0, values / repetition_penalty, values * repetition_penalty)
        logits[seen] = scaled
    if presence_penalty or frequency_penalty:
        seen, counts = np.unique(output_token_ids, return_counts=True)
        logits[seen] -= np.float32(presence_penalty) + np.float32(frequency_penalty) * counts
    return logits


def forbid(logits: Float32, token_ids: Sequence[int]) -> Float32:
    """Remove the named tokens from ``logits`` ``[vocab]``."""
    logits = logits.copy()
    logits[list(token_ids)] = -np.inf
    return logits


def bad_word_token_ids(
    bad_words_token_ids: Sequence[Sequence[int]], known_token_ids: Sequence[int]
) -> list[int]:
    """The tokens that would complete a forbidden sequence after ``known_token_ids``."""
    forbidden = []
    for *head, last in bad_words_token_ids:
        if not head or list(known_token_ids[-len(head) :]) == head:
            forbidden.append(last)
    return forbidden


def apply_min_p(logits: Float32, min_p: float) -> Float32:
    """Remove tokens less likely than ``min_p`` times the likeliest (arXiv 2407.01082)."""
    if min_p == 0.0:
        return logits
    threshold = logits.max() + np.float32(np.log(min_p))
    return np.where(logits < threshold, np.float32(-np.inf), logits)


def apply_top_k_top_p(logits: Float32, top_k: int, top_p: float) -> Float32:
    """Keep the ``top_k`` likeliest tokens, and of those the smallest set that holds ``top_p``.

    Tokens that tie with the k-th are kept. Among equal probabilities the lower token id counts as
    the likelier. Nucleus sampling: Holtzman et al. 2020, arXiv 1904.09751, section 3.1.

    Args:
        logits: ``[vocab]``.
        top_k: 0 or -1 keeps all.
        top_p: 1 keeps all.
    """
    if 0 < top_k < logits.size:
        kth = np.partition(logits, -top_k)[-top_k]
        logits = np.where(logits < kth, np.float32(-np.inf), logits)
    if top_p < 1.0:
        order = _nucleus(logits, top_p)
        kept = np.full_like(logits, -np.inf)
        kept[order] = logits[order]
        logits = kept
    return logits


def _nucleus(logits: Float32, top_p: float) -> npt.NDArray[np.intp]:
    """Token ids of the smallest set of likeliest tokens whose probability reaches ``top_p``.

    Sorting a whole vocabulary costs more than the model's last layer, and the nucleus is nearly
    always small: so look among ever more of the likeliest tokens until they hold enough.
    """
    left = np.flatnonzero(logits > -np.inf)  # what other filters have left over
    logits = logits[left]
    weights = softmax_weights(logits)
    wanted = top_p * weights.sum(dtype=np.float64)
    size = 256
    while True:
        candidates = np.arange(logits.size)
        if size < logits.size:
            # All that tie with the last candidate come along, so that ties break by token id.
            threshold = np.partition(logits, -size)[-size]
            candidates = np.flatnonzero(logits >= threshold)
        order = candidates[np.argsort(-logits[candidates], kind="stable")]
        cumulative = np.cumsum(weights[order], dtype=np.float64)
        # A token stays while those before it do not reach top_p.
        count = int(np.searchsorted(cumulative, wanted, side="left")) + 1
        if count <= order.size or order.size == logits.size:
            return left[order[:count]]
        size *= 8


def softmax_weights(logits: Float32) -> Float32:
    """``exp(logits - max)``, ``[vocab]``: probabilities before normalisation."""
    weights: Float32 = np.exp(logits - logits.max())
    return weights


def sample(logits: Float32, uniform: float) -> int:
    """Draw a token from ``softmax(logits)`` by inverting its cumulative distribution.

    The distribution is summed in stretches of 256 tokens first, so that only one stretch has to be
    accumulated token by token. Sums are float64: a vocabulary's float32 sum would lose the tail.

    Args:
        logits: ``[vocab]``, temperature applied.
        uniform: a number in [0, 1).
    """
    weights = softmax_weights(logits)
    starts = np.arange(0, weights.size, _STRETCH)
    sums = np.add.reduceat(weights, starts, dtype=np.float64)  # [num_stretches]
    cumulative = np.cumsum(sums)
    target = uniform * cumulative[-1]
    # 1 The stretch. Rounding can push the target past the last one that has any probability.
    stretch = int(np.searchsorted(cumulative, target, side="right"))
    stretch = min(stretch, int(np.flatnonzero(sums > 0)[-1]))
    # 2 The token in it, under the same caution.
    first = int(starts[stretch])
    inside = weights[first : first + _STRETCH]
    target -= cumulative[stretch] - sums[stretch]
    token = int(np.searchsorted(np.cumsum(inside, dtype=np.float64), target, side="right"))
    return first + min(token, int(np.flatnonzero(inside)[-1]))


def log_softmax(logits: Float32) -> Float32:
    """Log-probabilities, ``[vocab]``."""
    shifted = logits - logits.max()
    logprobs: Float32 = shifted - np.float32(np.log(np.exp(shifted).sum(dtype=np.float64)))
    return logprobs
