"""``POST /v1/chat/completions``."""

from __future__ import annotations

import json
import time
from typing import Any

import flask

from refengine.errors import RequestError
from refengine.sampling_params import StructuredOutput
from refengine.server.completions import check_token_ids
from refengine.server.context import Context, current
from refengine.server.errors import ApiError, invalid
from refengine.server.generation import Choice, Generation, fan_out, usage
from refengine.server.json_body import read_body
from refengine.server.logprob_format import chat_logprobs
from refengine.server.messages import Delta
from refengine.server.sampling import requested_structure, sampling_params
from refengine.server.schemas import ChatMessage, ChatRequest, NamedToolChoice, Tool
from refengine.server.tools import ToolForm, ToolParser, takes_tools

blueprint = flask.Blueprint("chat", __name__)

# Names that a template gets from elsewhere.
RESERVED = ("messages", "tools", "add_generation_prompt", "name", "bos_token", "eos_token")


@blueprint.post("/v1/chat/completions")
def create() -> flask.Response:
    """Answer a conversation."""
    context = current()
    request = read_body(ChatRequest)
    context.check_model(request.model)
    context.engine_info()
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs", "top_logprobs needs logprobs=true")
    max_tokens = request.max_completion_tokens or request.max_tokens
    if request.max_tokens not in (None, max_tokens):
        raise invalid("max_tokens", "max_tokens and max_completion_tokens differ; send one of them")
    variables = request.chat_template_kwargs or {}
    for name in RESERVED:
        if name in variables:
            raise invalid("chat_template_kwargs", f"chat_template_kwargs may not set {name}")
    tools = checked_tools(context, request.tools)
    choice = request.tool_choice or "auto"
    if request.tool_choice not in (None, "none") and not tools:
        raise invalid("tool_choice", "tool_choice needs tools")
    if choice == "none":
        tools = []
    prompt = render(
        context,
        [plain_message(message) for message in request.messages],
        tools,
        add_generation_prompt=request.add_generation_prompt,
        variables=variables,
    )
    params = sampling_params(
        request,
        context,
        max_tokens=max_tokens,
        num_prompt_tokens=len(prompt),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        structure=forced_call(context, request, tools),
    )
    choices = fan_out([prompt], params, request.n)
    if tools and context.chat_template is not None:
        form = ToolForm.of(context.chat_template)
        names = frozenset(tool["function"]["name"] for tool in tools)
        for one in choices:
            one.state = ToolParser(form, names, single=not request.parallel_tool_calls)
    generation = Generation(context, choices, request.priority, request.cache_salt)
    writer = _Writer(context, request, generation)
    if request.stream:
        return generation.stream(flask.request.environ, writer, "text/event-stream")
    generation.run(flask.request.environ)
    body = {
        "id": writer.head["id"],
        "object": "chat.completion",
        "created": writer.head["created"],
        "model": context.model_name,
        "choices": [writer.choice(one) for one in choices],
        "usage": usage(choices),
    }
    return flask.jsonify(body)


def forced_call(
    context: Context, request: ChatRequest, tools: list[dict[str, Any]]
) -> StructuredOutput | None:
    """The structure that makes an answer a call, where tool_choice demands one."""
    choice = request.tool_choice
    if choice in (None, "none", "auto") or context.chat_template is None:
        return None
    name = choice.function.name if isinstance(choice, NamedToolChoice) else None
    if name is not None and name not in {tool["function"]["name"] for tool in tools}:
        raise invalid("tool_choice", f"tool_choice names {name!r}, which is not among tools")
    other, param = requested_structure(request)
    if other is not None:
        raise invalid(param, f"{param} and a forced tool_choice exclude each other")
    structure = ToolForm.of(context.chat_template).grammar(tools, name)
    context.check_structure(structure, "tools")
    return structure


def checked_tools(context: Context, tools: list[Tool] | None) -> list[dict[str, Any]]:
    """Tools as templates take them.

    Raises:
        ApiError: 400 where the model's template has none, or two share a name.
    """
    if not tools:
        return []
    if not takes_tools(context.chat_template):
        raise ApiError(
            400,
            f"{context.model_name}'s chat template has no tools; leave tools out or serve a model "
            "that was trained to call them",
            param="tools",
            code="unsupported_parameter",
        )
    plain = [tool.model_dump(exclude_none=True) for tool in tools]
    names = [tool["function"]["name"] for tool in plain]
    if len(set(names)) < len(names):
        raise invalid("tools", "two tools have the same name")
    return plain


def render(
    context: Context,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    *,
    add_generation_prompt: bool = True,
    variables: dict[str, Any] | None = None,
) -> tuple[int, ...]:
    """The token ids of a conversation.

    Raises:
        ApiError: 400 where there is no template, or it refuses the messages.
    """
    if context.chat_template is None:
        raise ApiError(
            400,
            f"{context.model_name} has no chat template; use /v1/completions",
            param="messages",
            code="no_chat_template",
        )
    try:
        text = context.chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools or None,
            **(variables or {}),
        )
    except RequestError as error:
        raise invalid("messages", str(error)) from None
    # The template writes every special token itself.
    ids = context.tokenizer.encode(text, add_special_tokens=False)
    check_token_ids(context, ids, "messages")
    return tuple(ids)


def plain_message(message: ChatMessage) -> dict[str, Any]:
    """A message as templates take it."""
    plain = message.model_dump(exclude_none=True, exclude={"refusal"})
    if plain["role"] == "developer":  # OpenAI's newer name
        plain["role"] = "system"
    plain.setdefault("content", "")
    # Templates want a call's arguments as an object; OpenAI sends them as a text of JSON.
    for call in plain.get("tool_calls", ()):
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        except (ValueError, RecursionError):
            raise invalid("messages", "a tool call's arguments are not JSON") from None
    return plain


class _Writer:
    """Writes answers and streams of this route."""

    def __init__(self, context: Context, request: ChatRequest, generation: Generation) -> None:
        self.context = context
        self.request = request
        self.choices = generation.choices
        self.head = {
            "id": f"chatcmpl-{generation.id}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": context.model_name,
        }
        # All that a token's event has before its text, and after it.
        self._before = "data: " + json.dumps(self.head)[:-1] + ', "choices": [{"index": '
        nothing = ', "usage": null' if self._wants_usage else ""
        self._after = '}, "logprobs": null, "finish_reason": null}]' + nothing + "}\n\n"
        self._begun: set[int] = set()

    def delta(self, choice: Choice, delta: Delta) -> bytes:
        data = b""
        if choice.index not in self._begun:
            self._begun.add(choice.index)
            data = self._event(choice, {"role": "assistant", "content": ""})
        parser: ToolParser | None = choice.state
        if parser is None and delta.logprobs is None and delta.finish_reason is None:
            if not delta.text:
                return data
            text = f'{self._before}{choice.index}, "delta": {{"content": {json.dumps(delta.text)}'
            return data + (text + self._after).encode()
        text, reason = delta.text, delta.finish_reason
        calls: list[dict[str, Any]] = []
        if parser is not None:
            first = len(parser.calls)
            text, calls = parser.append(delta.text)
            if reason is not None:
                more_text, more_calls = parser.finish()
                text, calls = text + more_text, calls + more_calls
                reason = "tool_calls" if parser.calls and reason == "stop" else reason
            calls = [{"index": first + number} | call for number, call in enumerate(calls)]
        logprobs = self._logprobs(delta)
        if text or logprobs is not None:
            data += self._event(choice, {"content": text}, logprobs)
        if calls:
            data += self._event(choice, {"tool_calls": calls})
        if reason is not None:
            data += self._event(choice, {}, None, reason)
        return data

    def end(self) -> bytes:
        data = b""
        if self._wants_usage:
            chunk = self.head | {"choices": [], "usage": usage(self.choices)}
            data = f"data: {json.dumps(chunk)}\n\n".encode()
        return data + b"data: [DONE]\n\n"

    def error(self, error: ApiError) -> bytes:
        return f"data: {json.dumps(error.body())}\n\ndata: [DONE]\n\n".encode()

    def choice(self, choice: Choice) -> dict[str, Any]:
        """A finished choice as this route writes it."""
        result = choice.result
        if result is None:
            raise ApiError(500, "an answer is missing", code="internal_error")
        text, reason = result.text, result.finish_reason
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        parser: ToolParser | None = choice.state
        if parser is not None:
            shown, _ = parser.append(text)
            shown += parser.finish()[0]
            if parser.calls:
                message |= {"content": shown or None, "tool_calls": parser.calls}
                reason = "tool_calls" if reason == "stop" else reason
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(result),
            "finish_reason": reason,
        }

    @property
    def _wants_usage(self) -> bool:
        options = self.request.stream_options
        return options is not None and options.include_usage

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if delta.logprobs is None:
            return None
        return chat_logprobs(self.context.tokenizer, delta.logprobs, self.request.top_logprobs or 0)

    def _event(
        self,
        choice: Choice,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> bytes:
        part = {
            "index": choice.index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": reason,
        }
        chunk: dict[str, Any] = self.head | {"choices": [part]}
        if self._wants_usage:
            chunk["usage"] = None
        return f"data: {json.dumps(chunk)}\n\n".encode()
