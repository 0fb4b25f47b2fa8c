"""From a request's fields to ``SamplingParams``."""

from __future__ import annotations

import json
from typing import Any

from refengine.sampling_params import SamplingParams, StructuredOutput
from refengine.server.context import Context
from refengine.server.errors import ApiError, invalid
from refengine.server.schemas import (
    JsonObjectFormat,
    JsonSchemaFormat,
    ResponseFormat,
    SamplingFields,
)

ANY_OBJECT = json.dumps({"type": "object"})


def sampling_params(
    request: SamplingFields,
    context: Context,
    *,
    max_tokens: int | None,
    num_prompt_tokens: int,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    structure: StructuredOutput | None = None,
) -> SamplingParams:
    """How the engine is to choose tokens.

    Args:
        request: what the client asked.
        context: the server's.
        max_tokens: None fills what the model's length and the cache leave.
        num_prompt_tokens: of the longest prompt.
        logprobs: as in ``SamplingParams``.
        prompt_logprobs: as in ``SamplingParams``.
        structure: instead of the request's own.

    Raises:
        ApiError: 400, naming the field.
    """
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "stream_options is for stream=true")
    if structure is None:
        structure, param = requested_structure(request)
        context.check_structure(structure, param)
    return make_params(
        context,
        num_prompt_tokens=num_prompt_tokens,
        max_tokens=max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=_logit_bias(request.logit_bias, context.structures.vocab_size),
        bad_words=tuple(request.bad_words or ()),
        min_tokens=request.min_tokens,
        stop=request.stop or (),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=request.ignore_eos,
        skip_special_tokens=request.skip_special_tokens,
        include_stop_str_in_output=request.include_stop_str_in_output,
        seed=request.seed,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        structured_output=structure,
    )


def make_params(
    context: Context, *, num_prompt_tokens: int, max_tokens: int | None, **fields: Any
) -> SamplingParams:
    """``SamplingParams`` whose tokens fit behind the prompt.

    Raises:
        ApiError: 400, naming the field.
    """
    limit = context.engine_info().max_request_tokens
    room = limit - num_prompt_tokens
    if room < 1:
        raise ApiError(
            400,
            f"the prompt has {num_prompt_tokens} tokens, and a request may have {limit}, prompt "
            "and answer; shorten it",
            param="messages" if "messages" in fields else "prompt",
            code="context_length_exceeded",
        )
    if max_tokens is not None and max_tokens > room:
        raise ApiError(
            400,
            f"max_tokens is {max_tokens} and the prompt has {num_prompt_tokens} tokens, together "
            f"more than the {limit} that a request may have; ask for at most {room}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    try:
        return SamplingParams(max_tokens=room if max_tokens is None else max_tokens, **fields)
    except ValueError as error:
        name = str(error).split()[0].split("[")[0]
        param = name if name in fields else None
        raise invalid(param, str(error)) from None


def requested_structure(request: SamplingFields) -> tuple[StructuredOutput | None, str]:
    """The structure that a request asks for, and the field that does."""
    wanted: dict[str, StructuredOutput | None] = {}
    if request.response_format is not None and request.response_format.type != "text":
        wanted["response_format"] = format_structure(request.response_format)
    if request.guided_regex is not None:
        wanted["guided_regex"] = StructuredOutput("regex", request.guided_regex)
    if request.guided_grammar is not None:
        wanted["guided_grammar"] = StructuredOutput("grammar", request.guided_grammar)
    if len(wanted) > 1:
        first, second = list(wanted)[:2]
        raise invalid(second, f"{first} and {second} exclude each other; send one of them")
    for param, structure in wanted.items():
        return structure, param
    return None, "response_format"


def format_structure(wanted: ResponseFormat) -> StructuredOutput | None:
    """The structure of a ``response_format``."""
    if isinstance(wanted, JsonObjectFormat):
        return StructuredOutput("json_schema", ANY_OBJECT)
    if isinstance(wanted, JsonSchemaFormat):
        return StructuredOutput("json_schema", json.dumps(wanted.json_schema.schema_))
    return None


def _logit_bias(values: dict[str, float] | None, vocab_size: int) -> dict[int, float] | None:
    if not values:
        return None
    bias = {}
    for key, value in values.items():
        if not (key.isascii() and key.isdigit() and int(key[:10]) < vocab_size and len(key) <= 10):
            raise invalid(
                "logit_bias",
                f"logit_bias has the key {key[:40]!r}; keys are token ids from 0 to "
                f"{vocab_size - 1}, as texts",
            )
        bias[int(key)] = float(value)
    return bias
