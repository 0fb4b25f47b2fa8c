"""The sampler: logits of the rows that sample, to tokens and log-probabilities.

The mathematics of one row is ``refengine.reference.sampling``; this file decides which of it each
request needs, and keeps the common case, greedy, in one call for the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from refengine.reference import sampling
from refengine.sampling_params import SamplingParams
from refengine.step import Logprob

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SamplingInput:
    """What the sampler must know of one row's request."""

    params: SamplingParams
    seed: int
    prompt_token_ids: npt.NDArray[np.int32]  # [num_prompt_tokens]
    output_token_ids: npt.NDArray[np.int32]  # [num_output_tokens]
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    allowed: npt.NDArray[np.bool_] | None = None  # [vocab], what a structure allows next


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token, and the log-probabilities that were asked for."""

    token_id: int
    logprobs: dict[int, Logprob] | None = None


class Sampler:
    """Chooses tokens.

    Args:
        eos_token_ids: the model's end-of-sequence tokens, which ``min_tokens`` forbids.
    """

    def __init__(self, eos_token_ids: tuple[int, ...] = ()) -> None:
        self.eos_token_ids = eos_token_ids

    def sample(self, logits: Float32, inputs: list[SamplingInput]) -> list[SampledToken]:
        """Choose one token a row.

        Args:
            logits: ``[R, vocab]`` float32.
            inputs: R requests.

        Returns:
            R tokens. Log-probabilities are those of the model's own distribution, before any
            penalty, filter or temperature (vLLM's ``raw_logprobs``).
        """
        greedy = logits.argmax(axis=1)  # [R]
        sampled = []
        for row, request in enumerate(inputs):
            token_id = int(greedy[row])
            if not _is_plain_greedy(request):
                token_id = self._choose(logits[row], request)
            logprobs = None
            if request.params.logprobs is not None:
                logprobs = top_logprobs(logits[row], token_id, request.params.logprobs)
            sampled.append(SampledToken(token_id, logprobs))
        return sampled

    def _choose(self, logits: Float32, request: SamplingInput) -> int:
        """One token from one row ``[vocab]``, by everything that its request asks for."""
        params = request.params
        # 1 What must not come, and what the user leans on.
        if params.logit_bias:
            logits = logits.copy()
            logits[list(params.logit_bias)] += np.array(
                list(params.logit_bias.values()), np.float32
            )
        if request.allowed is not None:
            logits = np.where(request.allowed, logits, np.float32(-np.inf))
        forbidden = self._forbidden(request)
        if forbidden:
            logits = sampling.forbid(logits, forbidden)
        # 2 What was said already.
        if params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty:
            logits = sampling.apply_penalties(
                logits,
                request.prompt_token_ids,
                request.output_token_ids,
                params.repetition_penalty,
                params.presence_penalty,
                params.frequency_penalty,
            )
        if params.greedy:
            return int(logits.argmax())
        # 3 Temperature, filters, and one draw from the request's own stream.
        # Tiny temperatures overflow a division of raw logits, so the maximum goes first.
        logits = (logits - logits.max()) / np.float32(max(params.temperature, 1e-6))
        logits = sampling.apply_min_p(logits, params.min_p)
        logits = sampling.apply_top_k_top_p(logits, params.top_k, params.top_p)
        draw = sampling.uniform(request.seed, request.output_token_ids.size)
        return sampling.sample(logits, draw)

    def _forbidden(self, request: SamplingInput) -> list[int]:
        """Token ids that may not come next."""
        params = request.params
        forbidden: list[int] = []
        if request.output_token_ids.size < params.min_tokens:
            forbidden += [*self.eos_token_ids, *params.stop_token_ids]
        if request.bad_words_token_ids:
            longest = max(len(word) for word in request.bad_words_token_ids)
            known = np.concatenate([request.prompt_token_ids, request.output_token_ids])
            forbidden += sampling.bad_word_token_ids(
                request.bad_words_token_ids, known[-longest:].tolist()
            )
        return forbidden


def top_logprobs(logits: Float32, token_id: int, count: int) -> dict[int, Logprob]:
    """The log-probability of a token, and of the ``count`` likeliest.

    Args:
        logits: ``[vocab]``, as the model gave them.
        token_id: the token that must be among the result; it comes first.
        count: 0 to ``MAX_LOGPROBS``.
    """
    logprobs = sampling.log_softmax(logits)
    rank = int((logits > logits[token_id]).sum()) + 1
    result = {token_id: Logprob(float(logprobs[token_id]), rank)}
    if count:
        likeliest = np.argpartition(-logits, count - 1)[:count]
        likeliest = likeliest[np.lexsort((likeliest, -logits[likeliest]))]
        for position, other in enumerate(likeliest.tolist()):
            result.setdefault(other, Logprob(float(logprobs[other]), position + 1))
    return result


def _is_plain_greedy(request: SamplingInput) -> bool:
    """Whether the row's largest logit is the answer, with nothing to apply first."""
    params = request.params
    return (
        params.greedy
        and not params.logit_bias
        and not request.bad_words_token_ids
        and request.allowed is None
        and params.repetition_penalty == 1.0
        and not params.presence_penalty
        and not params.frequency_penalty
        and request.output_token_ids.size >= params.min_tokens
    )
