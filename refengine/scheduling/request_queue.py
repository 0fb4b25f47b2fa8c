"""RequestQueue: every unfinished request's place in the policy's order, and who waits in it."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

from refengine.errors import RequestError
from refengine.request import Request, RequestState
from refengine.scheduling.config import SchedulerConfig
from refengine.scheduling.policies import Policy


class Entry(NamedTuple):
    """A request's place; no two have the same arrival index, so places never tie."""

    key: float
    arrival_index: int
    request: Request
    final_length: int  # tokens at which it ends


class RequestQueue:
    """The waiting requests, sorted; and the places of all others, so that they can come back.

    Attributes:
        places: of all unfinished requests, by id.
        waiting: of those that wait to be admitted, in order.
    """

    def __init__(self, config: SchedulerConfig, policy: Policy) -> None:
        self.places: dict[str, Entry] = {}
        self.waiting: list[Entry] = []
        self._config = config
        self._policy = policy
        self._num_arrivals = 0
        self._num_overtakings = 0

    def place(self, request: Request) -> Entry:
        """A request's place."""
        return self.places[request.request_id]

    def register(self, *requests: Request) -> None:
        """Give requests their places, all or none of them.

        Raises:
            RequestError: if one could never be served, or its id is taken.
        """
        lengths = [self._config.final_length(request) for request in requests]
        ids = [request.request_id for request in requests]
        for position, request_id in enumerate(ids):
            if request_id in self.places or request_id in ids[:position]:
                raise RequestError(
                    f"request {request_id!r} is already being served: give each its own id"
                )
        for request, length in zip(requests, lengths, strict=True):
            request.state = RequestState.WAITING
            request.arrival_index = self._num_arrivals
            request.num_overtakings = self._num_overtakings
            self._num_arrivals += 1
            key = self._policy.admission_key(request)
            self.places[request.request_id] = Entry(key, request.arrival_index, request, length)

    def add(self, request: Request) -> None:
        """Let a request wait; a new one that comes before others has overtaken them."""
        place = self.place(request)
        overtakes = bool(self.waiting) and self.waiting[-1] > place
        if overtakes and request.state is RequestState.WAITING:
            self._num_overtakings += 1
        insort(self.waiting, place)

    def remove(self, request: Request) -> bool:
        """Let a request wait no longer; False if it did not."""
        place = self.place(request)
        index = bisect_left(self.waiting, place)
        found = self.waiting[index : index + 1] == [place]
        if found:
            del self.waiting[index]
        return found

    def set_priority(self, request: Request, priority: int) -> None:
        """Give a request another priority, and the place that goes with it."""
        waits = self.remove(request)
        request.priority = priority
        key = self._policy.admission_key(request)
        self.places[request.request_id] = self.place(request)._replace(key=key)
        if waits:
            insort(self.waiting, self.place(request))
