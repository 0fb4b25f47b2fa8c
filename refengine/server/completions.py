"""``POST /v1/completions``."""

from __future__ import annotations

import json
import time
from typing import Any

import flask

from refengine.sampling_params import SamplingParams
from refengine.server.context import Context, current
from refengine.server.errors import ApiError, invalid
from refengine.server.generation import Choice, Generation, fan_out, usage
from refengine.server.json_body import read_body
from refengine.server.logprob_format import completion_logprobs, num_characters
from refengine.server.messages import Delta
from refengine.server.sampling import sampling_params
from refengine.server.schemas import CompletionRequest

blueprint = flask.Blueprint("completions", __name__)


@blueprint.post("/v1/completions")
def create() -> flask.Response:
    """Continue a text."""
    context = current()
    request = read_body(CompletionRequest)
    context.check_model(request.model)
    context.engine_info()
    prompts = read_prompts(context, request.prompt, "prompt")
    n, made = request.n, request.n if request.best_of is None else request.best_of
    if made < n:
        raise invalid("best_of", f"best_of is {made}, less than n, {n}")
    if made > n and request.stream:
        raise invalid(
            "best_of",
            "best_of above n can't be streamed: which answers are best shows at their end",
        )
    if request.max_tokens == 0 and not request.echo:
        raise invalid("max_tokens", "max_tokens=0 is for echo=true; ask for at least 1")
    ranked = made > n and request.logprobs is None
    params = sampling_params(
        request,
        context,
        # Scoring a prompt takes a step that makes one token, which is then left out.
        max_tokens=request.max_tokens or (1 if request.max_tokens == 0 else None),
        num_prompt_tokens=max(len(prompt) for prompt in prompts),
        logprobs=0 if ranked else request.logprobs,
        prompt_logprobs=request.logprobs if request.echo else None,
    )
    generation = Generation(
        context, fan_out(prompts, params, made), request.priority, request.cache_salt
    )
    writer = _Writer(context, request, generation.id, params)
    if request.stream:
        writer.choices = generation.choices
        return generation.stream(flask.request.environ, writer, "text/event-stream")
    generation.run(flask.request.environ)
    choices = []
    for first in range(0, len(generation.choices), made):
        best = generation.choices[first : first + made]
        best = sorted(best, key=_mean_logprob, reverse=True)[:n] if made > n else best
        choices += [writer.choice(choice, _result(choice)) for choice in best]
    body = writer.head | {
        "choices": [choice | {"index": index} for index, choice in enumerate(choices)],
        "usage": writer.usage(generation.choices),
    }
    return flask.jsonify(body)


class _Writer:
    """Writes answers and streams of this route."""

    def __init__(
        self, context: Context, request: CompletionRequest, name: str, params: SamplingParams
    ) -> None:
        self.context = context
        self.request = request
        self.params = params
        self.choices: list[Choice] = []
        self.head = {
            "id": f"cmpl-{name}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": context.model_name,
        }
        # All that a token's event has before its text, and after it.
        self._before = "data: " + json.dumps(self.head)[:-1] + ', "choices": [{"index": '
        nothing = ', "usage": null' if self._wants_usage else ""
        self._plain_after = ', "logprobs": null, "finish_reason": null}]' + nothing + "}\n\n"

    def delta(self, choice: Choice, delta: Delta) -> bytes:
        plain = delta.finish_reason is None and delta.logprobs is None
        if plain and choice.state is not None:
            if not delta.text:
                return b""
            text = f'{self._before}{choice.index}, "text": {json.dumps(delta.text)}'
            return (text + self._plain_after).encode()
        return _event(self._chunk([self.choice(choice, delta)]))

    def end(self) -> bytes:
        data = b""
        if self._wants_usage:
            data = _event(self._chunk([]) | {"usage": self.usage(self.choices)})
        return data + b"data: [DONE]\n\n"

    def error(self, error: ApiError) -> bytes:
        return _event(error.body()) + b"data: [DONE]\n\n"

    def usage(self, choices: list[Choice]) -> dict[str, Any]:
        if self.request.max_tokens == 0:
            for choice in choices:
                choice.num_tokens = 0
        return usage(choices)

    def choice(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """A choice as this route writes it; with the prompt in its first part if echoed."""
        tokenizer, count = self.context.tokenizer, self.request.logprobs
        text, token_ids = delta.text, list(delta.token_ids)
        entries = list(delta.logprobs or ())
        scoring = self.request.max_tokens == 0
        if scoring:
            text, token_ids, entries = "", [], []
        offset = 0 if choice.state is None else choice.state
        all_entries: list[Any] = list(entries)
        if self.request.echo and choice.state is None:
            prompt = tokenizer.decode(choice.prompt_token_ids, skip_special_tokens=False)
            text = prompt + text
            if count is not None:
                token_ids = [*choice.prompt_token_ids, *token_ids]
                known: list[Any] = list(delta.prompt_logprobs or [None])
                all_entries = known + all_entries
        logprobs = None
        if count is not None:
            logprobs = completion_logprobs(tokenizer, token_ids, all_entries, count, offset)
            offset += sum(num_characters(tokenizer, token_id) for token_id in token_ids)
        choice.state = offset
        reason = delta.finish_reason
        return {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": "length" if scoring and reason else reason,
        }

    @property
    def _wants_usage(self) -> bool:
        options = self.request.stream_options
        return options is not None and options.include_usage

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk: dict[str, Any] = self.head | {"choices": choices}
        return chunk | {"usage": None} if self._wants_usage else chunk


def read_prompts(context: Context, prompt: Any, param: str) -> list[tuple[int, ...]]:
    """Token ids of a prompt, or of several, given as texts or ids.

    Raises:
        ApiError: 400 for an empty prompt or an id outside the vocabulary.
    """
    several: list[Any] = prompt if isinstance(prompt, list) else [prompt]
    if several and isinstance(several[0], int):
        several = [several]
    result = []
    for index, one in enumerate(several):
        ids = context.tokenizer.encode(one) if isinstance(one, str) else one
        check_token_ids(context, ids, param if len(several) == 1 else f"{param}[{index}]")
        result.append(tuple(ids))
    return result


def check_token_ids(context: Context, ids: list[int], param: str) -> None:
    """Refuse an empty prompt, and ids outside the vocabulary."""
    if not ids:
        raise invalid(param, f"{param} is empty; give at least one token")
    vocab_size = context.structures.vocab_size
    if max(ids) >= vocab_size:
        raise invalid(
            param, f"{param} holds the token id {max(ids)}; this model has 0 to {vocab_size - 1}"
        )


def _result(choice: Choice) -> Delta:
    if choice.result is None:
        raise ApiError(500, "an answer is missing", code="internal_error")
    return choice.result


def _mean_logprob(choice: Choice) -> float:
    result = _result(choice)
    return (result.cumulative_logprob or 0.0) / max(len(result.token_ids), 1)


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()
