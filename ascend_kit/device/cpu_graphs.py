"""A decode step on a CPU without Python in between: its calls recorded, its layers compiled, or as it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ascend_kit.device.device import Device
from ascend_kit.device.graph_inputs import StaticInputs, Unreadable
from ascend_kit.device.ops import AttentionMeta
from ascend_kit.device.ops.cpu_native import MAX_RECORDED, Arena, Recording

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


class NotRecordable(RuntimeError):
    """An operator whose result depends on the host's reading of the device; the message names it."""


class TorchCalls(TorchDispatchMode):
    """Notes the torch operators between the kernels of a recording, collectives among them.

    A replay computes each again and copies the result to where the recording has it. Views of buffers stay what they
    are. NotRecordable where the host reads numbers, or where a result's size depends on them.
    """

    ALLOCATING = ("empty", "empty_like", "empty_strided", "new_empty", "detach")

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name
        if name.removeprefix("aten::") in self.ALLOCATING:
            return result
        if name.startswith("c10d::"):
            self._note(lambda: _waited(func(*args, **kwargs)), args)
            return _waited(result)
        if not isinstance(result, torch.Tensor | list | tuple) or torch.Tag.dynamic_output_shape in func.tags:
            raise NotRecordable(f"{name} reads numbers that a recorded step cannot know")
        if func._schema.is_mutable:
            self._note(lambda: func(*args, **kwargs), args)
            return result
        kept = [result] if isinstance(result, torch.Tensor) else list(result)
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if not all(tensor.untyped_storage().data_ptr() in given for tensor in kept):
            self._note(lambda: _refill(kept, func(*args, **kwargs)), kept)
        return result

    def _note(self, repeat: Any, kept: Any) -> None:
        self.recording.note(repeat, (), kept)


def _refill(kept: list[torch.Tensor], result: Any) -> None:
    for target, source in zip(kept, [result] if isinstance(result, torch.Tensor) else result, strict=True):
        target.copy_(source)


def _waited(result: Any) -> Any:
    """The result of a collective once it is there."""
    for part in result if isinstance(result, tuple) else (result,):
        if hasattr(part, "wait"):
            part.wait()
    return result


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
