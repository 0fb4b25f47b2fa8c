"""SamplingParams: how the tokens of one request are chosen, with vLLM's names and meanings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# A request may ask for at most this many alternatives per token, as the OpenAI API allows.
MAX_LOGPROBS = 20

STRUCTURES = ("json_schema", "regex", "grammar")
POOLINGS = ("mean", "last")


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """What an answer must look like.

    Attributes:
        kind: "json_schema", "regex", or "grammar" (Lark, as llguidance reads it).
        value: the schema (as JSON text), expression or grammar.
    """

    kind: str
    value: str

    def __post_init__(self) -> None:
        """Check the kind; whether the value makes sense shows when it is compiled."""
        if self.kind not in STRUCTURES:
            raise ValueError(
                f"a structured output's kind must be one of {', '.join(STRUCTURES)}, "
                f"got {self.kind!r}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a request's tokens are chosen.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 (or -1) keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches top_p.
        min_p: drop tokens less likely than min_p times the most likely one.
        repetition_penalty: divide positive and multiply negative logits of every token seen in
            prompt or output (Keskar et al. 2019, arXiv 1909.05858, section 4.1).
        presence_penalty: subtracted once from the logit of every token in the output.
        frequency_penalty: subtracted once per occurrence in the output.
        logit_bias: added to the logits of the named token ids.
        bad_words: texts that must not appear; their last token is forbidden after the others.
        max_tokens: tokens to generate; None means up to the model's length.
        min_tokens: end-of-sequence and stop tokens are forbidden before this many.
        stop: texts that end the answer; they are cut off unless include_stop_str_in_output.
        stop_token_ids: token ids that end the answer, besides the model's own.
        ignore_eos: keep generating past end-of-sequence.
        logprobs: number of most likely tokens to report at each output position (0: only the
            chosen one); None reports nothing.
        prompt_logprobs: the same for the prompt's tokens.
        seed: the request's own random stream; its tokens depend on nothing else. None draws one.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop text in the answer.
        structured_output: a schema, expression or grammar that the answer must match.
        pooling: "mean" or "last": give the prompt's hidden states (after the final norm), averaged
            or the last token's, as ``RequestOutput.embedding`` instead of an answer; the one token
            that such a request gets means nothing, so ``max_tokens`` must be 1.

    Raises:
        ValueError: where a value lies outside its range; the message says what came and what
            was wanted.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] = ()
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: Sequence[str] | str = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    seed: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_output: StructuredOutput | None = None
    pooling: str | None = None

    def __post_init__(self) -> None:
        """Check every range, and turn ``stop`` into a tuple of texts."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "bad_words", tuple(self.bad_words))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _check_range("temperature", self.temperature, 0.0, None)
        _check_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, None, low_open=True)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_integer("top_k", self.top_k, -1)
        _check_integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None:
            _check_integer("max_tokens", self.max_tokens, 1)
            if self.min_tokens > self.max_tokens:
                raise ValueError(
                    f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}"
                )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check_integer(name, value, 0, MAX_LOGPROBS)
        if self.seed is not None:
            _check_integer("seed", self.seed, -(2**63), 2**64 - 1)
        for name in ("stop", "bad_words"):
            for text in getattr(self, name):
                if not isinstance(text, str) or not text:
                    raise ValueError(f"{name} must hold texts that are not empty, got {text!r}")
        for token_id in self.stop_token_ids:
            _check_integer("stop_token_ids", token_id, 0)
        for token_id, bias in (self.logit_bias or {}).items():
            _check_integer("logit_bias", token_id, 0)
            _check_range(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
        if self.pooling is not None:
            if self.pooling not in POOLINGS:
                raise ValueError(
                    f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}"
                )
            if self.max_tokens != 1:
                raise ValueError(f"pooling needs max_tokens=1, got {self.max_tokens}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0


def _check_range(
    name: str, value: float, low: float, high: float | None, *, low_open: bool = False
) -> None:
    """Raise unless ``value`` is a finite number in ``[low, high]`` (``(low, high]`` if open)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    inside = number and (value > low if low_open else value >= low)
    if inside and (value <= high if high is not None else value < float("inf")):
        return
    wanted = f"{'above' if low_open else 'at least'} {low:g}"
    if high is not None:
        wanted += f" and at most {high:g}"
    raise ValueError(f"{name} must be a number {wanted}, got {value!r}")


def _check_integer(name: str, value: int, low: int, high: int | None = None) -> None:
    """Raise unless ``value`` is an integer in ``[low, high]``."""
    integer = isinstance(value, int) and not isinstance(value, bool)
    if integer and value >= low and (high is None or value <= high):
        return
    wanted = f"an integer of at least {low}" + (f" and at most {high}" if high is not None else "")
    raise ValueError(f"{name} must be {wanted}, got {value!r}")
