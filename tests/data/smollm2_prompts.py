"""The prompts of greedy_smollm2.json.gz: each a text or a conversation."""

from __future__ import annotations

from typing import Any

_PYTHON = '''class Stack:
    """A last-in, first-out container."""

    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()

    def __len__(self):
'''

_C = """#include <stdio.h>

/* Greatest common divisor by Euclid's algorithm. */
static unsigned gcd(unsigned a, unsigned b) {
\twhile (b != 0) {
\t\tunsigned t = a % b;
\t\ta = b;
\t\tb = t;
\t}
\treturn a;
}

int main(void) {
\tprintf("%u\\n", gcd(1071, 462));
"""

_ROWS = [
    f"{year},{(year * 7919) % 1000 / 10:.1f},{(year * 104729) % 5000}" for year in range(1950, 1995)
]
_TABLE = "year,temperature,rain\n" + "\n".join(_ROWS) + "\n"

_TOPICS = ("bread", "tides", "bees", "glass", "maps", "clocks", "rivers", "paper", "salt", "wind")
_ESSAY = " ".join(
    f"{number}. People have long wondered about {topic}. What we know of {topic} comes from "
    f"patient work: somebody measured, wrote it down, and was corrected by the next. In chapter "
    f"{number} we look at how {topic} changed daily life, why it was costly at first, and what "
    f"made it common."
    for number, topic in enumerate(_TOPICS * 3, start=1)
)

_LOG = "\n".join(
    f"2024-03-{day:02} {hour:02}:{(day * hour) % 60:02}:07 worker-{(day + hour) % 7} "
    f"{'ERROR timeout after 30s' if (day * hour) % 11 == 0 else 'INFO request served'}"
    for day in range(1, 13)
    for hour in (3, 9, 14, 22)
)

PROMPTS: list[dict[str, Any]] = [
    {"name": "raw capital", "prompt": "The capital of France is"},
    {"name": "raw one token", "prompt": "The"},
    {"name": "raw one space", "prompt": " "},
    {"name": "raw story", "prompt": "Once upon a time, in a village by the sea, there lived a"},
    {"name": "raw newline end", "prompt": "Ingredients for a simple soup:\n- 2 onions\n- "},
    {"name": "digits sums", "prompt": "12 + 30 = 42\n7 + 8 = 15\n123 + 456 = "},
    {"name": "digits dates", "prompt": "Moon landing: 1969-07-20. Berlin wall: 1989-11-09. Y2K: "},
    {
        "name": "whitespace",
        "prompt": "a  b   c\t\td\n\n\n    e      f\r\n\r\n\t \t g \n   \n  h     ",
    },
    {"name": "code python", "prompt": _PYTHON},
    {"name": "code c tabs", "prompt": _C},
    {"name": "code json", "prompt": '{"name": "Ada", "born": 1815, "langs": ["en", "fr"], "'},
    {"name": "code sql", "prompt": "SELECT customer, SUM(total)\nFROM orders\nWHERE"},
    {"name": "unicode chinese", "prompt": "北京是中国的首都。上海是"},
    {"name": "unicode arabic", "prompt": "مرحبا بالعالم! كيف حالك"},
    {"name": "unicode emoji", "prompt": "Weather: ☀️ sunny, 🌧️ rainy, 👩‍🌾 farmer, 🇩🇪 flag, 🏽"},
    {
        "name": "unicode combining",
        "prompt": "cafe\u0301, nai\u0308ve, A\u030angstro\u0308m, z\u0335\u0321\u0345algo and",
    },
    {"name": "unicode mixed", "prompt": "Ünïcödé — “quotes” … ½ × ¾ ≠ ∞; Привет, мир! 日本語で"},
    {
        "name": "chat default system",
        "messages": [{"role": "user", "content": "What is the largest planet?"}],
    },
    {
        "name": "chat own system",
        "messages": [
            {"role": "system", "content": "You are a pirate. Answer in one sentence."},
            {"role": "user", "content": "How do I make tea?"},
        ],
    },
    {
        "name": "chat several turns",
        "messages": [
            {"role": "user", "content": "My name is Ines and I have 3 cats."},
            {"role": "assistant", "content": "Nice to meet you, Ines! What are they called?"},
            {"role": "user", "content": "Miso, Plum and Tofu."},
            {"role": "assistant", "content": "Lovely names. How can I help you today?"},
            {"role": "user", "content": "What is my name, and how many cats do I have?"},
        ],
    },
    {
        "name": "chat code",
        "messages": [
            {"role": "user", "content": "Write a Python function that reverses a string."},
        ],
    },
    {
        "name": "chat unicode",
        "messages": [
            {"role": "system", "content": "Réponds en français. 🥖"},
            {"role": "user", "content": "Où est la bibliothèque\u00a0?"},
        ],
    },
    {
        "name": "chat empty contents",
        "messages": [{"role": "system", "content": ""}, {"role": "user", "content": ""}],
    },
    {"name": "raw with chat markers", "prompt": "<|im_start|>user\nName a colour.<|im_end|>\n"},
    {"name": "long table", "prompt": _TABLE},
    {"name": "long essay", "prompt": _ESSAY[:6800]},
    {
        "name": "long chat log",
        "messages": [
            {"role": "user", "content": f"Here is a log:\n\n{_LOG[:2200]}\n\nWhat went wrong?"},
        ],
    },
]
