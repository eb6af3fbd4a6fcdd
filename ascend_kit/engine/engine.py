"""AscendInferEngine: text or token ids in, answers, scores or arrays out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ascend_kit.checkpoint.manifest import verify
from ascend_kit.device.device import Device, select_device
from ascend_kit.device.parallel import check_division
from ascend_kit.engine.core import DTYPES, EngineCore
from ascend_kit.engine.dispatch import ReplicasLost
from ascend_kit.engine.ranks import Ranks, environment_ranks
from ascend_kit.engine.replica_plan import ReplicaPlan
from ascend_kit.engine.sequence import RequestOutput, SamplingParams, Score, ScoreTarget, Sequence
from ascend_kit.engine.stopping import StopRules
from ascend_kit.model.config import ModelConfig
from ascend_kit.params import PRECISIONS, Experiment

Prompt = str | list[int]
Progress = Callable[[int, int], None]


class StreamEvent(NamedTuple):
    """One new token of one request; `finish_reason` is set on its last event, which may carry no token."""

    index: int
    token_id: int | None
    text: str
    finish_reason: str | None


class PairsFailed(RuntimeError):
    """Some pairs could not be scored; `scores` holds the others, with None in the failed places."""

    def __init__(self, errors: dict[int, str], scores: list[Score | None]):
        first = min(errors)
        super().__init__(f"{len(errors)} of {len(scores)} pairs failed; pair {first}: {errors[first]}")
        self.errors, self.scores = errors, scores


class AscendInferEngine:
    """Runs one model with continuous batching over a paged KV cache.

    `cards` devices hold cards / `tensor_parallel` copies of it, each split over `tensor_parallel` devices. Several
    cards are processes on this machine, or on those of the Ray cluster at `ray_address` ("auto" or host:port).

    Lengths are in tokens. `batch_size` is how many requests are computed together; more may be waiting.
    `graph_mode` captures or compiles the decode step, `operator_fusion` picks the device's fused operators,
    `memory_optimize` takes KV blocks on demand and shares equal prefixes.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        tokenizer_path: str | Path | None = None,
        precision: str = "bf16",
        device: str = "auto",
        device_id: int = 0,
        max_seq_length: int = 8192,
        batch_size: int = 16,
        graph_mode: bool = False,
        operator_fusion: bool = True,
        memory_optimize: bool = True,
        block_size: int | None = None,
        max_tokens_per_step: int = 2048,
        kv_cache_gib: float | None = None,
        seed: int = 0,
        cards: int = 1,
        tensor_parallel: int = 1,
        ray_address: str | None = None,
        check_all_bytes: bool = False,
    ):
        if precision.lower() not in PRECISIONS:
            raise ValueError(f"precision={precision!r}; allowed: {', '.join(PRECISIONS)}")
        self.model_path, self.tokenizer_path = str(model_path), str(tokenizer_path or model_path)
        self.config = ModelConfig.from_folder(model_path)
        if max_seq_length > self.config.max_position_embeddings:
            raise ValueError(
                f"max_seq_length={max_seq_length} is above the model's max_position_embeddings="
                f"{self.config.max_position_embeddings}"
            )
        self.precision, self.max_seq_length, self.batch_size = PRECISIONS[precision.lower()], max_seq_length, batch_size
        self.seed = seed
        self._ranks = environment_ranks()
        self.cards, self.tensor_parallel = _checked_cards(cards, tensor_parallel, self._ranks, self.config)
        self.ray_address = ray_address
        self.check_all_bytes = check_all_bytes
        self._device_name, self._device_id = device, device_id
        self._settings = {
            "graph_mode": graph_mode,
            "operator_fusion": operator_fusion,
            "memory_optimize": memory_optimize,
            "block_size": block_size,
            "max_tokens_per_step": max_tokens_per_step,
            "kv_cache_gib": kv_cache_gib,
        }
        self.core: EngineCore | None = None  # or a core with the same methods that drives other processes
        self.device: Device | None = None
        self.tokenizer: Any = None
        self._stop = StopRules(lambda: self.tokenizer, self.config.eos_token_ids, max_seq_length)
        self._refused: list[RequestOutput] = []
        self._num_requests = 0

    @classmethod
    def from_experiment(cls, experiment: Experiment, model_path: str | Path | None = None) -> AscendInferEngine:
        """An engine as the parameters describe it, on the converted checkpoint or the source."""
        if model_path is None:
            converted = experiment.use_model == "converted"
            model_path = experiment.converted_folder if converted else experiment.input_model
        names = (
            "precision",
            "device",
            "device_id",
            "max_seq_length",
            "batch_size",
            "graph_mode",
            "operator_fusion",
            "memory_optimize",
            "block_size",
            "max_tokens_per_step",
            "kv_cache_gib",
            "seed",
            "cards",
            "tensor_parallel",
            "ray_address",
        )
        return cls(
            model_path, tokenizer_path=experiment.tokenizer_path, **{name: getattr(experiment, name) for name in names}
        )

    # --- life -------------------------------------------------------------------------------------------------

    def load_model(self) -> AscendInferEngine:
        """Read the tokenizer and the weights; does nothing when they are loaded.

        A converted folder must still be as its manifest says (CheckpointError names the file): sizes and headers, with
        `check_all_bytes` every byte.
        """
        if self.core is not None:
            return self
        verify(self.model_path, full=self.check_all_bytes)
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_path)
        self.core = self._open_core()
        self.device = self.core.device
        return self

    def _open_core(self) -> Any:
        """One card in this process, the ranks this process was started with, or replicas on Ray."""
        settings = {
            "precision": self.precision,
            "max_seq_length": self.max_seq_length,
            "batch_size": self.batch_size,
            **self._settings,
        }
        if self._ranks is None and self.cards == 1 and self.ray_address is None:
            device = select_device(self._device_name, self._device_id)
            device.seed(self.seed)
            return EngineCore(self.model_path, self.config, device, **settings)
        plan = ReplicaPlan(
            self.model_path,
            self.tokenizer_path,
            self._device_name,
            self.seed,
            settings,
            replicas=self.cards // self.tensor_parallel,
            tensor_parallel=self.tensor_parallel,
        )
        if self._ranks is not None:
            from ascend_kit.engine.rank_core import RankCore

            return RankCore(plan, self._ranks)
        from ascend_kit.engine.cluster import ClusterCore

        return ClusterCore(plan, self.ray_address, first_card=self._device_id)

    def close(self) -> None:
        """Free weights and cache, and end the processes that hold them."""
        core, self.core = self.core, None
        self._stop.clear()
        if core is not None:
            core.close()

    def __enter__(self) -> AscendInferEngine:
        return self.load_model()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_replicas(self) -> int:
        """Copies of the model, each with its own slots and KV cache."""
        return self.cards // self.tensor_parallel

    @property
    def dtype(self) -> Any:
        """torch dtype of activations and KV cache."""
        return DTYPES[self.precision]

    def stats(self) -> dict[str, Any]:
        """Counters and sizes since load; see EngineCore.stats."""
        return self._loaded().stats()

    # --- one request at a time --------------------------------------------------------------------------------

    @property
    def has_unfinished(self) -> bool:
        return bool(self._refused) or self._loaded().has_unfinished

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
        core, sampling = self._loaded(), sampling or SamplingParams()
        sequence = Sequence(
            self._encode(prompt),
            sampling,
            index=self._num_requests,
            arrival_s=time.perf_counter() if arrival_s is None else arrival_s,
            is_watched=is_watched,
        )
        self._num_requests += 1
        refusal = core.refusal(sequence, self.max_seq_length)
        if refusal is not None:
            sequence.finish_reason, sequence.error = "error", refusal
            sequence.timeline.finished_s = time.perf_counter()
            self._refused.append(self._output(sequence))
        else:
            core.add(sequence)
        return sequence.id

    def step(self) -> list[RequestOutput]:
        """Compute one step; the requests that ended with it."""
        return [self._output(sequence) for sequence in self._advance() if sequence.is_finished] + self._take_refused()

    def cancel(self, request: int) -> RequestOutput | None:
        """End a request now; what it has written so far, or None when it is not running."""
        sequence = self._loaded().sequences.get(request)
        if sequence is None:
            return None
        self._loaded().finish(sequence, "cancelled")
        return self._output(sequence)

    # --- many requests ----------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: list[str] | list[list[int]],
        sampling: SamplingParams | list[SamplingParams] | None = None,
        *,
        on_progress: Progress | None = None,
    ) -> list[RequestOutput]:
        """Answer every prompt; outputs in input order. A prompt that cannot run ends with an error, alone."""
        order = self._add_all(prompts, sampling)
        done: dict[int, RequestOutput] = {}
        try:
            while len(done) < len(order):
                done.update((output.index, output) for output in self.step() if output.index in order)
                if on_progress is not None:
                    on_progress(len(done), len(order))
        except ReplicasLost as error:
            error.outputs = [self._renumbered(done[r], place) for place, r in enumerate(order) if r in done]
            raise
        finally:
            for request in set(order) - set(done):
                self.cancel(request)
        return [self._renumbered(done[request], place) for place, request in enumerate(order)]

    def stream(
        self,
        prompts: Prompt | list[str] | list[list[int]],
        sampling: SamplingParams | list[SamplingParams] | None = None,
    ) -> Iterator[StreamEvent]:
        """Tokens as they are made. Text is held back while it could still be part of a stop string."""
        single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        order = self._add_all([prompts] if single else prompts, sampling, streaming=True)
        place = {request: number for number, request in enumerate(order)}
        sent = dict.fromkeys(order, 0)
        try:
            while place:
                for output in self._take_refused():
                    yield StreamEvent(place.pop(output.index), None, "", "error")
                for sequence in self._advance():
                    if sequence.id in place:
                        yield self._event(sequence, place, sent)
        finally:
            for request in list(place):
                self.cancel(request)

    def score(self, pairs: list[tuple[Prompt, Prompt]], *, on_progress: Progress | None = None) -> list[Score]:
        """Log-probability of each continuation after its context, natural logarithm, softmax in float32.

        Pairs with the same tokens before the last one share a single pass. ValueError when a pair cannot be scored;
        PairsFailed, after all others are scored, when a pair brought down the replicas that tried it.
        """
        core = self._loaded()
        sequences = self._score_sequences(pairs)
        for sequence in sequences:
            refusal = core.refusal(sequence, self.max_seq_length)
            if refusal is not None:
                raise ValueError(f"pair {sequence.targets[0].pair}: {refusal}")
        for sequence in sequences:
            core.add(sequence)
        results: dict[int, Score | None] = {}
        errors: dict[int, str] = {}
        try:
            while len(results) < len(pairs):
                for sequence in self._advance():
                    if sequence.error is not None:
                        errors.update((target.pair, sequence.error) for target in sequence.targets)
                    results.update(_scores(sequence))
                if on_progress is not None:
                    on_progress(len(results), len(pairs))
        finally:
            for sequence in sequences:
                if not sequence.is_finished:
                    core.finish(sequence, "cancelled")
        scores = [results[number] for number in range(len(pairs))]
        if errors:
            raise PairsFailed(errors, scores)
        return scores

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
        self, prompts: list, sampling: SamplingParams | list[SamplingParams] | None, streaming: bool = False
    ) -> list[int]:
        if isinstance(sampling, list) and len(sampling) != len(prompts):
            raise ValueError(f"{len(sampling)} sampling settings for {len(prompts)} prompts; give one, or one each")
        settings = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
        order = [
            self.add_request(prompt, setting, is_watched=streaming)
            for prompt, setting in zip(prompts, settings, strict=True)
        ]
        for request in order if streaming else ():
            sequence = self._loaded().sequences.get(request)
            if sequence is not None:
                self._stop.follow(sequence)
        return order

    def _advance(self) -> list[Sequence]:
        return self._loaded().step(self._stop)

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

    def _take_refused(self) -> list[RequestOutput]:
        refused, self._refused = self._refused, []
        return refused

    def _event(self, sequence: Sequence, place: dict[int, int], sent: dict[int, int]) -> StreamEvent:
        if sequence.is_finished:
            text = self._output(sequence).text
            number = place.pop(sequence.id)
        else:
            # A stop string may still be completed by the next token: hold its longest possible start back.
            held = max((len(word) - 1 for word in sequence.sampling.stop), default=0)
            text, number = self._stop.text_so_far(sequence), place[sequence.id]
            text = text[: max(0, len(text) - held)]
        piece, sent[sequence.id] = text[sent[sequence.id] :], max(len(text), sent[sequence.id])
        return StreamEvent(number, sequence.token_ids[-1], piece, sequence.finish_reason)

    def _score_sequences(self, pairs: list[tuple[Prompt, Prompt]]) -> list[Sequence]:
        groups: dict[tuple[int, ...], list[ScoreTarget]] = {}
        for number, (context, continuation) in enumerate(pairs):
            context_ids, ids = self._encode(context), self._encode(continuation)
            if not context_ids or not ids:
                raise ValueError(
                    f"pair {number}: context and continuation need at least one token each, got "
                    f"{len(context_ids)} and {len(ids)}"
                )
            bad = next((t for t in ids if not 0 <= t < self.config.vocab_size), None)
            if bad is not None:
                raise ValueError(f"pair {number}: token id {bad} is outside 0 to {self.config.vocab_size - 1}")
            groups.setdefault(tuple(context_ids + ids[:-1]), []).append(ScoreTarget(number, tuple(ids)))
        now = time.perf_counter()
        # Sorted, so that inputs with a long common prefix run next to each other and share its blocks.
        return [
            Sequence(ids, SamplingParams(), arrival_s=now, index=-1 - number, targets=groups[ids])
            for number, ids in enumerate(sorted(groups))
        ]

    def _pad_id(self) -> int:
        for value in (self.tokenizer.pad_token_id, self.config.pad_token_id, *self.config.eos_token_ids):
            if value is not None:
                return value
        return 0

    @staticmethod
    def _renumbered(output: RequestOutput, place: int) -> RequestOutput:
        output.index = place
        return output


def _checked_cards(cards: int, tensor_parallel: int, ranks: Ranks | None, config: ModelConfig) -> tuple[int, int]:
    """Both numbers when they can work; ranks of the environment stand for the cards when none were asked for."""
    if ranks is not None and cards not in (1, ranks.size):
        raise ValueError(
            f"cards={cards}, but this process was started as one of {ranks.size} ranks; leave cards out, "
            f"or start {cards} ranks"
        )
    cards = ranks.size if ranks is not None else cards
    if cards < 1 or tensor_parallel < 1 or cards % tensor_parallel:
        allowed = [n for n in range(1, cards + 1) if cards % n == 0]
        raise ValueError(f"tensor_parallel={tensor_parallel} does not divide cards={cards}; allowed: {allowed}")
    check_division(
        tensor_parallel,
        {
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "intermediate_size": config.intermediate_size,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
        },
    )
    return cards, tensor_parallel


def _scores(sequence: Sequence) -> dict[int, Score | None]:
    if sequence.error is not None:
        return dict.fromkeys(target.pair for target in sequence.targets)
    return {
        target.pair: Score(sum(logprob for logprob, _ in rows), all(greedy for _, greedy in rows))
        for target, rows in zip(sequence.targets, sequence.target_scores, strict=True)
    }
