"""Ollama's routes, so that clients written for local development run unchanged.

Streams are a JSON object a line; durations are nanoseconds.
"""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any

import flask

from refengine._version import __version__
from refengine.sampling_params import SamplingParams, StructuredOutput
from refengine.server.chat import checked_tools, render
from refengine.server.completions import read_prompts
from refengine.server.context import Context, current
from refengine.server.errors import ApiError
from refengine.server.generation import Choice, Generation, fan_out
from refengine.server.json_body import read_body
from refengine.server.messages import Delta
from refengine.server.ollama_schemas import (
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaOptions,
    OllamaRequest,
)
from refengine.server.sampling import ANY_OBJECT, make_params
from refengine.server.tools import ToolForm, ToolParser

blueprint = flask.Blueprint("ollama", __name__)


@blueprint.post("/api/chat")
def chat() -> flask.Response:
    """Answer a conversation."""
    started = time.monotonic_ns()
    context = current()
    request = read_body(OllamaChatRequest, any_type=True)
    context.check_model(request.model)
    if not request.messages:  # how Ollama's clients load a model
        return _nothing(context, request, {"message": {"role": "assistant", "content": ""}})
    tools = checked_tools(context, request.tools)
    messages = [message.model_dump(exclude_none=True) for message in request.messages]
    prompt = render(context, messages, tools)
    writer = _Writer(context, request, "message", started)
    if tools and context.chat_template is not None:
        names = frozenset(tool["function"]["name"] for tool in tools)
        writer.parser = ToolParser(ToolForm.of(context.chat_template), names)
    return _answer(context, request, prompt, writer)


@blueprint.post("/api/generate")
def generate() -> flask.Response:
    """Answer a prompt."""
    started = time.monotonic_ns()
    context = current()
    request = read_body(OllamaGenerateRequest, any_type=True)
    context.check_model(request.model)
    if not request.prompt:
        return _nothing(context, request, {"response": ""})
    if request.raw and request.system is not None:
        raise ApiError(400, "system needs the template that raw leaves out", param="system")
    if request.raw or context.chat_template is None:
        (prompt,) = read_prompts(context, request.prompt, "prompt")
    else:
        messages = [{"role": "user", "content": request.prompt}]
        if request.system is not None:
            messages.insert(0, {"role": "system", "content": request.system})
        prompt = render(context, messages, [])
    return _answer(context, request, prompt, _Writer(context, request, "response", started))


@blueprint.get("/api/tags")
def tags() -> flask.Response:
    """The models that are served."""
    context = current()
    name = context.model_name
    info = context.client.info
    details = {
        "parent_model": "",
        "format": "refengine",
        "family": "",
        "families": [],
        "parameter_size": "",
        "quantization_level": info.dtype if info else "",
    }
    model = {
        "name": name,
        "model": name,
        "modified_at": _timestamp(context.created),
        "size": 0,
        "digest": "",
        "details": details,
    }
    return flask.jsonify({"models": [model]})


@blueprint.get("/api/version")
def version() -> flask.Response:
    """This server's version."""
    return flask.jsonify({"version": __version__})


def _answer(
    context: Context, request: OllamaRequest, prompt: tuple[int, ...], writer: _Writer
) -> flask.Response:
    params = _params(context, request, len(prompt))
    generation = Generation(context, fan_out([prompt], params, 1))
    writer.choice = generation.choices[0]
    if request.stream:
        return generation.stream(flask.request.environ, writer, "application/x-ndjson")
    generation.run(flask.request.environ)
    result = writer.choice.result
    if result is None:
        raise ApiError(500, "the answer is missing")
    return flask.jsonify(writer.part(result))


def _params(context: Context, request: OllamaRequest, num_prompt_tokens: int) -> SamplingParams:
    options = request.options or OllamaOptions()  # type: ignore[call-arg]
    room = context.engine_info().max_request_tokens - num_prompt_tokens
    if options.num_ctx is not None:
        room = min(room, options.num_ctx - num_prompt_tokens)
        if room < 1:
            raise ApiError(
                400,
                f"the prompt has {num_prompt_tokens} tokens, more than options.num_ctx, "
                f"{options.num_ctx}, leaves room for",
                param="options.num_ctx",
            )
    # -1 and -2 go on to the end; 0 would be no answer.
    max_tokens = min(options.num_predict, room) if options.num_predict > 0 else max(room, 1)
    structure = None
    if request.format == "json":
        structure = StructuredOutput("json_schema", ANY_OBJECT)
    elif request.format:
        structure = StructuredOutput("json_schema", json.dumps(request.format))
    context.check_structure(structure, "format")
    return make_params(
        context,
        num_prompt_tokens=num_prompt_tokens,
        max_tokens=max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repeat_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        seed=options.seed,
        stop=options.stop or (),
        structured_output=structure,
    )


class _Writer:
    """Writes answers and streams of these routes.

    Args:
        context: the server's.
        request: what was asked.
        field: "message" (chat) or "response" (generate).
        started: ``time.monotonic_ns`` of the request.
    """

    def __init__(self, context: Context, request: OllamaRequest, field: str, started: int) -> None:
        self.model = request.model
        self.choice: Choice | None = None
        self.parser: ToolParser | None = None
        self._field = field
        self._started = started
        self._first = 0

    def delta(self, choice: Choice, delta: Delta) -> bytes:
        if not self._first:
            self._first = time.monotonic_ns()
        if delta.finish_reason is None and not delta.text:
            return b""
        return json.dumps(self.part(delta)).encode() + b"\n"

    def end(self) -> bytes:
        return b""

    def error(self, error: ApiError) -> bytes:
        return json.dumps({"error": error.message}).encode() + b"\n"

    def part(self, delta: Delta) -> dict[str, Any]:
        """A line of a stream, or a whole answer."""
        text = delta.text
        calls: list[dict[str, Any]] = []
        finished = delta.finish_reason is not None
        if self.parser is not None:
            text, calls = self.parser.append(delta.text)
            if finished:
                more_text, more_calls = self.parser.finish()
                text, calls = text + more_text, calls + more_calls
        content: Any = text
        if self._field == "message":
            content = {"role": "assistant", "content": text}
            if calls:
                content["tool_calls"] = [{"function": _call(call)} for call in calls]
        line: dict[str, Any] = {
            "model": self.model,
            "created_at": _timestamp(time.time()),
            self._field: content,
            "done": finished,
        }
        if finished and self.choice is not None:
            now = time.monotonic_ns()
            first = self._first or now
            line |= {
                "done_reason": "length" if delta.finish_reason == "length" else "stop",
                "total_duration": now - self._started,
                "load_duration": 0,
                "prompt_eval_count": len(self.choice.prompt_token_ids),
                "prompt_eval_duration": first - self._started,
                "eval_count": self.choice.num_tokens,
                "eval_duration": now - first,
            }
        return line


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {"name": function["name"], "arguments": json.loads(function["arguments"])}


def _nothing(context: Context, request: OllamaRequest, part: dict[str, Any]) -> flask.Response:
    """The answer to a request that only loads the model."""
    line = {"model": request.model, "created_at": _timestamp(time.time())} | part
    return flask.jsonify(line | {"done": True, "done_reason": "load"})


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
