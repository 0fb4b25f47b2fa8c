"""Policies: who is admitted first, and who gives way when blocks run out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from refengine.request import Request


class Policy(Protocol):
    """The order of requests.

    Requests are admitted, and served within a step, in ascending order of ``admission_key``;
    equal keys go by arrival. A key must not change while a request lives.
    """

    def admission_key(self, request: Request) -> float:
        """Where a request stands in the order; smaller is sooner."""

    def victim(self, running: Sequence[Request]) -> tuple[Request, str]:
        """Who is preempted, and why in a few words.

        ``running`` holds, in ascending order of their keys, the requests that may have to go. It
        never holds one that this step has already served, so the first in order always progresses.
        """


class FCFS:
    """First come, first served; the latest arrival gives way."""

    def admission_key(self, request: Request) -> float:
        """By arrival alone."""
        return request.arrival_index

    def victim(self, running: Sequence[Request]) -> tuple[Request, str]:
        """The latest arrival."""
        return running[-1], "latest arrival"


class Priority:
    """Smaller ``Request.priority`` first, then by arrival; the last in that order gives way."""

    def admission_key(self, request: Request) -> float:
        """By priority; equal ones go by arrival."""
        return request.priority

    def victim(self, running: Sequence[Request]) -> tuple[Request, str]:
        """The lowest priority, and of these the latest arrival."""
        return running[-1], "lowest priority"


POLICIES: dict[str, type[FCFS] | type[Priority]] = {"fcfs": FCFS, "priority": Priority}


def load_policy(name: str) -> Policy:
    """The policy of this name.

    Raises:
        ValueError: if there is none.
    """
    if name not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {name!r}")
    return POLICIES[name]()
