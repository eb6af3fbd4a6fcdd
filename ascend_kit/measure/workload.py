"""Seeded requests made of token ids, and which of them is due: what is asked of an engine, apart from how it answers.

Token ids are drawn at random, so no tokenizer is needed and lengths are exact. Prompts differ from their
first token on unless a shared prefix is asked for: a prefix cache must not flatter a sweep by accident.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from ascend_kit.measure.metrics import RequestRecord

OnDone = Callable[[int], None]  # is told how many requests of a workload have ended
_SIGMA = 0.8  # log-normal: the longest of 1,000 draws is about 10 times the mean, as chat logs show


@dataclass(frozen=True)
class Request:
    """One request: a prompt, the exact number of output tokens that must come back, and when it is sent.

    `send_at_s` counts from the start of the workload, or from the end of request `after`, the turn before; None: as
    soon as a place is free. `text` is the prompt as its author wrote it, where it has one.
    """

    index: int
    prompt_token_ids: tuple[int, ...]
    num_output_tokens: int
    send_at_s: float | None = None
    after: int | None = None
    text: str | None = None

    def record(self, arrival_s: float, token_times_s: Sequence[float], error: str | None = None) -> RequestRecord:
        """What became of it, as far as every engine can tell."""
        return RequestRecord(
            index=self.index,
            num_prompt_tokens=len(self.prompt_token_ids),
            num_output_tokens=len(token_times_s),
            arrival_s=arrival_s,
            token_times_s=tuple(token_times_s),
            finish_reason="error" if error else "length",
            error=error,
            finished_s=token_times_s[-1] if token_times_s else None,
            num_asked_tokens=self.num_output_tokens,
        )


class Dispatcher:
    """Hands out requests of a workload that started at `start_s`, at most `concurrency` of them in flight.

    A request without `send_at_s` arrives when a place is free, so a workload of them is a closed loop. One with it
    arrives at that time after the start (after the end of the turn before, for later turns) whether or not a place is
    free: waiting for one counts into its latency. Clocks are handed in.
    """

    def __init__(self, requests: Sequence[Request], concurrency: int, start_s: float) -> None:
        self.concurrency, self.in_flight, self.left = concurrency, 0, len(requests)
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


def make_requests(
    num_requests: int,
    prompt_len: int,
    output_len: int,
    *,
    vocab_size: int,
    seed: int | tuple[int, ...] = 0,
    spread: str = "fixed",
    shared_prefix_len: int = 0,
    max_total_len: int | None = None,
    avoid_ids: Collection[int] = (),
) -> list[Request]:
    """Requests with distinct prompts, the same for the same arguments on every machine.

    `spread="fixed"` gives every request exactly these lengths; `"heavy_tailed"` draws log-normal lengths with
    these means, cut so that a request never exceeds `max_total_len` tokens. `avoid_ids` (end-of-text and the
    like) never appear in a prompt. The shared prefix is shorter than `prompt_len`. ValueError for a vocabulary too
    small to tell prompts apart.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    prompt_lens, output_lens = (_lengths(rng, num_requests, mean, spread) for mean in (prompt_len, output_len))
    if max_total_len is not None:
        output_lens = np.clip(output_lens, 1, max(1, max_total_len - 1))
        prompt_lens = np.clip(prompt_lens, 1, max_total_len - output_lens)
    allowed = np.array(sorted(set(range(vocab_size)) - set(avoid_ids)))
    prompts = _distinct_prompts(rng, allowed, rng.choice(allowed, shared_prefix_len), prompt_lens)
    return [
        Request(index, tuple(prompt.tolist()), int(count))
        for index, (prompt, count) in enumerate(zip(prompts, output_lens, strict=True))
    ]


def _lengths(rng: np.random.Generator, count: int, mean: int, spread: str) -> np.ndarray:
    if spread == "fixed":
        return np.full(count, mean)
    draws = rng.lognormal(math.log(mean) - _SIGMA**2 / 2, _SIGMA, count)
    return np.maximum(1, draws.round().astype(int))


def _distinct_prompts(
    rng: np.random.Generator, allowed: np.ndarray, shared: np.ndarray, lengths: np.ndarray
) -> list[np.ndarray]:
    """Random bodies behind the shared prefix; first own tokens differ for as long as the vocabulary lasts."""
    firsts = np.resize(rng.permutation(allowed), len(lengths))
    prompts: dict[bytes, np.ndarray] = {}
    for first, length in zip(firsts, lengths, strict=True):
        prefix = shared[: length - 1]
        for _ in range(100):
            body = rng.choice(allowed, length - len(prefix) - 1)
            prompt = np.concatenate([prefix, [first], body]).astype(np.int64)
            if prompt.tobytes() not in prompts:
                break
            first = rng.choice(allowed)
        else:
            raise ValueError(f"cannot make {len(lengths)} distinct prompts of {length} tokens from {len(allowed)} ids")
        prompts[prompt.tobytes()] = prompt
    return list(prompts.values())
