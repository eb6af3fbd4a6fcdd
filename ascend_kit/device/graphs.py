"""Steps without the host in the way: NPU graphs, CUDA graphs, or recorded calls or compiled layers on a CPU.

A decode step of a fixed batch size launches the same kernels every time, so the launches are recorded once
per size and replayed as one. `DecodeGraphs` hides which mechanism does it:

    graphs = DecodeGraphs(device, step_fn, max_batch=16, max_blocks=64, block_size=128, ...)
    graphs.capture()                                  # once, after the KV cache exists
    logits = graphs.run(token_ids, positions, meta)   # [B, V], valid until the next run
    graphs.info()                                     # mode, sizes, seconds and bytes the capture took

`step_fn(token_ids [B] int32, positions [B] int32, meta) -> logits [B, V]` is the whole step without
sampling: random numbers and host reads cannot be recorded. A batch runs in the next larger captured size;
the dead rows read and write block 0 of the KV cache, which no request owns. Everything `run` is given may
live on the host, which is cheapest: all of it then crosses in one transfer.

On an NPU steps with prompts are captured, too, for a few numbers of tokens (`prompt_sizes`): `run_prompts` gives the
hidden states [T, D] of all tokens, since which of them are read differs. Dead tokens are one more sequence. Elsewhere
they are not: CUDA's attention here reads the lengths of prompts on the host, and on a CPU, which is bound by arithmetic
in such a step, padding costs more than the calls of Python that it saves.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ascend_kit.device.advice import advice
from ascend_kit.device.cpu_graphs import CompiledLayers, Eager, NotRecordable, RecordedCalls, StepFn
from ascend_kit.device.device import Device
from ascend_kit.device.graph_inputs import GraphError, StaticInputs
from ascend_kit.device.ops import AttentionMeta
from ascend_kit.device.ops.native import compiler

# Few sizes: every graph takes device memory, streams and start-up time. Waste is at most half a batch below
# 16.
SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
# Of steps with prompts, in tokens: this far apart at most, and so many.
PROMPT_STRIDE, MAX_PROMPT_SIZES = 128, 4
DEFAULT_TIMEOUT_S = 120.0
NPU_CORES = 24  # of 910B1 and B2; B3 and B4 have 20
NO_ADVICE = {False: "set graph_mode: false to go on without", True: "set graph_prompt_tokens: 0 to go on without"}
UPDATE_FIRST_VARIABLE = "ASCEND_KIT_GRAPH_UPDATE_FIRST"

_HANG_ADVICE = (
    "A replay waits for its attention lengths; a missing or overtaking update is the usual cause. "
    "Try, in this order: unset HCCL_OP_EXPANSION_MODE when it is AIV and several cards are used; "
    f"{UPDATE_FIRST_VARIABLE}=1 to update before replaying; graph_mode: false; a newer driver and CANN. "
    "With several cards, look at the rank that stopped first."
)


class GraphHang(GraphError):
    """The device did not finish in time."""


def decode_sizes(max_batch: int) -> list[int]:
    """Batch sizes to capture, ascending, ending with `max_batch`."""
    largest = range(2 * SIZES[-1], max_batch, SIZES[-1])
    return sorted({size for size in (*SIZES, *largest) if size < max_batch} | {max_batch})


def prompt_sizes(limit: int, block_size: int) -> list[int]:
    """Token counts to capture for steps with prompts of at most `limit` tokens, ascending; the last one is the limit.

    They lie a block apart at most: the cache write wants distinct slots, and dead tokens have those of one block.
    """
    stride = min(PROMPT_STRIDE, block_size)
    limit = min(limit, MAX_PROMPT_SIZES * stride)
    return sorted({*range(stride, limit, stride), limit}) if limit > 0 else []


def memory_reserve(
    kind: str,
    *,
    num_heads: int,
    widest: int,
    hidden_size: int,
    vocab_size: int,
    batch_size: int,
    step_tokens: int,
    graph_mode: bool,
    prompt_sizes: Sequence[int],
    communicates: bool,
) -> dict[str, int]:
    """Bytes to keep free beside weights and KV cache on an accelerator, by what takes them later; empty on a CPU.

    `graphs`: the attention kernel's largest workspace (16 MiB + cores x 65,536 x 48 B + 2 x cores x 128 x 128 x 4 B a
    head; all sizes share it), every size's logits or, with prompts, hidden states in 16 bits, and four of the widest
    rows of the largest step with prompts. `collectives`: twice HCCL_BUFFSIZE. `activations`: four of the widest rows
    of a step, and float32 logits to sample from, twice.
    """
    if kind == "cpu":
        return {}
    workspace = (16 << 20) + NPU_CORES * (65536 * 48 + 2 * 128 * 128 * 4 * num_heads) if kind == "npu" else 0
    results = 2 * vocab_size * sum(decode_sizes(batch_size)) + 2 * hidden_size * sum(prompt_sizes)
    inside = 4 * max(prompt_sizes, default=0) * widest * 2
    buffer_mib = os.environ.get("HCCL_BUFFSIZE", "200")
    return {
        "graphs": workspace + results + inside if graph_mode else 0,
        "collectives": 2 * int(buffer_mib if buffer_mib.isdigit() else 200) << 20 if communicates else 0,
        "activations": 4 * step_tokens * widest * 2 + 2 * batch_size * vocab_size * 4,
    }


def wait_until(is_done: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Poll `is_done` until it holds. Raises GraphHang, naming `what`, once `timeout_s` have passed.

    Polling instead of a blocking synchronisation, because nothing can interrupt the latter.
    """
    start = time.perf_counter()
    while not is_done():
        waited_s = time.perf_counter() - start
        if waited_s > timeout_s:
            raise GraphHang(f"{what} did not finish within {timeout_s:g} s. {_HANG_ADVICE}")
        if waited_s > 0.02:  # a step is usually over by then; do not burn a core on a long one
            time.sleep(0.0005)


class _Captured(NamedTuple):
    """One recorded size on NPU or CUDA; `result` is logits, or hidden states of a step with prompts."""

    inputs: StaticInputs
    graph: Any
    result: Tensor


@dataclass
class _Counters:
    capture_s: float = 0.0
    capture_bytes: int = 0
    replays: int = 0
    rows: int = 0
    padded_rows: int = 0
    prompt_replays: int = 0
    prompt_tokens: int = 0  # in those, decoded ones among them
    padded_tokens: int = 0


class DecodeGraphs:
    """Captured steps; see the module's text.

    `host_lengths`: the attention takes its lengths as host lists (the NPU kernel does), so a replay is
    followed by an update. `layers`: the decoder layers, which a CPU compiles one by one; without them the
    whole step is compiled. `records`: the op table's attention is a kernel of ours (CPU), so that the step is recorded;
    with False it stays eager, with None it is compiled. A CPU step that can be neither is run eagerly after a warning,
    and `info` says so. `mask`: the op table's shared mask, if it has one. `prompt_fn`: as `step_fn` for steps with
    prompts of these `prompt_sizes`, with hidden states as its result.
    """

    def __init__(
        self,
        device: Device,
        step_fn: StepFn,
        *,
        max_batch: int,
        max_blocks: int,
        block_size: int,
        mask: Tensor | None = None,
        host_lengths: bool = False,
        layers: Sequence[nn.Module] = (),
        records: bool | None = None,
        prompt_fn: StepFn | None = None,
        prompt_sizes: Sequence[int] = (),
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self.device, self.step_fn, self.timeout_s = device, step_fn, timeout_s
        if device.kind == "npu":
            # A recorded size is written to once with dead rows alone, over the scratch block and the one behind it.
            max_batch = min(max_batch, 2 * block_size)
        self.sizes = decode_sizes(max_batch)
        if device.kind == "npu":
            # The cache write wants distinct slots, and dead rows have those of the one scratch block.
            self.sizes = sorted({*self.sizes, *range(block_size, max_batch, block_size)})
        self.prompt_fn, self.prompt_sizes = prompt_fn, list(prompt_sizes) if device.kind == "npu" else []
        self.max_sequences = self.sizes[-1] + 1  # of a step with prompts: the last one for its dead tokens
        self.max_blocks, self.block_size, self.mask = max_blocks, block_size, mask
        self.host_lengths = host_lengths and device.kind == "npu"
        self.update_first = os.environ.get(UPDATE_FIRST_VARIABLE, "0") not in ("", "0")
        self.counters = _Counters()
        self._captured: dict[int, _Captured] = {}
        self._captured_prompts: dict[int, _Captured] = {}
        self._compiled: CompiledLayers | RecordedCalls | Eager | None = None
        if device.kind == "cpu":
            self._compiled = self._cpu_step(records, layers)
            self.sizes = getattr(self._compiled, "sizes", self.sizes)
        self._pool: Any = None
        self._stream: Any = None  # one for all sizes: the allocator shares a pool within a stream only
        self._done: Any = None  # event after the latest replay

    def capture(self) -> dict[str, Any]:
        """Record every size, largest first so that the smaller ones reuse its memory; returns `info()`."""
        if self.device.task_queue_level() == 2:
            level = "TASK_QUEUE_ENABLE=2"
            raise GraphError(f"graphs cannot be captured at {level}. What to try: {advice(level)}.")
        start = time.perf_counter()
        before = self.device.memory_in_use_bytes()
        if self._compiled is not None:
            self._run_both_shapes()
        else:
            for size in reversed(self.prompt_sizes):
                self._captured_prompts[size] = self._capture_size(size, with_prompts=True)
            for size in reversed(self.sizes):
                self._captured[size] = self._capture_size(size)
        self.counters.capture_s += time.perf_counter() - start
        self.counters.capture_bytes += max(0, self.device.memory_in_use_bytes() - before)
        return self.info()

    def can_run(self, batch: int) -> bool:
        """Whether a batch of this size fits a captured one."""
        return 1 <= batch <= self.sizes[-1]

    def can_run_prompts(self, tokens: int, sequences: int) -> bool:
        """Whether a step with prompts fits a captured one."""
        return bool(self.prompt_sizes) and tokens <= self.prompt_sizes[-1] and sequences < self.max_sequences

    def run(self, token_ids: Tensor, positions: Tensor, meta: AttentionMeta) -> Tensor:
        """Logits [B, V] of one decode step. On NPU and CUDA they are overwritten by the next run."""
        batch = token_ids.shape[0]
        if not self.can_run(batch):
            raise ValueError(f"a batch of {batch} does not fit the captured sizes {self.sizes}")
        if not meta.is_decode:
            raise ValueError("a recorded step has one query token per sequence; run a prefill without graphs")
        self.counters.replays += 1
        self.counters.rows += batch
        if self._compiled is not None:
            return self._run_on_cpu(token_ids, positions, meta)
        if not self._captured:
            self.capture()
        size = next(size for size in self.sizes if size >= batch)
        self.counters.padded_rows += size - batch
        return self._run(self._captured[size], token_ids, positions, meta)

    def run_prompts(self, token_ids: Tensor, positions: Tensor, meta: AttentionMeta) -> Tensor:
        """Hidden states [T, D] of a step that `can_run_prompts`, overwritten by the next one of its size."""
        tokens = token_ids.shape[0]
        size = next(size for size in self.prompt_sizes if size >= tokens)
        self.counters.prompt_replays += 1
        self.counters.prompt_tokens += tokens
        self.counters.padded_tokens += size - tokens
        return self._run(self._captured_prompts[size], token_ids, positions, meta)

    def _run(self, captured: _Captured, token_ids: Tensor, positions: Tensor, meta: AttentionMeta) -> Tensor:
        captured.inputs.fill(token_ids, positions, meta)  # queued while the replay before is under way
        # An update that overtakes an unfinished replay is lost or reaches the wrong step.
        self.wait()
        self._replay(captured, captured.inputs.padded(meta) if self.host_lengths else None)
        return captured.result[: token_ids.shape[0]]

    def wait(self) -> None:
        """Return when the latest replay is over; GraphHang when it is not over in time."""
        if self._done is not None:
            wait_until(self._done.query, self.timeout_s, f"the step recorded for {self.device.torch_device}")

    def info(self) -> dict[str, Any]:
        """What was captured and how often it ran; plain values for a manifest."""
        mode = f"{self.device.kind}_graph" if self._compiled is None else self._compiled.mode
        return {"mode": mode, "sizes": self.sizes, "prompt_sizes": self.prompt_sizes, **vars(self.counters)}

    def close(self) -> None:
        """Give the graphs' memory back."""
        for captured in (self._captured, self._captured_prompts):
            for one in captured.values():
                one.graph.reset()
            captured.clear()

    def _cpu_step(self, records: bool | None, layers: Sequence[nn.Module]) -> CompiledLayers | RecordedCalls | Eager:
        if records:
            return RecordedCalls(self.device, self.step_fn, self.sizes, self.max_blocks, self.block_size)
        if records is None and compiler() is not None:
            return CompiledLayers(self.step_fn, layers)
        return Eager(self.step_fn, "plain attention is not recorded" if records is False else "no C++ compiler")

    def _run_on_cpu(self, token_ids: Tensor, positions: Tensor, meta: AttentionMeta) -> Tensor:
        """The step, eager from now on where it can be neither recorded nor compiled: computing it again is harmless."""
        try:
            return self._compiled(token_ids, positions, meta)  # type: ignore[misc]
        except (NotRecordable, torch._dynamo.exc.TorchDynamoException) as error:  # type: ignore[attr-defined]
            self._compiled = Eager(self.step_fn, str(error).partition("\n")[0])
            return self._compiled(token_ids, positions, meta)

    def _capture_size(self, size: int, with_prompts: bool = False) -> _Captured:
        backend = self.device.backend
        sequences = min(self.max_sequences, size) if with_prompts else None
        inputs = StaticInputs(self.device, size, self.max_blocks, self.block_size, self.mask, sequences)
        spread = inputs.spread()
        lengths = spread if self.host_lengths else None
        meta = inputs.meta(lengths)
        step_fn = self.prompt_fn if with_prompts and self.prompt_fn is not None else self.step_fn
        stream = self._stream = self._stream or backend.Stream()
        stream.wait_stream(backend.current_stream())
        try:
            with backend.stream(stream):  # kernels are loaded and workspaces sized before recording starts
                step_fn(inputs.token_ids, inputs.positions, meta)
            backend.current_stream().wait_stream(stream)
            self.device.synchronize()
            captured = self._record(step_fn, inputs, meta, stream)
            self._replay(captured, lengths)  # the first replay loads the graph, and shows whether updates arrive
        except GraphError:
            raise
        except RuntimeError as error:
            what = f"a step of {size} tokens with prompts" if with_prompts else f"the decode step for {size} sequences"
            raise GraphError(f"{what} cannot be recorded: {error}. "
                             f"What to try: {advice(str(error), NO_ADVICE[with_prompts])}.") from error  # fmt: skip
        self.wait()
        return captured

    def _record(self, step_fn: StepFn, inputs: StaticInputs, meta: AttentionMeta, stream: Any) -> _Captured:
        backend = self.device.backend
        if self._pool is None:
            self._pool = backend.graph_pool_handle()
        is_npu = self.device.kind == "npu"
        graph = backend.NPUGraph() if is_npu else backend.CUDAGraph()
        updates = {"auto_dispatch_capture": self.host_lengths} if is_npu else {}
        with backend.graph(graph, pool=self._pool, stream=stream, **updates):
            result = step_fn(inputs.token_ids, inputs.positions, meta)
        return _Captured(inputs, graph, result)

    def _replay(self, captured: _Captured, lengths: tuple[list[int], list[int]] | None) -> None:
        """Replay, then update: layer i waits only for its own lengths, so the later updates cost no time."""
        if lengths is not None and self.update_first:
            self._update(captured, lengths)
        captured.graph.replay()
        if lengths is not None and not self.update_first:
            self._update(captured, lengths)
        if self._done is None:
            self._done = self.device.backend.Event()
        self._done.record()

    def _update(self, captured: _Captured, lengths: tuple[list[int], list[int]]) -> None:
        names = ("actual_seq_lengths", "actual_seq_lengths_kv")
        captured.graph.update(cpu_update_input=[dict(zip(names, lengths, strict=True))])

    def _run_both_shapes(self) -> None:
        # A size of 1 stays its own case under dynamic shapes. 3 and 5 because equal sizes would share one symbol.
        for batch in {1, min(3, self.sizes[-1])}:
            ids, positions, slots, lens = (torch.zeros(batch, dtype=torch.int32) for _ in range(4))
            table = torch.zeros(batch, min(5, self.max_blocks), dtype=torch.int32)
            meta = AttentionMeta(slots, table, [], [], lens + 1, self.block_size, is_decode=True)
            self._run_on_cpu(ids, positions, meta)
