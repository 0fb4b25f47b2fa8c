"""Policies: who is admitted first, and who gives way when blocks run out.

A policy is a small class; ``load_policy`` takes one's own as ``module:Class``. None of those here
lets a request starve. Each arrival that jumps the queue makes ``Request.num_overtakings`` of all
later ones larger, which counts against them: so a request is overtaken by a bounded number of
others, however many come (ageing, without asking the time).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Protocol, runtime_checkable

from refengine.request import Request

# How many may overtake a request whose priority is worse by 1.
OVERTAKINGS_PER_PRIORITY = 256
# What a request without max_tokens counts as among the shortest jobs.
UNBOUNDED_TOKENS = 1 << 16


class Policy(Protocol):
    """The order of requests.

    Requests are admitted, and served within a step, in ascending order of ``admission_key``;
    equal keys go by arrival. A request's key must stay the same as long as its fields do.
    """

    def admission_key(self, request: Request) -> float:
        """Where a request stands in the order; smaller is sooner."""

    def victim(self, running: Sequence[Request]) -> tuple[Request, str]:
        """Who is preempted, and why in a few words.

        ``running`` holds, in the policy's order, those who may have to go: never one that this
        step has already served, so whoever is first in order always progresses.
        """


@runtime_checkable
class PrefixPolicy(Policy, Protocol):
    """A policy that also looks at what the prefix cache holds at the moment."""

    def admission_order(
        self, waiting: Sequence[Request], num_cached_tokens: Callable[[Request], int]
    ) -> Sequence[Request]:
        """The waiting requests (the first 64 of them in order) in the order of admission."""


class FCFS:
    """First come, first served; the latest arrival gives way."""

    def admission_key(self, request: Request) -> float:
        """By arrival alone."""
        return request.arrival_index

    def victim(self, running: Sequence[Request]) -> tuple[Request, str]:
        """The latest arrival."""
        return running[-1], "latest arrival"


class Priority(FCFS):
    """Smaller ``Request.priority`` first; equal ones by arrival."""

    def admission_key(self, request: Request) -> float:
        """By priority, until too many have overtaken."""
        return request.priority * OVERTAKINGS_PER_PRIORITY + request.num_overtakings

    def victim(self, running: Sequence[Request]) -> tuple[Request, str]:
        """The last in order."""
        return running[-1], f"lowest priority, {running[-1].priority}"


class ShortestJobFirst(FCFS):
    """Smaller ``max_tokens`` first; each overtaking counts as one token."""

    def admission_key(self, request: Request) -> float:
        """By the tokens that it may generate."""
        max_tokens = request.sampling_params.max_tokens
        return (UNBOUNDED_TOKENS if max_tokens is None else max_tokens) + request.num_overtakings

    def victim(self, running: Sequence[Request]) -> tuple[Request, str]:
        """The last in order."""
        return running[-1], "longest job"


class LongestPrefixMatch(FCFS):
    """Who has most tokens in the prefix cache first; each later arrival counts as one token.

    So requests of one prefix follow each other, before it is evicted (SGLang, Zheng et al. 2023,
    arXiv 2312.07104, section 3).
    """

    def admission_order(
        self, waiting: Sequence[Request], num_cached_tokens: Callable[[Request], int]
    ) -> Sequence[Request]:
        """By cached tokens."""
        return sorted(waiting, key=lambda r: r.arrival_index - num_cached_tokens(r))


POLICIES: dict[str, Callable[[], Policy]] = {
    "fcfs": FCFS,
    "priority": Priority,
    "shortest-job-first": ShortestJobFirst,
    "longest-prefix-match": LongestPrefixMatch,
}


def load_policy(name: str) -> Policy:
    """The policy of this name, or an instance of the class that ``module:Class`` names.

    Raises:
        ValueError: if there is none, or it lacks one of the methods of ``Policy``.
    """
    module_name, colon, class_name = name.partition(":")
    if not colon:
        if name not in POLICIES:
            raise ValueError(
                f"policy must be one of {', '.join(POLICIES)} or module:Class, got {name!r}"
            )
        return POLICIES[name]()
    try:
        policy: Policy = getattr(import_module(module_name), class_name)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"policy {name!r} can't be loaded: {error}") from error
    for method in ("admission_key", "victim"):
        if not callable(getattr(policy, method, None)):
            raise ValueError(f"policy {name!r} has no method {method}")
    return policy
