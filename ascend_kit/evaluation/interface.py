"""What an evaluation asks of an engine, of whatever kind it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ascend_kit.identity import Identity

if TYPE_CHECKING:
    from ascend_kit.device.device import Device
    from ascend_kit.engine.sequence import RequestOutput, SamplingParams, Score
    from ascend_kit.engine.text import Tokenizer
    from ascend_kit.model.config import ModelConfig

Ids = list[int]


class EvaluatedEngine(Protocol):
    """A loaded model: log-probabilities of continuations, text after prompts, and what both depend on."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def device(self) -> Device: ...
    @property
    def max_seq_length(self) -> int: ...
    @property
    def identity(self) -> Identity: ...
    def score(
        self,
        pairs: Sequence[tuple[Ids, Ids]],
        *,
        on_progress: Callable[[int, int], None] | None = None,
        on_score: Callable[[int, Score], None] | None = None,
    ) -> list[Score]: ...
    def generate(
        self,
        prompts: Sequence[Ids],
        params: Sequence[SamplingParams],
        *,
        on_progress: Callable[[int, int], None] | None = None,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> list[RequestOutput]: ...
    def stats(self) -> dict[str, Any]: ...
