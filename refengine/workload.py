"""Workloads for measuring: prompts and output lengths, from a file or drawn from a seed."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from refengine.errors import RefengineError


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One request of a workload."""

    prompt_token_ids: tuple[int, ...]
    output_len: int  # tokens to generate; the end of sequence is ignored


def draw_workload(
    num_prompts: int,
    input_len: tuple[int, int],
    output_len: tuple[int, int],
    vocab_size: int,
    seed: int,
) -> list[WorkItem]:
    """Random token ids of uniformly drawn lengths.

    Args:
        num_prompts: requests.
        input_len: smallest and largest prompt, tokens.
        output_len: smallest and largest output, tokens.
        vocab_size: ids are drawn below it.
        seed: of the draw.
    """
    draw = random.Random(seed)
    return [
        WorkItem(
            tuple(draw.randrange(vocab_size) for _ in range(draw.randint(*input_len))),
            draw.randint(*output_len),
        )
        for _ in range(num_prompts)
    ]


def read_workload(path: str | Path) -> list[WorkItem]:
    """A JSON list of ``{"prompt_token_ids": [...], "output_len": n}``.

    Raises:
        RefengineError: where the file is something else.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RefengineError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise RefengineError(f"{path} is not a JSON file: {error}") from error
    wanted = 'a JSON list of {"prompt_token_ids": [...], "output_len": n}'
    if not isinstance(entries, list) or not entries:
        raise RefengineError(f"{path} must hold {wanted}")
    items = []
    for number, entry in enumerate(entries):
        ids = entry.get("prompt_token_ids") if isinstance(entry, dict) else None
        length = entry.get("output_len") if isinstance(entry, dict) else None
        if (
            not isinstance(ids, list)
            or not ids
            or not all(type(i) is int for i in ids)
            or type(length) is not int
            or length < 1
        ):
            raise RefengineError(f"{path} must hold {wanted}; entry {number} is {str(entry)[:80]}")
        items.append(WorkItem(tuple(ids), length))
    return items


def write_workload(items: list[WorkItem], path: str | Path) -> None:
    """Write a workload that ``read_workload`` reads."""
    entries = [
        {"prompt_token_ids": list(i.prompt_token_ids), "output_len": i.output_len} for i in items
    ]
    Path(path).write_text(json.dumps(entries), encoding="utf-8")
