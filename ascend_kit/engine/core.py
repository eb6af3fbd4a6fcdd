"""The engine without text: token ids in, token ids out, one step at a time. It knows no tokenizer."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ascend_kit.device.device import Device
from ascend_kit.device.graph_inputs import GraphError
from ascend_kit.device.graphs import GraphHang, memory_reserve, prompt_sizes
from ascend_kit.device.ops import select_ops
from ascend_kit.device.ops.reference import SCALE_BYTES
from ascend_kit.device.parallel import TensorParallel
from ascend_kit.engine.block_manager import BlockManager
from ascend_kit.engine.config import EngineConfig
from ascend_kit.engine.loader import load_decoder
from ascend_kit.engine.profile import Phase, profile_core
from ascend_kit.engine.runner import Launched, ModelRunner
from ascend_kit.engine.sampler import NOT_FINITE
from ascend_kit.engine.scheduler import Pending, Scheduler, StepPace, StepPlan
from ascend_kit.engine.sequence import LOGITS_NOT_FINITE, RequestOutput, Sequence
from ascend_kit.files import GIB
from ascend_kit.model.config import DTYPES, ModelConfig

# Share of the memory free beside `reserve_bytes` given to KV blocks when no size is asked for. Device memory is ours
# alone but for fragments; host memory is shared with everything else on the machine.
KV_SHARE = {"cpu": 0.4, "cuda": 0.95, "npu": 0.95}

# By every core, since it was loaded; `decoded_tokens` came of so many `decodes` of a sequence.
COUNTED = (
    "steps", "prompt_tokens", "cached_prompt_tokens", "output_tokens", "decodes", "decoded_tokens", "async_steps",
)  # fmt: skip

StopCheck = Callable[[Sequence, int], str | None]


class ReplicasLost(RuntimeError):
    """No replica is left and none could be started. `outputs` holds what had finished before."""

    def __init__(self, message: str):
        super().__init__(message)
        self.outputs: list[RequestOutput] = []


class Core(Protocol):
    """What the engine drives: one model in this process, or several in others."""

    device: Device
    sequences: dict[int, Sequence]  # unfinished ones, by id

    @property
    def has_unfinished(self) -> bool: ...
    def refusal(self, sequence: Sequence) -> str | None: ...
    def add(self, sequence: Sequence) -> None: ...
    def step(self, should_stop: StopCheck) -> list[Sequence]: ...
    def finish(self, sequence: Sequence, reason: str) -> None: ...
    def stats(self) -> dict[str, Any]: ...
    def profile(self, prompts: list[list[int]], steps: int, folder: str) -> list[Phase]: ...
    def close(self) -> None: ...


class EngineCore:
    """Weights, KV cache and scheduler of one model on one rank."""

    def __init__(
        self,
        settings: EngineConfig,
        config: ModelConfig,
        device: Device,
        *,
        parallel: TensorParallel | None = None,
        ranks_on_host: int = 1,
    ):
        self.settings, self.config, self.device = settings, config, device
        device.seed(settings.seed)
        dtype = DTYPES[settings.precision]
        if settings.kv_cache_dtype == "int8" and device.kind == "npu":
            raise ValueError(
                "kv_cache_dtype: int8 is not available on an NPU: its attention kernel reads int8 keys and values from "
                "a FRACTAL_NZ cache with static scales per channel, and for 10, 64, 80 or 128 query heads over 1, 8, "
                f"8 or 16 KV heads only; this model has {config.num_heads} over {config.num_kv_heads}. Allowed: auto"
            )
        ops = select_ops(device.kind, settings.operator_fusion, settings.plain_ops)
        self.block_size = settings.block_size or device.default_block_size
        kv_dtype = torch.int8 if settings.kv_cache_dtype == "int8" else dtype
        self.decoder = load_decoder(
            settings.model_path,
            config,
            dtype=dtype,
            device=device,
            ops=ops,
            max_positions=settings.max_seq_length,
            parallel=parallel,
            with_kv_scales=kv_dtype == torch.int8,
            int8_head=settings.head_dtype == "int8",
        )
        device.assert_on_device(self.decoder)
        head_bytes = config.head_dim + SCALE_BYTES if kv_dtype == torch.int8 else config.head_dim * dtype.itemsize
        self.block_bytes = 2 * config.num_layers * self.decoder.num_kv_heads * self.block_size * head_bytes
        self.reserve_bytes = memory_reserve(
            device.kind,
            num_heads=config.num_heads // self.decoder.parallel.size,
            widest=max(config.hidden_size, 2 * config.intermediate_size // self.decoder.parallel.size),
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            batch_size=settings.decode_rows,
            step_tokens=settings.max_tokens_per_step,
            graph_mode=settings.graph_mode,
            prompt_sizes=prompt_sizes(settings.graph_prompt_rows, self.block_size) if device.kind == "npu" else (),
            communicates=self.decoder.parallel.size > 1,
        )
        num_blocks = self._pool_size(ranks_on_host)
        if parallel is not None:  # one plan for all ranks: block numbers must exist everywhere
            num_blocks = parallel.smallest(num_blocks)
        self.blocks = BlockManager(
            num_blocks, self.block_size, on_demand=settings.memory_optimize, max_seq_length=settings.max_seq_length
        )
        self.scheduler = Scheduler(
            self.blocks,
            max_sequences=settings.batch_size,
            max_tokens_per_step=settings.max_tokens_per_step,
            speculate=settings.speculate,
            max_rows=settings.decode_rows,
        )
        self.pace = StepPace()
        self.runner = ModelRunner(
            self.decoder, device, ops, num_blocks=num_blocks, block_size=self.block_size, dtype=kv_dtype
        )
        if settings.graph_mode:
            self.runner.enable_graphs(settings.decode_rows, settings.max_seq_length, settings.graph_prompt_rows)
        self.sequences: dict[int, Sequence] = {}
        self.counts = dict.fromkeys(COUNTED, 0)
        self._rounds: deque[tuple[float, list[tuple[Sequence, int]], list[Sequence]]] = deque()
        # The other ranks would need the token first, whichever way they were started.
        self.is_async = settings.why_synchronous(device.kind) is None and self.decoder.parallel.size == 1
        self._flight: Launched | None = None  # a step whose tokens are not read yet
        self._read_s = 0.0  # when tokens were last read

    def _pool_size(self, ranks_on_host: int) -> int:
        """Blocks in the pool: what all slots can use at most, within the memory given or found free; plus block 0."""
        kv_cache_gib = self.settings.kv_cache_gib
        useful = self.settings.batch_size * -(-self.settings.max_seq_length // self.block_size)
        share = KV_SHARE[self.device.kind] / (ranks_on_host if self.device.kind == "cpu" else 1)
        free = self.device.free_memory_bytes() - sum(self.reserve_bytes.values())
        room = kv_cache_gib * GIB if kv_cache_gib else share * free
        affordable = int(room // self.block_bytes)
        if affordable < 1:
            raise ValueError(
                f"kv_cache_gib={kv_cache_gib} does not hold one block of {self.block_size} tokens "
                f"({self.block_bytes / GIB:.4f} GiB); raise it or lower block_size"
            )
        return min(useful, affordable) + 1

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    def refusal(self, sequence: Sequence) -> str | None:
        """Why this request can never run, or None."""
        return why_refused(sequence, self.config.vocab_size, self.blocks, self.settings.max_seq_length)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that `refusal` has passed."""
        self.sequences[sequence.id] = sequence
        self.scheduler.add(sequence)
        self.counts["prompt_tokens"] += sequence.num_prompt_tokens

    def step(self, should_stop: StopCheck) -> list[Sequence]:
        """Run one step; the sequences that got a token or finished scoring, finished ones with a finish_reason.

        Each gets one token at a time: a step whose guesses were right is followed by calls that compute nothing.

        `should_stop(sequence, token)` decides after each token: "stop", "length" or None.
        """
        if not self._rounds:
            try:
                self._compute()
            except GraphHang:
                self._flight = None  # nor will what is queued behind it end: nobody is to wait for that again
                raise
        now, tokens, ended = self._rounds.popleft() if self._rounds else (0.0, [], [])
        touched = [sequence for sequence in ended if sequence.id in self.sequences]
        for sequence in touched:
            self.finish(sequence, "stop", now)
        for sequence, token in tokens:
            if sequence.id not in self.sequences:
                continue  # ended with an earlier token of the same step, or was cancelled
            touched.append(sequence)
            if token == NOT_FINITE:
                self.finish(sequence, "error", now)
                sequence.error = f"after {sequence.num_output_tokens} tokens {LOGITS_NOT_FINITE}"
            else:
                self._append(sequence, token, now, should_stop)
            if sequence.is_finished:
                sequence.logprobs = sequence.logprobs[: sequence.num_output_tokens]
        if not self.has_unfinished:
            self.blocks.check([])  # nothing owned means nothing may be missing
        return touched

    def _compute(self) -> None:
        """Have the tokens of one step; what came of it waits in `_rounds`, a round for every token of a sequence.

        With asynchronous scheduling the next step is queued before the tokens are read. The device computes in order:
        blocks of a request that ended meanwhile may be given away while a step that still has it is under way. After an
        error or an interrupt the same step is followed or planned again, with the same result.
        """
        flight = self._flight
        if flight is not None and all(chunk.owner.is_finished for chunk in flight.plan.chunks):
            flight = self._flight = None
        if flight is None:
            decoding = len(self.scheduler.running)
            least_share = self.pace.least_share(decoding) if self.settings.speculate else 0.0
            plan = self.scheduler.schedule(self.pace.prompt_tokens(), least_share)
            if not plan.chunks:
                return
            flight = self._launch(plan)
        plan = self.scheduler.follow(flight.plan) if self.is_async else None
        following = None if plan is None else self._launch(plan, flight)
        tokens = self.runner.read(flight)
        self._flight = following
        self.counts["async_steps"] += following is not None
        self._settle(flight, tokens)

    def _launch(self, plan: StepPlan, before: Launched | None = None) -> Launched:
        now = time.perf_counter()
        for chunk in plan.chunks:
            timeline = chunk.owner.timeline
            timeline.scheduled_s = now if timeline.scheduled_s is None else timeline.scheduled_s
        return self.runner.launch(plan, self.config.eos_token_ids, before)

    def _settle(self, flight: Launched, tokens: dict[int, list[int]]) -> None:
        """Take over what a step has computed for those that did not end while it was under way."""
        plan, now = flight.plan, time.perf_counter()
        self.counts["steps"] += 1
        took_s = now - max(flight.started_s, self._read_s)  # a step queued early starts when the one before it ends
        self._read_s = now
        guesses = sum(len(chunk.guess) for chunk in plan.chunks)
        self.pace.observe(plan.num_decoding, plan.num_prompt_tokens, took_s, guesses)
        chunks = [(place, chunk, chunk.owner) for place, chunk in enumerate(plan.chunks) if not chunk.owner.is_finished]
        for place, chunk, sequence in chunks:
            sequence.num_computed = chunk.start + max(chunk.count, len(tokens.get(sequence.id, ())))
            if isinstance(chunk.sequence, Pending):  # its last token was not known when it was planned
                self.blocks.register(sequence, sequence.num_computed)
            if chunk.guess and sequence.lookup is not None:
                sequence.lookup.learn(len(chunk.guess), len(tokens[sequence.id]) - 1)
            if place < plan.num_decoding:
                self.counts["decodes"] += 1
                self.counts["decoded_tokens"] += len(tokens[sequence.id])
        ended = [sequence for _, chunk, sequence in chunks if sequence.is_scoring and chunk.reaches_end]
        for number in range(max((len(given) for given in tokens.values()), default=1)):
            given = [(sequence, tokens[sequence.id][number]) for _, _, sequence in chunks
                     if number < len(tokens.get(sequence.id, ()))]  # fmt: skip
            self._rounds.append((now, given, ended if number == 0 else []))

    def finish(self, sequence: Sequence, reason: str, now: float | None = None) -> None:
        """End a sequence for good and take its blocks back."""
        sequence.end(reason, at_s=now)
        self.scheduler.remove(sequence)
        self.sequences.pop(sequence.id, None)
        self.counts["cached_prompt_tokens"] += sequence.num_cached_tokens

    def _append(self, sequence: Sequence, token: int, now: float, should_stop: StopCheck) -> None:
        sequence.token_ids.append(token)
        sequence.timeline.token_times_s.append(now)
        self.counts["output_tokens"] += 1
        reason = should_stop(sequence, token)
        if reason is not None:
            self.finish(sequence, reason, now)

    def stats(self) -> dict[str, Any]:
        """Counters since load, sizes in bytes, and what the graphs report."""
        return {
            **self.counts,
            "preemptions": self.scheduler.num_preemptions,
            "running": len(self.scheduler.running),
            "kv_blocks_total": self.blocks.total,
            "kv_blocks_free": self.blocks.num_free,
            "kv_block_bytes": self.block_bytes,
            "block_size": self.block_size,
            "weight_bytes": self.decoder.weight_bytes(),
            "reserve_bytes": self.reserve_bytes,
            "graphs": self.runner.graphs.info() if self.runner.graphs is not None else None,
        }

    def profile(self, prompts: list[list[int]], steps: int, folder: str) -> list[Phase]:
        """A prefill and decode steps under the profiler, while no request runs; see `profile_core`."""
        return profile_core(self, prompts, steps, folder)

    def close(self) -> None:
        """Give the graphs' memory back and let other ranks of this model return from `serve_steps`."""
        flight, self._flight = self._flight, None
        if flight is not None:  # nothing may be freed under a step
            with contextlib.suppress(GraphError):  # one that hangs was reported when it was read
                self.runner.read(flight)
        if self.runner.graphs is not None:
            self.runner.graphs.close()
        if self.runner.channel is not None and self.decoder.parallel.rank == 0:
            self.runner.channel.close()


def why_refused(sequence: Sequence, vocab_size: int, blocks: BlockManager, max_seq_length: int) -> str | None:
    """Why a request can never run with these blocks, or None."""
    ids, limit = sequence.token_ids, max_seq_length
    if not ids:
        return "the prompt is empty: give at least one token"
    bad = next((token for token in ids if not 0 <= token < vocab_size), None)
    if bad is not None:
        return f"token id {bad!r} is outside the vocabulary: allowed 0 to {vocab_size - 1}"
    room = 0 if sequence.is_scoring else 1
    if len(ids) + room > limit:
        return (
            f"the prompt has {len(ids)} tokens, max_seq_length={limit} allows {limit - room}; shorten it or "
            "raise max_seq_length"
        )
    total = len(ids) if sequence.is_scoring else min(len(ids) + sequence.sampling.max_new_tokens, limit)
    if not blocks.fits_ever(total):
        need = blocks.blocks_for(total if blocks.on_demand else max_seq_length)
        return (
            f"the request needs {need} KV blocks of {blocks.block_size} tokens, the pool has "
            f"{blocks.total}; raise kv_cache_gib, or lower max_new_tokens"
            + ("" if blocks.on_demand else " or set memory_optimize: true")
        )
    return None
