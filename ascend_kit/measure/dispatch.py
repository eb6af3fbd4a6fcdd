"""Which request is due: by its arrival time, a free place and the end of the turn before. Clocks are handed in."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from ascend_kit.measure.workload import Request


class Dispatcher:
    """Hands out requests of a workload that started at `start_s`, at most `concurrency` of them in flight.

    A request without `send_at_s` arrives when a place is free, so a workload of them is a closed loop. One with it
    arrives at that time after the start (after the end of the turn before, for later turns) whether or not a place is
    free: waiting for one counts into its latency.
    """

    def __init__(self, requests: Sequence[Request], concurrency: int, start_s: float) -> None:
        self.concurrency, self.in_flight, self.left = concurrency, 0, len(requests)
        self._start_s = start_s
        self._due: list[tuple[float, int, Request]] = []  # heap of (arrival, order, request)
        self._after: dict[int, list[Request]] = {}
        for request in requests:
            if request.after is None:
                self._queue(request, start_s)
            else:
                self._after.setdefault(request.after, []).append(request)

    def due(self, now_s: float) -> list[tuple[Request, float]]:
        """Requests to send now, each with its arrival time."""
        found = []
        while self._due and self.in_flight < self.concurrency and self._due[0][0] <= now_s:
            arrival_s, _, request = heapq.heappop(self._due)
            found.append((request, now_s if arrival_s == -math.inf else arrival_s))
            self.in_flight += 1
        return found

    def ended(self, index: int, now_s: float) -> None:
        """The request of this index has ended: its place is free, and the turn after it may come."""
        self.in_flight -= 1
        self.left -= 1
        for request in self._after.pop(index, []):
            self._queue(request, now_s)

    def wait_s(self, now_s: float) -> float | None:
        """Seconds until the next arrival that has a place; None where only the end of a request can bring one."""
        if not self._due or self.in_flight >= self.concurrency:
            return None
        return max(0.0, self._due[0][0] - now_s)

    def _queue(self, request: Request, from_s: float) -> None:
        arrival_s = -math.inf if request.send_at_s is None else from_s + request.send_at_s
        heapq.heappush(self._due, (arrival_s, request.index, request))
