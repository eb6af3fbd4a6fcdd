"""AscendInferEngine: text or token ids in, answers, scores or arrays out."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ascend_kit.engine import text
from ascend_kit.engine.config import EngineConfig
from ascend_kit.engine.core import ReplicasLost
from ascend_kit.engine.opened_model import OpenedModel
from ascend_kit.engine.sampler import mix
from ascend_kit.engine.sequence import (
    OnScore,
    RequestOutput,
    SamplingParams,
    Score,
    Sequence,
    score_sequences,
    scores_of,
)
from ascend_kit.files import Progress

Prompt = str | Seq[int] | np.ndarray
Prompts = Prompt | Seq[Prompt]
Sampling = SamplingParams | Seq[SamplingParams] | None
OnStep = Callable[[Sequence], None]  # called after each step that touched the request


class AscendInferEngine(OpenedModel):
    """Runs one model with continuous batching over a paged KV cache. Its parameters are those of EngineConfig."""

    def _open(self, settings: EngineConfig) -> None:
        super()._open(settings)
        # Streams advance the engine from threads of their own. Whoever advances it tells those who asked for a
        # request; what nobody asked for waits for `step`.
        self._lock = threading.RLock()
        self._subscribers: dict[int, OnStep] = {}
        self._ended: list[RequestOutput] = []
        self._num_requests = self._num_scored = 0

    def close(self) -> None:
        """Free weights and cache, and end the processes that hold them; nobody hears of what was unfinished."""
        self._subscribers.clear()
        self._ended.clear()
        super().close()

    # --- one request at a time --------------------------------------------------------------------------------

    @property
    def has_unfinished(self) -> bool:
        return bool(self._ended) or self._loaded().has_unfinished

    def add_request(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        arrival_s: float | None = None,
        is_watched: bool = True,
        on_step: OnStep | None = None,
    ) -> int:
        """Queue one request; its number. A request that cannot run comes back from `step` with an error.

        `on_step`, called after each step of a watched request in the thread that computes, hears of it instead of
        `step`'s caller. While a watched request decodes, new prompts are computed in small parts, so that its tokens
        keep coming; without one, in parts as large as `max_tokens_per_step`, which takes a little less time in all.
        """
        self._loaded()
        text.check_prompt(prompt, "prompt")
        return self._add(prompt, sampling, is_watched, arrival_s=arrival_s, on_step=on_step).id

    def add_scored(self, prompt: Prompt, on_step: OnStep) -> int:
        """Queue a prompt whose tokens, from the second on, are scored after those before them; its number.

        `on_step` is called once, with a sequence whose `target_scores[0]` holds a row for each of them. ValueError for
        a prompt that cannot be scored.
        """
        with self._lock:
            core, ids = self._loaded(), text.encode(self.tokenizer, prompt)
            (sequence,) = score_sequences({0: (ids[:1], ids[1:])}, self.config.vocab_size, first=self._num_scored)
            refusal = core.refusal(sequence)
            if refusal is not None:
                raise ValueError(refusal)
            self._num_scored += 1
            self._subscribers[sequence.id] = on_step
            core.add(sequence)
        return sequence.id

    def step(self) -> list[RequestOutput]:
        """Compute one step; the requests that ended with it."""
        self._advance()
        with self._lock:
            ended, self._ended = self._ended, []
        return ended

    def cancel(self, request: int) -> RequestOutput | None:
        """End a request now; what it has written so far, or None when it is not running."""
        with self._lock:
            core = self._loaded()
            sequence = core.sequences.get(request)
            if sequence is None:
                return None
            core.finish(sequence, "cancelled")
            output, on_step = self._output(sequence), self._subscribers.pop(request, None)
            if on_step is not None:  # whoever waits for it is told, too
                on_step(sequence)
            return output

    # --- many requests ----------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompts,
        sampling: Sampling = None,
        *,
        on_progress: Progress | None = None,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Answer every prompt; outputs in input order. A prompt that cannot run ends with an error, alone.

        `on_output` hears of each answer as it ends.
        """
        done: dict[int, RequestOutput] = {}

        def keep(place: int, sequence: Sequence) -> None:
            if sequence.is_finished:
                done[place] = self._output(sequence)
                done[place].index = place
                if on_output is not None:
                    on_output(done[place])

        order = self._add_all(prompts, sampling, keep, is_watched=False)
        try:
            while len(done) < len(order):
                self._advance()
                if on_progress is not None:
                    on_progress(len(done), len(order))
        except ReplicasLost as error:
            error.outputs = [done[place] for place in sorted(done)]
            raise
        finally:
            self._cancel_rest(order)
        return [done[place] for place in range(len(order))]

    def stream(self, prompts: Prompts, sampling: Sampling = None) -> Iterator[text.StreamEvent]:
        """Tokens as they are made; a reader that takes its time does not hold the engine up.

        Text is held back while it could still be part of a stop string. The pieces of a request joined are its text.
        """
        self._loaded()
        return self._stream(prompts, sampling)

    def _stream(self, prompts: Prompts, sampling: Sampling) -> Iterator[text.StreamEvent]:
        stream = text.TokenStream(self.text_of)
        order = self._add_all(prompts, sampling, stream.on_step, is_watched=True)
        try:
            yield from stream.read(order, self._advance)
        finally:
            self._cancel_rest(order)

    def score(
        self, pairs: Seq[tuple[Prompt, Prompt]], *, on_progress: Progress | None = None, on_score: OnScore | None = None
    ) -> list[Score]:
        """Log-probability of each continuation after its context, natural logarithm, softmax in float32.

        Two texts are encoded together, as lm-eval does. Pairs with the same tokens before the last one share a single
        pass. ValueError when a pair cannot be scored; one that fails while it is computed, or whose text cannot be
        encoded, has NaN and an error, alone. `on_score` hears of each pair as it is done.
        """
        core, scores = self._loaded(), dict[int, Score]()

        def keep(number: int, score: Score) -> None:
            scores[number] = score
            if on_score is not None:
                on_score(number, score)

        def on_step(sequence: Sequence) -> None:
            for number, score in scores_of(sequence):
                keep(number, score)

        ids: dict[int, tuple[list[int], list[int]]] = {}
        for number, pair in enumerate(pairs):
            if isinstance(pair, (str, bytes)) or not hasattr(pair, "__len__") or len(pair) != 2:
                raise ValueError(f"pair {number}: expected (context, continuation), got {pair!r:.80}")
            for part in pair:
                text.check_prompt(part, f"pair {number}")
            try:
                ids[number] = text.encode_pair(self.tokenizer, *pair)
            except text.NotEncodable as error:
                keep(number, Score(math.nan, False, str(error)))
        with self._lock:
            sequences = score_sequences(ids, self.config.vocab_size, first=self._num_scored)
            for sequence in sequences:
                refusal = core.refusal(sequence)
                if refusal is not None:
                    raise ValueError(f"pair {sequence.targets[0].pair}: {refusal}")
            self._num_scored += len(sequences)
            for sequence in sequences:
                self._subscribers[sequence.id] = on_step
                core.add(sequence)
        try:
            while len(scores) < len(pairs):
                self._advance()
                if on_progress is not None:
                    on_progress(len(scores), len(pairs))
        finally:
            self._cancel_rest(sequences)
        return [scores[number] for number in range(len(pairs))]

    def infer(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, max_new_tokens: int = 128
    ) -> np.ndarray:
        """Array in, array out: greedy answers [B, longest answer] int64 for prompts [B, T] padded on either side.

        Only new tokens are returned, filled up with the pad id (or the end id when there is none).
        """
        input_ids = np.atleast_2d(np.asarray(input_ids))
        mask = np.ones_like(input_ids) if attention_mask is None else np.atleast_2d(np.asarray(attention_mask))
        if mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask {mask.shape} and input_ids {input_ids.shape} must have one shape")
        prompts = [row[keep.astype(bool)].tolist() for row, keep in zip(input_ids, mask, strict=True)]
        outputs = self.generate(prompts, SamplingParams(max_new_tokens=max_new_tokens))
        failed = [output for output in outputs if output.finish_reason == "error"]
        if failed:
            raise ValueError(f"row {failed[0].index}: {failed[0].error}")
        ids = (self.tokenizer.pad_token_id, self.config.pad_token_id, *self.config.eos_token_ids)
        pad_id = next((number for number in ids if number is not None), 0)
        result = np.full((len(outputs), max(len(o.token_ids) for o in outputs)), pad_id, dtype=np.int64)
        for row, output in zip(result, outputs, strict=True):
            row[: len(output.token_ids)] = output.token_ids
        return result

    def render_chat(self, messages: str | text.Messages, *, thinking: bool | None = None) -> str:
        """One text of a user, or a conversation, in the model's chat template; see `text.render_chat`."""
        self._loaded()
        return text.render_chat(self.tokenizer, messages, thinking=thinking)

    # --- inside -----------------------------------------------------------------------------------------------

    def _add_all(
        self, prompts: Prompts, sampling: Sampling, on_step: Callable[[int, Sequence], None], *, is_watched: bool
    ) -> list[Sequence]:
        """Queue all prompts; `on_step` hears of each by its place in the list."""
        self._loaded()
        every = text.as_list(prompts)
        for place, prompt in enumerate(every):
            text.check_prompt(prompt, f"prompt {place}")
        settings = [sampling] * len(every) if sampling is None or isinstance(sampling, SamplingParams) else sampling
        if len(settings) != len(every):
            raise ValueError(f"{len(settings)} sampling settings for {len(every)} prompts; give one, or one each")
        with self._lock:
            return [
                self._add(prompt, setting, is_watched, on_step=partial(on_step, place))
                for place, (prompt, setting) in enumerate(zip(every, settings, strict=True))
            ]

    def _add(
        self,
        prompt: Any,
        sampling: SamplingParams | None,
        is_watched: bool,
        *,
        arrival_s: float | None = None,
        on_step: OnStep | None = None,
    ) -> Sequence:
        refusal = None
        try:
            ids = text.encode(self.tokenizer, prompt)
        except text.NotEncodable as error:
            ids, refusal = [], str(error)
        with self._lock:
            core, number = self._loaded(), self._num_requests
            self._num_requests += 1
            sequence = Sequence(
                ids,
                self._resolved(sampling or SamplingParams(), number),
                request_id=number,
                arrival_s=time.perf_counter() if arrival_s is None else arrival_s,
                is_watched=is_watched,
            )
            if on_step is not None:
                self._subscribers[number] = on_step
                if is_watched:
                    self._stop.keep_text(sequence)
            refusal = refusal or core.refusal(sequence)
            if refusal is None:
                core.add(sequence)
            else:
                sequence.end("error", refusal)
                self._tell(sequence)
        return sequence

    def _resolved(self, sampling: SamplingParams, number: int) -> SamplingParams:
        """With a seed of its own for a request that brings none, and stop strings that never show as stop ids."""
        if sampling.temperature > 0 and sampling.seed is None:
            sampling = replace(sampling, seed=mix(self.settings.seed, number))
        return text.stop_on_special_tokens(self.tokenizer, sampling)

    def _cancel_rest(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            if not sequence.is_finished and self.core is not None:
                self.cancel(sequence.id)

    def _advance(self) -> None:
        """Compute one step and tell everybody concerned."""
        with self._lock:
            for sequence in self._loaded().step(self._stop):
                self._tell(sequence)

    def _tell(self, sequence: Sequence) -> None:
        on_step = self._subscribers.get(sequence.id)
        if sequence.is_finished:
            self._subscribers.pop(sequence.id, None)
        if on_step is not None:
            on_step(sequence)
        elif sequence.is_finished:
            self._ended.append(self._output(sequence))

    def _output(self, sequence: Sequence) -> RequestOutput:
        return RequestOutput(
            index=sequence.id,
            prompt_token_ids=sequence.prompt_ids,
            token_ids=sequence.output_ids,
            text=self._stop.final_text(sequence),
            finish_reason=sequence.finish_reason or "",
            error=sequence.error,
            logprobs=sequence.logprobs if sequence.sampling.logprobs is not None else None,
            timeline=sequence.timeline,
            num_cached_tokens=sequence.num_cached_tokens,
            num_preemptions=sequence.num_preemptions,
        )

    def text_of(self, sequence: Sequence) -> str:
        """The text of a watched request so far; the whole once it has ended, after which nothing is kept of it."""
        return self._stop.final_text(sequence) if sequence.is_finished else self._stop.text_so_far(sequence)
