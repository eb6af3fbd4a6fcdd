"""What a caller asks for, what it gets back, and a request's state inside the engine. No torch, no tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded. Temperature 0 is greedy; a seed makes sampling repeatable in any batch."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_new_tokens: int = 0
    logprobs: int | None = None  # report the chosen token's log-probability and this many most probable ones

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        checks = [
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or above"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "None or at least 1"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            (
                "min_new_tokens",
                self.min_new_tokens,
                0 <= self.min_new_tokens <= self.max_new_tokens,
                f"0 to max_new_tokens={self.max_new_tokens}",
            ),
            ("logprobs", self.logprobs, self.logprobs is None or 0 <= self.logprobs <= 100, "None or 0 to 100"),
            ("stop", self.stop, all(self.stop), "strings that are not empty"),
        ]
        for name, value, good, allowed in checks:
            if not good:
                raise ValueError(f"{name}: allowed {allowed}, got {value!r}")


class Score(NamedTuple):
    """Log-probability of a continuation after its context, and whether greedy decoding would have written it."""

    logprob: float
    is_greedy: bool


class TokenLogprobs(NamedTuple):
    """Natural logarithm of the chosen token's probability, and the most probable tokens as (id, logprob)."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass
class Timeline:
    """Moments of one request, seconds of time.perf_counter()."""

    arrival_s: float
    scheduled_s: float | None = None
    token_times_s: list[float] = field(default_factory=list)
    finished_s: float | None = None


@dataclass
class RequestOutput:
    """One finished request."""

    index: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str  # stop | length | error | cancelled
    error: str | None
    logprobs: list[TokenLogprobs] | None
    timeline: Timeline
    num_cached_tokens: int = 0
    num_preemptions: int = 0


class ScoreTarget(NamedTuple):
    """Continuation ids to score at the end of a sequence's input, for the pair number `pair`."""

    pair: int
    token_ids: tuple[int, ...]


_ids = itertools.count()


class Sequence:
    """A request inside the engine: its tokens, how many of them have keys and values, and its blocks."""

    def __init__(
        self,
        prompt_ids: Seq[int],
        sampling: SamplingParams,
        *,
        arrival_s: float,
        index: int | None = None,
        targets: Seq[ScoreTarget] = (),
        is_watched: bool = True,
    ):
        self.id = next(_ids) if index is None else index
        self.sampling = sampling
        self.token_ids = list(prompt_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.targets = list(targets)
        self.is_watched = is_watched  # somebody waits for each token, not only for the last one of a batch
        self.target_scores: list[list[tuple[float, bool]]] = [[] for _ in self.targets]
        self.num_computed = 0  # tokens whose keys and values are in the cache
        self.blocks: list[int] = []
        self.prefix_keys: list[int] = []  # key of each full block registered for reuse
        self.timeline = Timeline(arrival_s)
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.num_cached_tokens = 0
        self.num_preemptions = 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_scoring(self) -> bool:
        return bool(self.targets)

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def first_scored_row(self) -> int:
        """Index of the first input token whose logits are needed for scoring."""
        return self.num_tokens - max(len(target.token_ids) for target in self.targets)

    @property
    def reusable_limit(self) -> int:
        """How many leading tokens may come from the prefix cache: the rows still needed must be computed."""
        return self.first_scored_row if self.is_scoring else self.num_tokens - 1
