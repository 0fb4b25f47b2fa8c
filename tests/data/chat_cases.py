"""Templates and conversations; chat_templates.json holds what transformers makes of them."""

from __future__ import annotations

from typing import Any

# In the manner of the templates that models ship with; each tries some of the helpers.
TEMPLATES = {
    "plain": "{% for message in messages %}{{ message.role }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    "blocks": """
    {%- for message in messages %}
      {% if message['role'] == 'system' %}
<<SYS>>{{ message['content'] | trim }}<</SYS>>
      {% elif loop.last %}
{{ bos_token }}[LAST] {{ message['content'] }}
      {% else %}
[{{ loop.index0 }}/{{ loop.length }}] {{ message['content'] }}{{ eos_token }}
      {% endif %}
    {% endfor %}
""",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m.content }}|{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "alternation": "{% set ns = namespace(turn='user') %}{% for m in messages %}"
    "{% if m.role != ns.turn %}{{ raise_exception('Roles must alternate, got ' + m.role) }}"
    "{% endif %}{% set ns.turn = 'assistant' if ns.turn == 'user' else 'user' %}"
    "{{ m.role[0] | upper }}:{{ m.content }};{% endfor %}",
    "tools": "{% if tools %}# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "{{ tools | tojson(indent=2) }}\n{% endif %}{% for m in messages %}{{ m.content }}\n"
    "{% if m.tool_calls is defined %}{% for c in m.tool_calls %}<call>{{ c.function.name }}"
    "({{ c.function.arguments | tojson }})</call>{% endfor %}{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}",
    "thinking": "{% for m in messages %}{% if '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>{% endif %}"
    "{% endif %}",
    "first and rest": "{%- if messages[0]['role'] == 'system' -%}{%- set first = "
    "messages[0]['content'] -%}{%- set rest = messages[1:] -%}{%- else -%}"
    "{%- set first = 'none' -%}{%- set rest = messages -%}{%- endif -%}{{ first }}\n"
    "{%- for m in rest %}\n{{ m.content }}"
    "{%- endfor %}",
    "macro": "{% macro turn(m) %}<{{ m.role }}>{{ m.content | replace('<', '&lt;') }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}{{ '%05.1f' | format(2.25) }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "Hi <b> & 'quotes' {{ not_a_variable }} é 日本 🎉"}],
    "turns": [
        {"role": "system", "content": "  Be brief.\n"},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTwo."},
        {"role": "user", "content": "Three?\n"},
    ],
    "alternating": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ],
    "calls": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "type": "function",
                    "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}},
                }
            ],
        },
    ],
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the <weather> in Zürich & elsewhere.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]

OPTIONS: dict[str, dict[str, Any]] = {
    "": {"add_generation_prompt": False},
    "prompt": {"add_generation_prompt": True},
    "tools": {"add_generation_prompt": True, "tools": TOOLS},
    "no thinking": {"add_generation_prompt": True, "enable_thinking": False},
}
