from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from refengine.errors import RequestError
from refengine.models.chat_template import MAX_OUTPUT, ChatTemplate
from refengine.models.tokenizer import Tokenizer

DATA = Path(__file__).resolve().parent.parent / "data"
sys.path.insert(0, str(DATA))

from chat_cases import CONVERSATIONS, OPTIONS, TEMPLATES, TOOLS  # noqa: E402

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
HI = [{"role": "user", "content": "Hi"}]
CASES = json.loads((DATA / "chat_templates.json").read_text("utf-8"))["cases"]


def test_every_case_was_recorded() -> None:
    assert len(CASES) == len(TEMPLATES) * len(CONVERSATIONS) * len(OPTIONS)
    assert any("error" in case for case in CASES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_give_what_transformers_gives(name: str) -> None:
    template = ChatTemplate(TEMPLATES[name], SPECIAL)
    cases = [case for case in CASES if case["template"] == name]
    assert len(cases) == len(CONVERSATIONS) * len(OPTIONS)
    for case in cases:
        messages, options = CONVERSATIONS[case["conversation"]], OPTIONS[case["options"]]
        if "error" in case:
            with pytest.raises(RequestError) as caught:
                template.render(messages, **options)
            assert case["error"] in str(caught.value)
        else:
            assert template.render(messages, **options) == case["text"]


def test_tools_choose_the_template_for_them() -> None:
    template = ChatTemplate({"default": "D", "tool_use": "T", "rag": "R"})
    assert template.render(HI) == "D"
    assert template.render(HI, tools=TOOLS) == "T"
    assert template.render(HI, tools=[]) == "D"
    assert template.render(HI, name="rag") == "R"
    with pytest.raises(RequestError, match="no chat template is called 'x'; there is default"):
        template.render(HI, name="x")
    with pytest.raises(RequestError, match="no chat template is called 'default'; there is rag"):
        ChatTemplate({"rag": "R"}).render(HI)


def test_parts_of_text_are_joined() -> None:
    template = ChatTemplate(TEMPLATES["plain"])
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    text = template.render([{"role": "user", "content": parts}], add_generation_prompt=False)
    assert text == "user: a\nb\n"


def test_the_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    before = json.dumps(messages)
    ChatTemplate(TEMPLATES["plain"]).render(messages)
    assert json.dumps(messages) == before


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        (["Hi"], r"messages\[0\] must be an object with a role"),
        ([{"content": "Hi"}], r"messages\[0\] must be an object with a role"),
        ([*HI, {"role": 3, "content": "Hi"}], r"messages\[1\] must be an object"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content must be a text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            r"messages\[0\]\.content may hold parts of type text only",
        ),
        ([{"role": "user", "content": ["Hi"]}], r"messages\[0\]\.content may hold parts"),
    ],
)
def test_messages_of_another_form_are_refused(messages: list[Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ChatTemplate(TEMPLATES["plain"]).render(messages)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}", r"not valid Jinja \(line 1\)"),
        ("\n\n{{ messages[ }}", r"not valid Jinja \(line 3\)"),
        ("{{ messages[0]['content'] | no_such_filter }}", "not valid Jinja"),
        ("{{ nothing.at.all }}", "refuses this: 'nothing' is undefined"),
        ("{{ raise_exception('no\nsystem   role') }}", "refuses this: no system role"),
        ("{{ 1 / 0 }}", "failed: ZeroDivisionError"),
        ("{{ messages[0] + 3 }}", "failed: TypeError"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "failed: RecursionError"),
        ("{{ messages | tojson(indent='x' * 3, separators=1) }}", "failed: "),
    ],
)
def test_a_faulty_template_is_one_clear_line(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        ChatTemplate(source).render(HI)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['__builtins__'] }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ ''['__class__'] }}{{ ''|attr('__class__')|attr('__mro__') }}{{ x.y.z }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}{{ x.y }}",
        "{% set _ = messages.append(1) %}",
        "{% set _ = messages[0].update({'role': 'system'}) %}",
        "{% set _ = messages[0].clear() %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends 'base' %}",
    ],
)
def test_a_hostile_template_gets_nowhere(source: str) -> None:
    messages = [dict(HI[0])]
    # Jinja refuses some, and takes others for undefined, which is written as nothing.
    try:
        text = ChatTemplate(source).render(messages)
    except RequestError:
        text = ""
    assert text == ""
    assert messages == HI


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10000000000 }}",
        "{{ 10000000000 * 'x' }}",
        "{{ [0] * 10000000000 }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99) %}xxxxxxxx{% endfor %}{% endfor %}",
        "{{ lipsum(n=999999999) }}",
    ],
)
def test_a_template_that_builds_without_end_is_stopped(source: str) -> None:
    assert MAX_OUTPUT < 99999 * 99 * 8
    with pytest.raises(RequestError):
        ChatTemplate(source).render(HI)


def test_a_tokenizers_template_knows_its_special_tokens(tmp_path: Path) -> None:
    from tiny_models import write_tiny_tokenizer

    write_tiny_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_path(tmp_path)
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    assert template.render(HI) == "<s><|user|>Hi\n<|assistant|>"
    other = ChatTemplate.of(tokenizer, "{{ eos_token }}")
    assert other is not None
    assert other.render(HI) == "</s>"
    tokenizer.chat_template = None
    assert ChatTemplate.of(tokenizer) is None


@pytest.mark.model
def test_the_default_models_template(smollm2_path: Path) -> None:
    template = ChatTemplate.of(Tokenizer.from_path(smollm2_path))
    assert template is not None
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert template.render(HI) == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    own = [{"role": "system", "content": "Be brief."}, *HI]
    assert template.render(own, add_generation_prompt=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )
