"""AscendInferEngine: text or token ids in, answers, scores or arrays out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ascend_kit.checkpoint.manifest import verify
from ascend_kit.device.device import Device, select_device
from ascend_kit.device.parallel import check_division
from ascend_kit.engine.core import DTYPES, EngineCore
from ascend_kit.engine.dispatch import ReplicasLost
from ascend_kit.engine.ranks import Ranks, environment_ranks
from ascend_kit.engine.replica_plan import ReplicaPlan
from ascend_kit.engine.scoring import ScoreSheet, score_sequences
from ascend_kit.engine.sequence import RequestOutput, SamplingParams, Score, Sequence
from ascend_kit.engine.stopping import StopRules
from ascend_kit.engine.streaming import StreamEvent, TokenStream
from ascend_kit.model.config import ModelConfig
from ascend_kit.params import PRECISIONS, Experiment

Prompt = str | list[int]
Progress = Callable[[int, int], None]
Follower = Callable[[Sequence], None]  # called after each step that touched the request


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
        # Streams advance the engine from threads of their own. Whoever advances it hands each request's news to its
        # follower; what nobody follows waits for `step`.
        self._lock = threading.RLock()
        self._followers: dict[int, Follower] = {}
        self._ended: list[RequestOutput] = []
        self._num_requests = 0
        self._num_scored = 0

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
        self._followers.clear()
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
                refusal = core.refusal(sequence, self.max_seq_length)
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
            refusal = core.refusal(sequence, self.max_seq_length)
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
