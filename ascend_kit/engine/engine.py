"""AscendInferEngine: text or token ids in, answers, scores or arrays out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ascend_kit.checkpoint.identity import model_identity
from ascend_kit.checkpoint.manifest import verify
from ascend_kit.device.device import Device, select_device
from ascend_kit.device.parallel import check_division
from ascend_kit.engine.config import EngineConfig
from ascend_kit.engine.core import EngineCore
from ascend_kit.engine.dispatch import ReplicasLost
from ascend_kit.engine.ranks import Ranks, environment_ranks
from ascend_kit.engine.scoring import ScoreSheet, score_sequences
from ascend_kit.engine.sequence import RequestOutput, SamplingParams, Score, Sequence
from ascend_kit.engine.stopping import StopRules
from ascend_kit.engine.streaming import StreamEvent, TokenStream
from ascend_kit.identity import Identity
from ascend_kit.model.config import ModelConfig
from ascend_kit.params import Experiment

Prompt = str | list[int]
Progress = Callable[[int, int], None]
Follower = Callable[[Sequence], None]  # called after each step that touched the request


class AscendInferEngine:
    """Runs one model with continuous batching over a paged KV cache. Its parameters are those of EngineConfig."""

    def __init__(self, model_path: str | Path, **names: Any):
        self._open(EngineConfig.from_names(model_path, names))

    @classmethod
    def from_experiment(cls, experiment: Experiment, model_path: str | Path | None = None) -> AscendInferEngine:
        """An engine as the parameters describe it, on the converted checkpoint or the source."""
        engine = cls.__new__(cls)
        engine._open(EngineConfig.from_experiment(experiment, model_path))
        return engine

    def _open(self, settings: EngineConfig) -> None:
        """Everything that needs no device: the model's config must be there and fit."""
        self.model_path, self.max_seq_length = settings.model_path, settings.max_seq_length
        self.config = ModelConfig.from_folder(settings.model_path)
        if settings.max_seq_length > self.config.max_position_embeddings:
            raise ValueError(
                f"max_seq_length={settings.max_seq_length} is above the model's max_position_embeddings="
                f"{self.config.max_position_embeddings}"
            )
        self._ranks = environment_ranks()
        self.settings = _on_ranks(settings, self._ranks)
        check_division(
            settings.tensor_parallel,
            {
                "num_attention_heads": self.config.num_heads,
                "num_key_value_heads": self.config.num_kv_heads,
                "intermediate_size": self.config.intermediate_size,
                "vocab_size": self.config.vocab_size,
                "hidden_size": self.config.hidden_size,
            },
        )
        self.core: EngineCore | None = None  # or a core with the same methods that drives other processes
        self.device: Device | None = None
        self.tokenizer: Any = None
        self._stop = StopRules(lambda: self.tokenizer, self.config.eos_token_ids, settings.max_seq_length)
        # Streams advance the engine from threads of their own. Whoever advances it hands each request's news to its
        # follower; what nobody follows waits for `step`.
        self._lock = threading.RLock()
        self._followers: dict[int, Follower] = {}
        self._ended: list[RequestOutput] = []
        self._num_requests = 0
        self._num_scored = 0

    # --- life -------------------------------------------------------------------------------------------------

    def load_model(self) -> AscendInferEngine:
        """Read the tokenizer and the weights; does nothing when they are loaded.

        A converted folder must still be as its manifest says (CheckpointError names the file): sizes and headers, with
        `check_all_bytes` every byte.
        """
        if self.core is not None:
            return self
        verify(self.model_path, full=self.settings.check_all_bytes)
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(self.settings.tokenizer_folder)
        self.core = self._open_core()
        self.device = self.core.device
        return self

    def _open_core(self) -> Any:
        """One card in this process, the ranks this process was started with, or replicas on Ray."""
        settings = self.settings
        if self._ranks is not None:
            from ascend_kit.engine.rank_core import RankCore

            return RankCore(settings, self._ranks)
        if settings.cards > 1 or settings.ray_address is not None:
            from ascend_kit.engine.cluster import ClusterCore

            return ClusterCore(settings)
        device = select_device(settings.device, settings.device_id)
        device.seed(settings.seed)
        return EngineCore(settings, self.config, device)

    def close(self) -> None:
        """Free weights and cache, and end the processes that hold them."""
        core, self.core = self.core, None
        self._stop.clear()
        self._followers.clear()
        if core is not None:
            core.close()

    def __enter__(self) -> AscendInferEngine:
        return self.load_model()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def identity(self) -> Identity:
        """What the answers and speeds of this engine depend on; known before it is loaded."""
        device = self.device or select_device(self.settings.device, self.settings.device_id)
        model = model_identity(self.model_path, self.settings.tokenizer_path)
        return model.with_parts(engine=self.settings.identity(), versions=device.versions(), device=device.facts())

    @property
    def num_replicas(self) -> int:
        """Copies of the model, each with its own slots and KV cache."""
        return self.settings.replicas

    def stats(self) -> dict[str, Any]:
        """Counters and sizes since load; see EngineCore.stats."""
        return self._loaded().stats()

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
    ) -> int:
        """Queue one request; its number. A request that cannot run comes back from `step` with an error.

        While a watched request decodes, new prompts are computed in small parts, so that its tokens keep coming;
        without one, in parts as large as `max_tokens_per_step`, which takes a little less time in all.
        """
        return self._add(prompt, sampling, arrival_s, is_watched).id

    def step(self) -> list[RequestOutput]:
        """Compute one step; the requests that ended with it."""
        self._advance()
        with self._lock:
            ended, self._ended = self._ended, []
        return ended

    def cancel(self, request: int) -> RequestOutput | None:
        """End a request now; what it has written so far, or None when it is not running."""
        with self._lock:
            sequence = self._loaded().sequences.get(request)
            if sequence is None:
                return None
            self._loaded().finish(sequence, "cancelled")
            output, follower = self._output(sequence), self._followers.pop(request, None)
            if follower is not None:  # whoever waits for it is told, too
                follower(sequence)
            return output

    # --- many requests ----------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: list[str] | list[list[int]],
        sampling: SamplingParams | list[SamplingParams] | None = None,
        *,
        on_progress: Progress | None = None,
    ) -> list[RequestOutput]:
        """Answer every prompt; outputs in input order. A prompt that cannot run ends with an error, alone."""
        done: dict[int, RequestOutput] = {}

        def keep(place: int, sequence: Sequence) -> None:
            if sequence.is_finished:
                done[place] = self._output(sequence)
                done[place].index = place

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
            for place, sequence in enumerate(order):
                if place not in done:
                    self.cancel(sequence.id)
        return [done[place] for place in range(len(order))]

    def stream(
        self,
        prompts: Prompt | list[str] | list[list[int]],
        sampling: SamplingParams | list[SamplingParams] | None = None,
    ) -> Iterator[StreamEvent]:
        """Tokens as they are made; a reader that takes its time does not hold the engine up.

        Text is held back while it could still be part of a stop string.
        """
        single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        stream = TokenStream(self._text_of)
        order = self._add_all([prompts] if single else prompts, sampling, stream.follow, is_watched=True)
        try:
            yield from stream.read(order, self._advance)
        finally:
            for sequence in order:
                if not sequence.is_finished:
                    self.cancel(sequence.id)

    def score(self, pairs: list[tuple[Prompt, Prompt]], *, on_progress: Progress | None = None) -> list[Score]:
        """Log-probability of each continuation after its context, natural logarithm, softmax in float32.

        Pairs with the same tokens before the last one share a single pass. ValueError when a pair cannot be scored;
        PairsFailed, after all others are scored, when a pair brought down the replicas that tried it.
        """
        core, sheet = self._loaded(), ScoreSheet(len(pairs))
        ids = [(self._encode(context), self._encode(continuation)) for context, continuation in pairs]
        with self._lock:
            sequences = score_sequences(ids, self.config.vocab_size, first=self._num_scored)
            for sequence in sequences:
                refusal = core.refusal(sequence)
                if refusal is not None:
                    raise ValueError(f"pair {sequence.targets[0].pair}: {refusal}")
            self._num_scored += len(sequences)
            for sequence in sequences:
                self._followers[sequence.id] = sheet.note
                core.add(sequence)
        try:
            while len(sheet) < len(pairs):
                self._advance()
                if on_progress is not None:
                    on_progress(len(sheet), len(pairs))
        finally:
            with self._lock:
                for sequence in sequences:
                    self._followers.pop(sequence.id, None)
                    if not sequence.is_finished:
                        core.finish(sequence, "cancelled")
        return sheet.result()

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
        result = np.full((len(outputs), max(len(o.token_ids) for o in outputs)), self._pad_id(), dtype=np.int64)
        for row, output in zip(result, outputs, strict=True):
            row[: len(output.token_ids)] = output.token_ids
        return result

    # --- inside -----------------------------------------------------------------------------------------------

    def _loaded(self) -> EngineCore:
        if self.core is None:
            raise RuntimeError("the model is not loaded: call load_model() or use the engine in a with statement")
        return self.core

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _add_all(
        self,
        prompts: list,
        sampling: SamplingParams | list[SamplingParams] | None,
        follow: Callable[[int, Sequence], None],
        *,
        is_watched: bool,
    ) -> list[Sequence]:
        """Queue all prompts; `follow` hears of each by its place in the list."""
        if isinstance(sampling, list) and len(sampling) != len(prompts):
            raise ValueError(f"{len(sampling)} sampling settings for {len(prompts)} prompts; give one, or one each")
        settings = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
        encoded = [self._encode(prompt) for prompt in prompts]
        with self._lock:
            return [
                self._add(ids, setting, None, is_watched, partial(follow, place))
                for place, (ids, setting) in enumerate(zip(encoded, settings, strict=True))
            ]

    def _add(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None,
        arrival_s: float | None,
        is_watched: bool,
        follower: Follower | None = None,
    ) -> Sequence:
        core, ids = self._loaded(), self._encode(prompt)
        with self._lock:
            sequence = Sequence(
                ids,
                sampling or SamplingParams(),
                index=self._num_requests,
                arrival_s=time.perf_counter() if arrival_s is None else arrival_s,
                is_watched=is_watched,
            )
            self._num_requests += 1
            if follower is not None:
                self._followers[sequence.id] = follower
                if is_watched:
                    self._stop.follow(sequence)
            refusal = core.refusal(sequence)
            if refusal is None:
                core.add(sequence)
            else:
                sequence.finish_reason, sequence.error = "error", refusal
                sequence.timeline.finished_s = time.perf_counter()
                self._tell(sequence)
        return sequence

    def _advance(self) -> None:
        """Compute one step and tell everybody concerned."""
        with self._lock:
            for sequence in self._loaded().step(self._stop):
                self._tell(sequence)

    def _tell(self, sequence: Sequence) -> None:
        follower = self._followers.get(sequence.id)
        if sequence.is_finished:
            self._followers.pop(sequence.id, None)
        if follower is not None:
            follower(sequence)
        elif sequence.is_finished:
            self._ended.append(self._output(sequence))

    def _output(self, sequence: Sequence) -> RequestOutput:
        detokenizer = self._stop.forget(sequence.id)
        if detokenizer is None:
            text = self.tokenizer.decode(sequence.output_ids, skip_special_tokens=True)
        else:
            if not detokenizer.is_cut:
                detokenizer.find_stop(detokenizer.finish())
            text = detokenizer.text
        return RequestOutput(
            index=sequence.id,
            prompt_token_ids=sequence.token_ids[: sequence.num_prompt_tokens],
            token_ids=sequence.output_ids,
            text=text,
            finish_reason=sequence.finish_reason,
            error=sequence.error,
            logprobs=sequence.logprobs if sequence.sampling.logprobs is not None else None,
            timeline=sequence.timeline,
            num_cached_tokens=sequence.num_cached_tokens,
            num_preemptions=sequence.num_preemptions,
        )

    def _text_of(self, sequence: Sequence) -> str:
        return self._output(sequence).text if sequence.is_finished else self._stop.text_so_far(sequence)

    def _pad_id(self) -> int:
        for value in (self.tokenizer.pad_token_id, self.config.pad_token_id, *self.config.eos_token_ids):
            if value is not None:
                return value
        return 0


def _on_ranks(settings: EngineConfig, ranks: Ranks | None) -> EngineConfig:
    """The settings with the ranks this process was started with as cards, when none were asked for."""
    if ranks is not None and settings.cards not in (1, ranks.size):
        raise ValueError(
            f"cards={settings.cards}, but this process was started as one of {ranks.size} ranks; leave cards out, "
            f"or start {settings.cards} ranks"
        )
    settings = settings if ranks is None else replace(settings, cards=ranks.size)
    cards, size = settings.cards, settings.tensor_parallel
    if cards % size:
        allowed = [n for n in range(1, cards + 1) if cards % n == 0]
        raise ValueError(f"tensor_parallel={size} does not divide cards={cards}; allowed: {allowed}")
    return settings
