"""Speculative sampling: which draft tokens stand, and the token after them."""

from __future__ import annotations

import numpy as np

from .bfloat16 import Array


def verify_draft_tokens(
    draft_token_ids: Array, draft_probs: Array, target_probs: Array, uniforms: Array, out: Array
) -> None:
    """Accept drafts so that the tokens are distributed as if the target had been sampled.

    A draft token is accepted with probability ``min(1, target / draft)``. At the first rejection
    the token comes from the residual ``max(0, target - draft)``; where all are accepted, one more
    comes from the target (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1; Chen et al. 2023,
    arXiv 2302.01318).

    Args:
        draft_token_ids: ``[num_seqs, num_drafts]`` int64; -1 from where a sequence has no more.
        draft_probs: ``[num_seqs, num_drafts, vocab_size]`` float32, what the drafts were drawn
            from.
        target_probs: ``[num_seqs, num_drafts + 1, vocab_size]`` float32.
        uniforms: ``[num_seqs, num_drafts + 1]`` in [0, 1): one draw a draft, and the last for the
            token after them.
        out: ``[num_seqs, num_drafts + 1]`` int64: accepted drafts, one token more, then -1.

    Raises:
        ValueError: where a shape does not fit.
    """
    num_seqs, num_drafts = draft_token_ids.shape
    wanted = (num_seqs, num_drafts + 1)
    for name, array in (("uniforms", uniforms), ("out", out), ("target_probs", target_probs)):
        if array.shape[:2] != wanted:
            raise ValueError(f"{name} must begin with shape {list(wanted)}, got {array.shape}")
    if draft_probs.shape != (num_seqs, num_drafts, target_probs.shape[2]):
        raise ValueError(f"draft_probs must fit the drafts and the target, got {draft_probs.shape}")
    out[...] = -1
    for seq in range(num_seqs):
        place, rejected = 0, False
        for token in draft_token_ids[seq].tolist():
            if token < 0:
                break
            # u < p / q, written without the division.
            drawn = float(uniforms[seq, place]) * float(draft_probs[seq, place, token])
            rejected = drawn >= float(target_probs[seq, place, token])
            if rejected:
                break
            out[seq, place] = token
            place += 1
        weights = target_probs[seq, place].astype(np.float64)  # [vocab_size]
        if rejected:
            residual = np.maximum(weights - draft_probs[seq, place], 0)
            weights = residual if residual.any() else weights  # equal but for rounding
        cumulative = np.cumsum(weights)
        chosen = np.searchsorted(cumulative, uniforms[seq, -1] * cumulative[-1], side="right")
        # Rounding may point past the last token that has any weight.
        out[seq, place] = min(int(chosen), int(np.flatnonzero(weights)[-1]))
