"""A dispatch mode that computes operators on npu tensors on the CPU, and counts what costs time on an NPU.

torch_npu's schemas, argument checks, shape functions, streams and allocator are the real ones. An operator
reaches this mode, is checked, and runs over the same bytes through CPU tensors (`host_alias`); nothing is
copied but results. During graph capture it is only recorded; in shapes-only mode results are allocated and
left empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from npu_sim import capture, runtime, traits
from npu_sim.capture import CaptureError, Graphs, Kernel, Later
from npu_sim.counts import Counts
from npu_sim.lowered import (
    Lowered,
    check_store,
    finish_collectives,
    finished_work,
    internal_formats_allowed,
    is_composite,
    poison,
)
from npu_sim.runtime import Runtime, host_alias

FRACTAL_NZ = 29
_PLACEMENT = ("device", "non_blocking", "pin_memory")  # arguments of a copy that say where, not what


class Simulator(TorchDispatchMode):
    """See the module's text. `shapes_only=True` computes nothing, so that real model sizes fit a laptop."""

    def __init__(self, runtime_: Runtime) -> None:
        super().__init__()
        self.runtime, self.graphs, self._counts = runtime_, Graphs(), Counts()
        self.shapes_only = False
        self._communicators: set[str] = set()
        self._nz_storages: dict[int, StorageWeakRef] = {}
        runtime_.set_hook(self._on_runtime_call)

    @property
    def counts(self) -> Counts:
        """What was counted, calls that still were in torch_npu's task queue included."""
        self.catch_up()
        return self._counts

    def reset(self) -> None:
        """Start counting anew."""
        self.catch_up()
        self._counts = Counts()

    def catch_up(self) -> None:
        """Everything that torch_npu queued so far has happened: the simulated device has no time of its own."""
        if hasattr(torch, "npu") and torch.npu.is_initialized():
            _ = torch.npu.current_stream().npu_stream  # the bare handle is given out once the queue is empty
        for call in self.runtime.taken():
            self._happen(*call)

    # Entry points: an operator from the dispatcher, a call from the runtime.

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        flat, _ = tree_flatten((args, kwargs))
        tensors = traits.tensors_in(flat)
        on_npu = [t for t in tensors if t.device.type == "npu"]
        targets = [x for x in flat if isinstance(x, torch.device)]
        wants_npu = any(x.type == "npu" for x in targets)
        if not on_npu and not wants_npu:
            return func(*args, **kwargs)
        self.catch_up()
        if is_composite(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        self._check_formats(name, on_npu)
        if func.is_view:
            return func(*args, **kwargs)
        if name in traits.NATIVE:
            return self._native(func, args, kwargs)
        if name == "npu::npu_format_cast":
            return self._format_cast(func, args, kwargs)
        if name == "aten::contiguous" and args[0].is_contiguous():
            return args[0]
        if name in ("aten::_to_copy", "aten::copy_") and self._crosses(name, args, on_npu, targets):
            return self._transfer(func, name, args, kwargs, on_npu)
        if name.startswith("c10d::"):
            self._check_collective(name, flat, on_npu)
        stray = [t for t in tensors if t.device.type == "cpu" and t.dim() > 0]
        if stray and on_npu:
            raise RuntimeError(
                f"{name}: Expected all tensors to be on the same device, but found at least two "
                f"devices, npu:0 and cpu ({capture.describe(stray[0])})"
            )
        return self._operator(func, name, args, kwargs, on_npu, targets)

    def _on_runtime_call(self, *call: int) -> int:
        for earlier in self.runtime.taken():
            self._happen(*earlier)
        return self._happen(*call)

    def _happen(self, kind: int, object_: int, stream: int, value: int, flag: int) -> int:
        graphs = self.graphs
        if kind == runtime.IS_DONE:
            return 0 if graphs.unfinished else 1
        if kind == runtime.SYNCHRONIZE:
            if graphs.recording is not None:
                raise CaptureError("synchronisation during graph capture")
            self._counts.syncs["synchronize"] += 1
            graphs.check_finished("synchronisation")
        elif kind == runtime.CAPTURE_BEGIN:
            self._counts.captures += 1
            graphs.begin(object_, stream)
        elif kind == runtime.CAPTURE_END:
            graphs.end()
        elif kind == runtime.REPLAY:
            self._counts.replays += 1
            graphs.replay(object_)
        elif kind == runtime.DESTROY:
            graphs.destroy(object_)
        elif kind == runtime.GROUP_BEGIN:
            graphs.recording.open_group = []
        elif kind == runtime.GROUP_END:
            graphs.recording.close_group(object_)
        elif kind == runtime.UPDATE_BEGIN:
            graphs.updating = graphs.by_group[object_]
        elif kind == runtime.UPDATE_END:
            graphs.updating = None
        elif kind == runtime.VALUE_WAIT:
            graphs.wait_word(object_, value, flag)
        elif kind == runtime.VALUE_WRITE:
            graphs.write_word(object_, value, stream)
        return 0

    # Operators.

    def _operator(
        self, func: Any, name: str, args: tuple, kwargs: dict, on_npu: list[Tensor], targets: list[torch.device]
    ) -> Any:
        graphs = self.graphs
        synchronises = traits.is_synchronising(name, args)
        updated, graphs.updating = (graphs.updating, None)  # an update re-issues one launch, if it is not refused
        if graphs.recording is not None and updated is None:
            self._check_capturable(name, synchronises)
        if name in traits.CHECKS:
            traits.CHECKS[name](*args, **kwargs)
        if name in traits.ALLOCATING:
            return self._own(self._compute(func, args, kwargs, on_npu[0].device))
        if updated is not None:
            return self._reissue(updated, func, name, args, kwargs, on_npu)
        graphs.check_finished(name)
        if synchronises:
            self._counts.syncs[name] += 1
        else:
            self._counts.launches[name] += 1
        device = on_npu[0].device if on_npu else next(d for d in targets if d.type == "npu")
        if graphs.recording is not None:
            return self._record(func, name, args, kwargs, on_npu, device)
        if self.shapes_only:
            result, _ = self._allocate(func, args, kwargs, device, synchronises)
            self._count_kernel(name, args, kwargs, on_npu, result)
            return result
        result = self._compute(func, args, kwargs, device)
        if not synchronises:
            self._count_kernel(name, args, kwargs, on_npu, result)
        return result

    def _compute(self, func: Any, args: tuple, kwargs: dict, device: torch.device) -> Any:
        """Run on the CPU over the same bytes; results that are new get npu memory of their own."""
        lowered = Lowered(args, kwargs)
        out = func(*lowered.args, **lowered.kwargs)

        def lift(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if id(x) in lowered.owners:
                return lowered.owners[id(x)]
            fresh = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device)
            host_alias(fresh).copy_(x)
            return fresh

        return tree_map(lift, out)

    def _allocate(self, func: Any, args: tuple, kwargs: dict, device: torch.device, needs_value: bool = False) -> Any:
        """(results with memory and no content, the new ones among them), by the shape functions."""
        if needs_value:
            return 0, []
        if kwargs.get("out") is not None:
            return (kwargs["out"] if func._schema.returns else None), []
        if func._schema.name in traits.RETURNS_ARGUMENTS:
            return tuple(args[i] for i in traits.RETURNS_ARGUMENTS[func._schema.name]), []
        if func._schema.name.startswith("c10d::"):
            return (args[0], finished_work()), []
        lowered = Lowered(args, kwargs, to_meta=True)
        shapes = func(*lowered.args, **lowered.kwargs)
        fresh: list[Tensor] = []

        def lift(x: Any) -> Any:
            if not isinstance(x, Tensor) or id(x) in lowered.owners:
                return lowered.owners.get(id(x), x)
            fresh.append(torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device))
            return fresh[-1]

        return tree_map(lift, shapes), fresh

    def _record(
        self, func: Any, name: str, args: tuple, kwargs: dict, on_npu: list[Tensor], device: torch.device
    ) -> Any:
        """Append the launch to the recording; its results have addresses now and content after a replay."""
        recording = self.graphs.recording
        outside = recording.outside(on_npu)
        result, fresh = self._allocate(func, args, kwargs, device)
        for tensor in self._own(fresh):
            if not self.shapes_only:
                poison(host_alias(tensor))
        recording.add(Kernel(name, self._runner(func, name, args, kwargs, on_npu, fresh), outside))
        return result

    def _reissue(self, kernel: Kernel, func: Any, name: str, args: tuple, kwargs: dict, on_npu: list[Tensor]) -> Any:
        """Inside an update the launch replaces the recorded one and runs when the replay reaches it."""
        if kernel.name != name:
            raise CaptureError(f"an update re-issues {name}, the task group recorded {kernel.name}")
        self._counts.updates += 1
        kernel.run = self._runner(func, name, args, kwargs, on_npu, [])
        return kwargs.get("out")

    def _runner(
        self, func: Any, name: str, args: tuple, kwargs: dict, on_npu: list[Tensor], fresh: list[Tensor]
    ) -> Any:
        """What a replay executes: the operator over the addresses of now, results likewise."""
        lowered = Lowered(args, kwargs)
        targets = [host_alias(t) for t in fresh]
        moved = traits.bytes_moved(name, args, kwargs, on_npu, fresh)
        known = lowered.forget_owners()  # the device knows addresses: nothing here keeps npu memory alive

        def run() -> None:
            self._counts.kernels[name] += 1
            self._counts.bytes += moved
            if self.shapes_only:
                return
            out = tree_leaves(func(*lowered.args, **lowered.kwargs))
            new = [x for x in out if isinstance(x, Tensor) and id(x) not in known]
            for target, source in zip(targets, new, strict=True):
                target.copy_(source)
            finish_collectives(out)

        return run

    def _count_kernel(self, name: str, args: tuple, kwargs: dict, on_npu: list[Tensor], result: Any) -> None:
        known = {id(t) for t in on_npu}
        new = [t for t in traits.tensors_in(tree_leaves(result)) if id(t) not in known]
        self._counts.kernels[name] += 1
        self._counts.bytes += traits.bytes_moved(name, args, kwargs, on_npu, new)

    # Copies between host and device.

    def _crosses(self, name: str, args: tuple, on_npu: list[Tensor], targets: list[torch.device]) -> bool:
        if name == "aten::copy_":
            return args[0].device.type != args[1].device.type
        return not on_npu or any(t.type == "cpu" for t in targets)

    def _transfer(self, func: Any, name: str, args: tuple, kwargs: dict, on_npu: list[Tensor]) -> Any:
        source = args[1] if name == "aten::copy_" else args[0]
        to_host = source.device.type == "npu"
        waits = not (kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2]))
        if self.graphs.recording is not None:
            raise CaptureError(f"a copy between host and device during graph capture ({capture.describe(source)})")
        is_queued = name == "aten::copy_" and not to_host and not waits
        if not is_queued:
            self.graphs.check_finished(name)
        if to_host:
            # Even without waiting the host has to wait later, before it may look at the result.
            self._counts.syncs[f"{name} to host"] += 1
        elif waits:
            self._counts.syncs[f"{name} to device, blocking"] += 1
        else:
            self._check_pinned(name, source)
            self._counts.uploads += 1
        if self.shapes_only:
            return self._transfer_shape(name, args, kwargs, to_host)
        if name == "aten::copy_":
            target = host_alias(args[0]) if args[0].device.type == "npu" else args[0]
            if is_queued and self.graphs.unfinished:
                self.graphs.unfinished.append(Later(lambda: target.copy_(source)))
            else:
                target.copy_(host_alias(source) if to_host else source)
            return args[0]
        plain = {key: value for key, value in kwargs.items() if key not in _PLACEMENT}
        lowered = Lowered(args, plain)
        copied = func(*lowered.args, **lowered.kwargs)
        if to_host:
            return copied
        fresh = torch.empty_strided(
            copied.size(), copied.stride(), dtype=copied.dtype, device=torch.device(kwargs["device"])
        )
        host_alias(fresh).copy_(copied)
        return fresh

    def _transfer_shape(self, name: str, args: tuple, kwargs: dict, to_host: bool) -> Tensor:
        """Without contents: the device gets unset memory, the host zeros."""
        if name == "aten::copy_":
            return args[0].zero_() if to_host else args[0]
        source, dtype = args[0], kwargs.get("dtype") or args[0].dtype
        if to_host:
            return torch.zeros(source.size(), dtype=dtype)
        return torch.empty(source.size(), dtype=dtype, device=torch.device(kwargs["device"]))

    def _check_pinned(self, name: str, source: Tensor) -> None:
        if source.numel() and source.dim() and not self.runtime.is_pinned(source):
            raise RuntimeError(
                f"{name}: non_blocking copy to the device from pageable memory "
                f"({capture.describe(source)}); the copy may run after the memory was reused, "
                "so pin it"
            )

    # Rules that hold for several operators.

    def _check_collective(self, name: str, flat: list[Any], on_npu: list[Tensor]) -> None:
        if not all(t.is_contiguous() for t in on_npu):
            raise RuntimeError(f"{name}: HCCL refuses strided tensors")
        groups = [x for x in flat if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type())]
        for group in map(torch.distributed.ProcessGroup.unbox, groups):
            if group.group_name not in self._communicators:  # made at the first collective, with the group's store
                check_store(torch.distributed.distributed_c10d._world.pg_map[group][1])
                self._communicators.add(group.group_name)

    def _check_capturable(self, name: str, synchronises: bool) -> None:
        if synchronises:
            raise CaptureError(f"{name} reads the device from the host, or has a value-dependent shape, during capture")
        if name in traits.RANDOM:
            raise CaptureError(f"{name}: random operators cannot be captured")
        self._check_stream(name)

    def _check_stream(self, name: str) -> None:
        current = torch.npu.current_stream().npu_stream
        if current != self.graphs.recording.stream:
            raise CaptureError(f"{name} on another stream than the one being captured")

    def _native(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if self.graphs.recording is not None:
            self._check_stream(func._schema.name)
        return self._own(func(*args, **kwargs))

    def _own(self, result: Any) -> Any:
        """Note that these results were allocated by the capture under way: they live in the graph's pool."""
        if self.graphs.recording is not None:
            for tensor in traits.tensors_in(tree_leaves(result)):
                self.graphs.recording.own_storages.add(tensor.untyped_storage().data_ptr())
        return result

    def _format_cast(self, func: Any, args: tuple, kwargs: dict) -> Tensor:
        source, wanted = args[0], args[1]
        if wanted == FRACTAL_NZ and not internal_formats_allowed():
            raise RuntimeError("npu_format_cast to FRACTAL_NZ needs torch.npu.config.allow_internal_format = True")
        if not source.is_contiguous():
            raise RuntimeError(f"npu_format_cast of a strided tensor {tuple(source.shape)} {source.stride()}")
        self._counts.launches["npu::npu_format_cast"] += 1
        result = torch.empty_strided(source.size(), source.stride(), dtype=source.dtype, device=source.device)
        if not self.shapes_only:
            to, data = host_alias(result), host_alias(source)
            recording = self.graphs.recording
            if recording is None:
                to.copy_(data)
            else:
                outside = recording.outside([source])
                self._own(result)
                recording.add(Kernel("npu::npu_format_cast", lambda: to.copy_(data), outside))
        if wanted == FRACTAL_NZ:
            storage = result.untyped_storage()
            self._nz_storages[storage.data_ptr()] = StorageWeakRef(storage)
        return result

    def is_nz(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory is in the FRACTAL_NZ layout."""
        reference = self._nz_storages.get(tensor.untyped_storage().data_ptr())
        return reference is not None and not reference.expired()

    def _check_formats(self, name: str, on_npu: list[Tensor]) -> None:
        if not self._nz_storages or name in traits.READS_FRACTAL_NZ:
            return
        for tensor in filter(self.is_nz, on_npu):
            raise RuntimeError(
                f"{name} reads or reshapes a FRACTAL_NZ tensor {tuple(tensor.shape)} as if it were plain"
            )
