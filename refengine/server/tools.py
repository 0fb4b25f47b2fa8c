"""Tools: whether a template knows them, how a call is forced, and reading calls out of a text.

Two forms cover the open models that have tools: ``<tool_call>{"name": ..., "arguments": ...}
</tool_call>`` (Hermes, Qwen) and a bare ``{"name": ..., "parameters": ...}`` (Llama 3).
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import jinja2.meta

from refengine.models.chat_template import ChatTemplate
from refengine.sampling_params import StructuredOutput

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def takes_tools(template: ChatTemplate | None) -> bool:
    """Whether a chat template does anything with tools."""
    if template is None:
        return False
    if "tool_use" in template.sources:
        return True
    source = template.sources.get("default", "")
    # Tags beyond Jinja's own, such as {% generation %}, change nothing here.
    source = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", source)
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return "tools" in jinja2.meta.find_undeclared_variables(environment.parse(source))
    except jinja2.TemplateSyntaxError:
        return "tools" in source


@dataclass(frozen=True, slots=True)
class ToolForm:
    """How a model writes a call."""

    tagged: bool  # between <tool_call> and </tool_call>
    arguments: str  # "arguments" or "parameters"

    @classmethod
    def of(cls, template: ChatTemplate) -> ToolForm:
        """Read off the template, which shows the model how."""
        source = "".join(template.sources.values())
        if OPEN in source or '"parameters"' not in source:
            return cls(True, "arguments")
        return cls(False, "parameters")

    def grammar(self, tools: Sequence[Mapping[str, Any]], name: str | None) -> StructuredOutput:
        """A structure in which the answer must be a call, of ``name`` or of any tool."""
        calls: list[dict[str, Any]] = []
        for tool in tools:
            function = tool["function"]
            if name is not None and function["name"] != name:
                continue
            calls.append(
                {
                    "type": "object",
                    "properties": {
                        "name": {"const": function["name"]},
                        self.arguments: function.get("parameters") or {"type": "object"},
                    },
                    "required": ["name", self.arguments],
                    "additionalProperties": False,
                }
            )
        options = {"x-guidance": {"whitespace_flexible": False}}
        call = json.dumps({"anyOf": calls} | options)
        if not self.tagged:
            return StructuredOutput("json_schema", call)
        opening, closing = json.dumps(OPEN + "\n"), json.dumps("\n" + CLOSE)
        return StructuredOutput("grammar", f"start: {opening} call {closing}\ncall: %json {call}\n")


@dataclass(slots=True)
class ToolParser:
    """Splits an answer into what it says and what it calls, as the text comes.

    Args:
        form: how the model writes calls.
        names: of the tools on offer; a "call" of anything else is text.
        single: stop after one call.
    """

    form: ToolForm
    names: frozenset[str]
    single: bool = False
    calls: list[dict[str, Any]] = field(default_factory=list)
    _held: str = ""
    _inside: bool = False
    _said: bool = False  # text that can't be the beginning of a bare call

    def append(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """New text to show and new calls."""
        self._held += text
        if not self.form.tagged:
            return self._append_bare()
        shown = ""
        calls: list[dict[str, Any]] = []
        while True:
            if self._inside:
                inside, found, rest = self._held.partition(CLOSE)
                if not found:
                    return shown, calls
                self._inside, self._held = False, rest
                made = self._take(inside)
                if made:
                    calls += made
                else:
                    shown += OPEN + inside + CLOSE
                continue
            before, found, rest = self._held.partition(OPEN)
            if found:
                shown += before.rstrip("\n") if not before.strip() else before
                self._inside, self._held = True, rest
                continue
            # Hold back what may be the beginning of a call.
            keep = next(
                (n for n in range(len(OPEN) - 1, 0, -1) if self._held.endswith(OPEN[:n])), 0
            )
            if self.calls and not self._held[: len(self._held) - keep].strip():
                return shown, calls  # blank lines between calls are not an answer
            shown += self._held[: len(self._held) - keep]
            self._held = self._held[len(self._held) - keep :]
            return shown, calls

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """What was held back, at the answer's end."""
        held, self._held = self._held, ""
        if not self.form.tagged:
            if self._said:
                return held, []
            calls = self._take(held)
            return ("", calls) if calls else (held, [])
        if self._inside:  # cut off, or its closing tag is the token that ended the answer
            calls = self._take(held)
            return ("", calls) if calls else (OPEN + held, [])
        return ("" if self.calls and not held.strip() else held), []

    def _append_bare(self) -> tuple[str, list[dict[str, Any]]]:
        if not self._said and (not self._held.strip() or self._held.lstrip()[0] == "{"):
            return "", []
        self._said = True
        text, self._held = self._held, ""
        return text, []

    def _take(self, text: str) -> list[dict[str, Any]]:
        """The call that a text is, as OpenAI writes it; nothing where it is none."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return []
        if not isinstance(value, dict) or value.get("name") not in self.names:
            return []
        arguments = value.get(self.form.arguments, value.get("arguments", {}))
        if self.single and self.calls:
            return []
        call = {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {
                "name": value["name"],
                "arguments": json.dumps(arguments, ensure_ascii=False),
            },
        }
        self.calls.append(call)
        return [call]
