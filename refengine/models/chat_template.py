"""A model's Jinja chat template, rendered in a sandbox.

Templates come with downloaded models, so they are programs of strangers: Jinja's immutable sandbox
keeps them from Python's internals and from changing what they are given, and simple ways to fill
memory are closed. A template can still loop for long; a server should take none from its clients.
The helpers they may call are those that transformers offers them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from refengine.errors import RequestError

if TYPE_CHECKING:
    from refengine.models.tokenizer import Tokenizer

# Characters that a template may write, and the largest text or list that it may build by
# multiplying: far above any context, far below a machine's memory.
MAX_OUTPUT = 16 * 2**20
_MAX_PRODUCT = 2**20


class ChatTemplate:
    """Turns a conversation into the text that the model was trained on.

    Args:
        source: the Jinja template, or several by name ("default", "tool_use").
        special_tokens: texts that templates refer to, such as ``bos_token``.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.sources = {"default": source} if isinstance(source, str) else dict(source)
        self.special_tokens = dict(special_tokens or {})

    @classmethod
    def of(cls, tokenizer: Tokenizer, source: str | None = None) -> ChatTemplate | None:
        """The tokenizer's own template, or ``source`` with its special tokens; None without."""
        chosen = tokenizer.chat_template if source is None else source
        return None if chosen is None else cls(chosen, tokenizer.special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        name: str | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as text; every special token in it is written out.

        Args:
            messages: each with a ``role`` and a ``content``: a text, or OpenAI's list of parts, of
                which only texts are taken.
            add_generation_prompt: end with what begins an answer.
            tools: JSON schemas of functions that the model may call.
            name: which of several templates; None takes "tool_use" where tools are given and
                there is such a one, else "default".
            variables: whatever else the template knows (``enable_thinking``, ...).

        Raises:
            RequestError: where the messages are not of that form, or the template is faulty,
                refuses them, or builds more than it may.
        """
        if name is None:
            name = "tool_use" if tools and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise RequestError(
                f"no chat template is called {name!r}; there is {', '.join(self.sources)}"
            )
        context: dict[str, Any] = {
            **self.special_tokens,
            **variables,
            "messages": _plain_messages(messages),
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "add_generation_prompt": add_generation_prompt,
        }
        context.setdefault("documents", None)
        pieces: list[str] = []
        size = 0
        try:
            for piece in _compile(self.sources[name]).generate(context):
                size += len(piece)
                if size > MAX_OUTPUT:
                    raise RequestError(
                        f"the chat template wrote more than {MAX_OUTPUT:,} characters"
                    )
                pieces.append(piece)
        except jinja2.TemplateSyntaxError as error:
            raise RequestError(
                f"the chat template is not valid Jinja (line {error.lineno}): {error.message}"
            ) from None
        except jinja2.TemplateError as error:
            raise RequestError(f"the chat template refuses this: {_one_line(error)}") from None
        except RequestError:
            raise
        except Exception as error:  # a template is a program: any fault of it ends here
            raise RequestError(
                f"the chat template failed: {type(error).__name__}: {_one_line(error)}"
            ) from None
        return "".join(pieces)


def _plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the messages as plain dicts whose contents are texts (or null)."""
    if not messages:
        raise RequestError("messages must hold at least one message, got none")
    plain = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(
                f"messages[{index}] must be an object with a role and a content, got {message!r}"
            )
        content = message.get("content")
        if isinstance(content, list):
            content = "\n".join(_part_text(part, index) for part in content)
        elif content is not None and not isinstance(content, str):
            raise RequestError(
                f"messages[{index}].content must be a text or a list of parts, got {content!r}"
            )
        plain.append({**message, "content": content})
    return plain


def _part_text(part: object, index: int) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    raise RequestError(
        f"messages[{index}].content may hold parts of type text only, got {part!r}; this engine "
        "takes no images or sounds"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or "no reason given"


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with bounds on the sizes that arithmetic can reach."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        if operator == "**":
            raise SecurityError("powers are not for chat templates")
        for repeated, times in ((left, right), (right, left)):
            if isinstance(repeated, (str, list, tuple)) and isinstance(times, int):
                size = len(repeated) * times
                if size > _MAX_PRODUCT:
                    raise SecurityError(f"a chat template may not build {size:,} elements")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; Jinja's own filter would escape characters for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


@lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    helpers: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    environment.globals.update(helpers)
    del environment.globals["lipsum"]  # writes as much nonsense as it is told to
    return environment.from_string(source)
