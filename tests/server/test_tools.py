"""Reading calls out of an answer, however its text is cut."""

from __future__ import annotations

import json

import pytest

from refengine.models.chat_template import ChatTemplate
from refengine.server.tools import ToolForm, ToolParser, takes_tools

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def parse(text, step, *, form=None, single=False):
    parser = ToolParser(form or ToolForm(True, "arguments"), frozenset({"f", "g"}), single)
    shown = ""
    for start in range(0, len(text), step):
        shown += parser.append(text[start : start + step])[0]
    return shown + parser.finish()[0], [
        (c["function"]["name"], json.loads(c["function"]["arguments"])) for c in parser.calls
    ]


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        ("just text with a < and <tool", "just text with a < and <tool", []),
        (CALL, "", [("f", {"a": 1})]),
        (CALL + "\n" + CALL.replace('"f"', '"g"'), "", [("f", {"a": 1}), ("g", {"a": 1})]),
        ("I will. " + CALL, "I will. ", [("f", {"a": 1})]),
        (CALL.removesuffix("</tool_call>"), "", [("f", {"a": 1})]),  # ended by the closing token
        (CALL.replace('"f"', '"unknown"'), CALL.replace('"f"', '"unknown"'), []),
        ("<tool_call>not json</tool_call>", "<tool_call>not json</tool_call>", []),
        ("<tool_call>" + "[" * 5000, "<tool_call>" + "[" * 5000, []),
    ],
)
def test_tagged_calls(text, shown, calls, step):
    assert parse(text, step) == (shown, calls)


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_bare_calls(step):
    form = ToolForm(False, "parameters")
    text = '{"name": "f", "parameters": {"a": 1}}'
    assert parse(text, step, form=form) == ("", [("f", {"a": 1})])
    assert parse("Hello {", step, form=form) == ("Hello {", [])
    assert parse('{"other": 1}', step, form=form) == ('{"other": 1}', [])


def test_at_most_one_call_where_asked():
    assert parse(CALL + CALL, 3, single=True)[1] == [("f", {"a": 1})]


def test_templates_with_and_without_tools():
    assert takes_tools(ChatTemplate("{% if tools %}{{ tools }}{% endif %}"))
    assert not takes_tools(ChatTemplate("{% for m in messages %}tools{% endfor %}"))
    assert takes_tools(ChatTemplate({"default": "x", "tool_use": "y"}))
    assert not takes_tools(None)
