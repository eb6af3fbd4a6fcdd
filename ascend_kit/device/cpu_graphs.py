"""A decode step on a CPU without Python in between: its calls recorded, its layers compiled, or as it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ascend_kit.device.device import Device
from ascend_kit.device.graph_inputs import StaticInputs, Unreadable
from ascend_kit.device.ops import AttentionMeta
from ascend_kit.device.ops.native import Arena, Recording, TorchCalls

StepFn = Callable[[Tensor, Tensor, AttentionMeta], Tensor]


class Eager:
    """The step as it is, on a CPU that can neither record nor compile it."""

    def __init__(self, step_fn: StepFn, reason: str) -> None:
        self.step_fn, self.mode = step_fn, f"eager ({reason})"
        warnings.warn(f"graph_mode: decode steps are computed without a graph: {reason}", stacklevel=2)

    def __call__(self, token_ids: Tensor, positions: Tensor, meta: AttentionMeta) -> Tensor:
        return self.step_fn(token_ids, positions, meta)


class RecordedCalls:
    """The calls of a step, noted once per batch size and repeated over the same buffers."""

    mode = "recorded_calls"

    def __init__(self, device: Device, step_fn: StepFn, sizes: Sequence[int], max_blocks: int, block_size: int) -> None:
        from ascend_kit.device.ops.cpu_native import MAX_RECORDED

        self.device, self.step_fn = device, step_fn
        self.max_blocks, self.block_size = max_blocks, block_size
        # No padding on a CPU: every batch size is recorded when it first comes up, which takes one step.
        self.sizes = list(range(1, min(sizes[-1], MAX_RECORDED) + 1))
        self.recorded: dict[int, tuple[StaticInputs, Recording, Tensor]] = {}
        self.arena = Arena()

    def __call__(self, token_ids: Tensor, positions: Tensor, meta: AttentionMeta) -> Tensor:
        batch = token_ids.shape[0]
        if batch not in self.recorded:
            self.recorded[batch] = self._record(batch)
        inputs, recording, logits = self.recorded[batch]
        inputs.fill(token_ids, positions, meta)
        recording.replay()
        return logits

    def _record(self, batch: int) -> tuple[StaticInputs, Recording, Tensor]:
        inputs = StaticInputs(self.device, batch, self.max_blocks, self.block_size, None)
        with Recording(self.arena) as recording, TorchCalls(recording):
            logits = self.step_fn(inputs.token_ids, inputs.positions, inputs.meta(None))
        return inputs, recording, logits


class CompiledLayers:
    """The step with its decoder layers compiled. One compilation serves all layers, batches and contexts."""

    mode = "compiled_inductor"

    def __init__(self, step_fn: StepFn, layers: Sequence[nn.Module]) -> None:
        # Rounding to bf16 between fused operators as the plain step does, or greedy tokens would differ from it.
        options: dict[str, Any] = {"emulate_precision_casts": True}
        compile_ = lambda fn: torch.compile(fn, dynamic=True, backend="inductor", options=options)  # noqa: E731
        self.layers = list(layers)
        self.compiled = [compile_(layer._call_impl) for layer in self.layers]
        self.step_fn = step_fn if self.layers else compile_(step_fn)

    def __call__(self, token_ids: Tensor, positions: Tensor, meta: AttentionMeta) -> Tensor:
        table = meta.block_table
        if table.shape[1] == 1:  # width 1 would be compiled as a case of its own
            table = nn.functional.pad(table, (0, 1))
        meta = replace(meta, block_table=table, cu_seqlens_q=Unreadable(), context_lens=Unreadable())
        with self._swapped_in():
            return self.step_fn(token_ids, positions, meta)

    @contextmanager
    def _swapped_in(self) -> Iterator[None]:
        """Layers compiled for this step only: a prefill would be compiled again for its own shapes."""
        for layer, compiled in zip(self.layers, self.compiled, strict=True):
            layer._compiled_call_impl = compiled
        try:
            yield
        finally:
            for layer in self.layers:
                layer._compiled_call_impl = None
