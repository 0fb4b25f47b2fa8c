"""Log-probabilities in the shapes of OpenAI's two routes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from refengine.models.tokenizer import Tokenizer
from refengine.step import Logprob

# OpenAI's API writes this where a probability is too small for a sensible logarithm; JSON has no
# infinity.
LOWEST = -9999.0


def chat_logprobs(
    tokenizer: Tokenizer, entries: Sequence[Mapping[int, Logprob]], count: int
) -> dict[str, Any]:
    """``choices[].logprobs`` of a chat completion.

    Args:
        tokenizer: the model's.
        entries: one a token; the first key is the token itself.
        count: likeliest tokens to list.
    """
    content = []
    for entry in entries:
        chosen = next(iter(entry))
        content.append(
            _describe(tokenizer, chosen, entry[chosen])
            | {
                "top_logprobs": [
                    _describe(tokenizer, token_id, entry[token_id])
                    for token_id in likeliest(entry, count)
                ]
            }
        )
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    entries: Sequence[Mapping[int, Logprob] | None],
    count: int,
    offset: int,
) -> dict[str, Any]:
    """``choices[].logprobs`` of a completion.

    Args:
        tokenizer: the model's.
        token_ids: the tokens.
        entries: one a token; None for a prompt's first, which nothing predicts.
        count: likeliest tokens to list.
        offset: characters before the first token.
    """
    tokens = [token_text(tokenizer, token_id) for token_id in token_ids]
    offsets = []
    for token_id in token_ids:
        offsets.append(offset)
        offset += num_characters(tokenizer, token_id)
    top: list[dict[str, float] | None] = []
    for entry in entries:
        if entry is None:
            top.append(None)
            continue
        top.append({token_text(tokenizer, t): _number(entry[t]) for t in likeliest(entry, count)})
    return {
        "tokens": tokens,
        "token_logprobs": [
            None if entry is None else _number(entry[token_id])
            for token_id, entry in zip(token_ids, entries, strict=True)
        ],
        "top_logprobs": top if count else None,
        "text_offset": offsets,
    }


def likeliest(entry: Mapping[int, Logprob], count: int) -> list[int]:
    """The ``count`` likeliest tokens of an entry, likeliest first.

    An entry holds the chosen token and then the likeliest, which may or may not include it.
    """
    if not count:
        return []
    ids = list(entry)
    if len(ids) > count:
        ids = ids[1:]
    return sorted(ids, key=lambda token_id: entry[token_id].rank)


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    r"""A token as text, or as ``bytes:\xe2\x82`` where it is no whole character."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def num_characters(tokenizer: Tokenizer, token_id: int) -> int:
    """Characters that begin in a token."""
    return sum(byte & 0xC0 != 0x80 for byte in tokenizer.token_bytes(token_id))


def _describe(tokenizer: Tokenizer, token_id: int, value: Logprob) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {
        "token": data.decode("utf-8", "replace"),
        "logprob": _number(value),
        "bytes": list(data),
    }


def _number(value: Logprob) -> float:
    return max(value.logprob, LOWEST)
