"""What a caller asks for, what it gets back, and a request's state inside the engine; pairs to score as requests, and
their scores back in order. No torch, no tokenizer."""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ascend_kit.files import read_json

if TYPE_CHECKING:
    from ascend_kit.engine.speculation import PromptLookup

MAX_LOGPROBS = 100
TOP_K_OF_TRANSFORMERS = 50  # what a generation_config.json that samples and names no top_k means


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded. Temperature 0 is greedy.

    With a `seed` sampling is repeatable in any batch; without one it is random per request, and repeatable from the
    engine's seed. `repetition_penalty` divides positive logits, and multiplies negative ones, of all tokens of prompt
    and answer; `presence_penalty` is subtracted once from logits of tokens the answer has. `top_p` counts within what
    `top_k` has left, and `min_p` is a share of the best token's probability.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_new_tokens: int = 0
    logprobs: int | None = None  # report the chosen token's log-probability and this many most probable ones

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        self._set("stop", stop, all(isinstance(word, str) and word for word in stop), "strings that are not empty")
        try:
            ends = tuple(whole_number(token) for token in self.stop_token_ids)
        except TypeError:
            raise ValueError(f"stop_token_ids: allowed whole numbers, got {self.stop_token_ids!r}") from None
        self._set("stop_token_ids", ends, True, "")
        self._whole("max_new_tokens", 1)
        self._whole("min_new_tokens", 0, self.max_new_tokens)
        for name, least in (("top_k", 1), ("seed", None), ("logprobs", 0)):
            if getattr(self, name) is not None:
                self._whole(name, least, MAX_LOGPROBS if name == "logprobs" else None)
        self._number("temperature", lambda x: x >= 0, "0 (greedy) or above")
        self._number("top_p", lambda x: 0 < x <= 1, "above 0 and at most 1")
        self._number("min_p", lambda x: 0 <= x <= 1, "0 to 1")
        self._number("repetition_penalty", lambda x: 1e-3 <= x <= 1e3, "0.001 to 1000 (1 = none)")
        self._number("presence_penalty", lambda x: -2 <= x <= 2, "-2 to 2")

    @classmethod
    def from_model(cls, folder: str | Path, **given: Any) -> SamplingParams:
        """What the model's generation_config.json recommends; values `given` by name win.

        As transformers reads it: greedy unless `do_sample` is true. ValueError when the file is missing or broken.
        """
        path = Path(folder).expanduser() / "generation_config.json"
        raw = read_json(path, "the model recommends no sampling; give temperature and the rest")
        names = ["repetition_penalty"]
        found: dict[str, Any] = {}
        if raw.get("do_sample"):
            names += ["temperature", "top_k", "top_p", "min_p"]
            found = {"temperature": 1.0, "top_k": TOP_K_OF_TRANSFORMERS}
        found |= {name: raw[name] for name in names if raw.get(name) is not None}
        found["top_k"] = found.get("top_k") or None  # 0 is no limit
        try:
            return cls(**{**found, **given})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def _set(self, name: str, value: Any, good: bool, allowed: str) -> None:
        if not good:
            raise ValueError(f"{name}: allowed {allowed}, got {getattr(self, name)!r}")
        object.__setattr__(self, name, value)

    def _whole(self, name: str, least: int | None, most: int | None = None) -> None:
        limits = "" if least is None else f" from {least}" + ("" if most is None else f" to {most}")
        value = getattr(self, name)
        try:
            number = whole_number(value)
        except TypeError:
            number = None
        good = number is not None and (least is None or number >= least) and (most is None or number <= most)
        self._set(name, number, good, f"whole numbers{limits}")

    def _number(self, name: str, allows: Any, allowed: str) -> None:
        value = getattr(self, name)
        good = not isinstance(value, (bool, str)) and hasattr(value, "__float__")
        number = float(value) if good else math.nan
        self._set(name, number, math.isfinite(number) and allows(number), allowed)


def whole_number(value: Any) -> int:
    """A plain int from an int of Python, numpy or torch; TypeError for anything else, True and False among it."""
    if not isinstance(value, bool) and not str(getattr(value, "dtype", "")).endswith("bool"):
        with contextlib.suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"{value!r} is not a whole number")


class Score(NamedTuple):
    """Log-probability of a continuation after its context, and whether greedy decoding would have written it.

    A pair that could not be computed has NaN and `error`.
    """

    logprob: float
    is_greedy: bool
    error: str | None = None


class TokenScore(NamedTuple):
    """Log-probability of a given token, whether greedy decoding would have written it, and (id, logprob) of the one it
    would have."""

    logprob: float
    is_greedy: bool
    best: tuple[int, float]


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


class Progress(NamedTuple):
    """What came of a request since its core last told: travels from a replica to its driver. Times in the sender's
    time.perf_counter seconds."""

    request_id: int
    tokens: list[int]
    token_times_s: list[float]
    logprobs: list[TokenLogprobs]
    finish_reason: str | None
    error: str | None
    scheduled_s: float | None
    num_cached_tokens: int
    num_preemptions: int
    target_scores: list[list[TokenScore]]


_ids = itertools.count()


class Sequence:
    """A request inside the engine: its tokens, how many of them have keys and values, and its blocks."""

    def __init__(
        self,
        prompt_ids: Seq[int],
        sampling: SamplingParams,
        *,
        arrival_s: float,
        request_id: int | None = None,
        targets: Seq[ScoreTarget] = (),
        is_watched: bool = True,
    ):
        self.id = next(_ids) if request_id is None else request_id
        self.sampling = sampling
        self.token_ids = list(prompt_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.targets = list(targets)
        self.is_watched = is_watched  # somebody waits for each token, not only for the last one of a batch
        self.target_scores: list[list[TokenScore]] = [[] for _ in self.targets]
        self.num_computed = 0  # tokens whose keys and values are in the cache
        self.lookup: PromptLookup | None = None  # what guesses its next tokens
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
    def prompt_ids(self) -> list[int]:
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    def tokens_between(self, start: int, end: int) -> list[int]:
        """Tokens from position `start` up to `end`."""
        return self.token_ids[start:end]

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
    def reusable_limit(self) -> int:
        """How many leading tokens may come from the prefix cache: the rows still needed must be computed."""
        return self.num_tokens - max((len(target.token_ids) for target in self.targets), default=1)

    def progress_since(self, num_output_tokens: int) -> Progress:
        """What has come since the answer had so many tokens."""
        tokens = self.output_ids[num_output_tokens:]
        latest = slice(-len(tokens) if tokens else len(self.timeline.token_times_s), None)
        return Progress(
            self.id,
            tokens,
            self.timeline.token_times_s[latest],
            self.logprobs[latest] if tokens else [],
            self.finish_reason,
            self.error,
            self.timeline.scheduled_s,
            self.num_cached_tokens,
            self.num_preemptions,
            self.target_scores if self.is_finished else [],
        )

    def end(self, reason: str, error: str | None = None, at_s: float | None = None) -> None:
        """End now, or at `at_s`; whoever owns it takes its blocks back."""
        self.finish_reason, self.error = reason, error
        self.timeline.finished_s = time.perf_counter() if at_s is None else at_s

    def take_end(self, news: Progress, clock_offset_s: float = 0.0) -> None:
        """Take over how a core elsewhere, whose clock is so much ahead, has ended this request."""
        self.take_start(news, clock_offset_s)
        self.target_scores = news.target_scores or self.target_scores
        times = self.timeline.token_times_s
        self.end(news.finish_reason or "", news.error, times[-1] if times else None)

    def take_start(self, news: Progress, clock_offset_s: float = 0.0) -> None:
        """Take over when it started there, and what that cost."""
        if self.timeline.scheduled_s is None and news.scheduled_s is not None:
            self.timeline.scheduled_s = news.scheduled_s - clock_offset_s
            self.num_cached_tokens = news.num_cached_tokens
        self.num_preemptions = max(self.num_preemptions, news.num_preemptions)


# --- scoring ----------------------------------------------------------------------------------------------------------

OnScore = Callable[[int, Score], None]  # the place of a pair, its score
LOGITS_NOT_FINITE = (
    "the model's logits are not finite (NaN or infinity): an overflow in its arithmetic, or damaged weights; "
    "try precision bf16 or fp32"
)


def scores_of(sequence: Sequence) -> Iterator[tuple[int, Score]]:
    """Number and score of each pair that a finished sequence stands for."""
    for target, rows in zip(sequence.targets, sequence.target_scores, strict=True):
        logprob = sum(row.logprob for row in rows)
        error = sequence.error or (None if math.isfinite(logprob) else LOGITS_NOT_FINITE)
        is_greedy = error is None and all(row.is_greedy for row in rows)
        yield target.pair, Score(logprob if error is None else math.nan, is_greedy, error)


def score_sequences(pairs: dict[int, tuple[list[int], list[int]]], vocab_size: int, first: int = 0) -> list[Sequence]:
    """One sequence for all numbered pairs with the same tokens before the last one; ValueError names a pair that
    cannot be scored.

    Their ids count down from -1 - `first`, apart from those of requests.
    """
    groups: dict[tuple[int, ...], list[ScoreTarget]] = {}
    for number, (context_ids, ids) in pairs.items():
        if not context_ids or not ids:
            raise ValueError(
                f"pair {number}: context and continuation need at least one token each, got "
                f"{len(context_ids)} and {len(ids)}"
            )
        bad = next((t for t in ids if not 0 <= t < vocab_size), None)
        if bad is not None:
            raise ValueError(f"pair {number}: token id {bad} is outside 0 to {vocab_size - 1}")
        groups.setdefault(tuple(context_ids + ids[:-1]), []).append(ScoreTarget(number, tuple(ids)))
    now = time.perf_counter()
    # Sorted, so that inputs with a long common prefix run next to each other and share its blocks.
    return [
        Sequence(ids, SamplingParams(), arrival_s=now, request_id=-1 - first - number, targets=groups[ids])
        for number, ids in enumerate(sorted(groups))
    ]
