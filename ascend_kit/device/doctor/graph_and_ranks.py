"""Self-test of what spans more than one call: a captured decode attention, and a two-rank all-reduce."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import Tensor

from ascend_kit.device.device import Device, select_device
from ascend_kit.device.doctor.attention_inputs import HEADS, AttentionCase, AttentionInputs, make_inputs
from ascend_kit.device.doctor.comparison import Tester, bound, relative_error
from ascend_kit.device.doctor.stages import OpCheck
from ascend_kit.device.ops import reference, select_ops


def run_graph(device: Device) -> Iterator[OpCheck]:
    """Capture one decode attention, replay it, replay it with longer sequences: this proves the update."""
    tester = Tester(device, select_ops(device.kind, fused=True), "graph")
    dtype, heads, block = torch.bfloat16, HEADS[1], device.default_block_size
    first = make_inputs(
        AttentionCase("", ((1, block - 1), (1, block + 1), (1, 7))), heads, block, dtype, seed=1
    )
    longer = make_inputs(AttentionCase("", ((1, block), (1, block + 2), (1, 8))), heads, block, dtype, seed=1)
    longer.k_cache, longer.v_cache = first.k_cache, first.v_cache
    longer.meta.block_table = first.meta.block_table
    graph: list[DecodeGraph] = []

    def captured() -> float:
        graph.append(DecodeGraph(tester, first, heads, dtype))
        return graph[0].replay(first)

    yield tester.check("capture and replay", "decode, 3 requests", bound(dtype, 4), captured)
    if graph:
        yield tester.check(
            "update and replay", "one more token each", bound(dtype, 4), lambda: graph[0].replay(longer)
        )


class DecodeGraph:
    """A captured attention step with static buffers; `replay` returns its error against the reference."""

    def __init__(
        self, tester: Tester, inputs: AttentionInputs, heads: tuple[int, int, int], dtype: torch.dtype
    ) -> None:
        self.device, self.scale = tester.device, heads[2] ** -0.5
        target = tester.device.torch_device
        self.static = inputs.to(target, dtype, tester.ops.make_mask(target))
        self.out: Tensor | None = None

        def step() -> Tensor:
            held = self.static
            return tester.ops.paged_attention(held.q, held.k_cache, held.v_cache, held.meta, self.scale)

        self.step = step
        if self.device.kind == "cpu":
            self.step = torch.compile(step, dynamic=True)
        else:
            self._capture()

    def _capture(self) -> None:
        """Warm up on a side stream, then record; torch_npu's dispatch mode finds what needs updates."""
        backend = self.device.backend
        stream = backend.Stream()
        with backend.stream(stream):
            self.step()
        backend.synchronize()
        is_npu = self.device.kind == "npu"
        self.graph = backend.NPUGraph() if is_npu else backend.CUDAGraph()
        options = {"auto_dispatch_capture": True} if is_npu else {}
        with backend.graph(self.graph, stream=stream, **options):
            self.out = self.step()

    def replay(self, inputs: AttentionInputs) -> float:
        """Copy new inputs into the static buffers, run, compare."""
        meta = self.static.meta
        self.static.q.copy_(inputs.q)
        meta.context_lens_t.copy_(inputs.meta.context_lens_t)
        meta.context_lens[:] = inputs.meta.context_lens
        if self.device.kind == "cpu":
            self.out = self.step()
        else:
            self.graph.replay()
        if self.device.kind == "npu":  # every replay waits for one update of the host lists
            self.graph.update(
                cpu_update_input=[
                    {
                        "actual_seq_lengths": meta.cu_seqlens_q,
                        "actual_seq_lengths_kv": inputs.meta.context_lens,
                    }
                ]
            )
        self.device.synchronize()
        wanted = reference.paged_attention(inputs.q, inputs.k_cache, inputs.v_cache, inputs.meta, self.scale)
        return relative_error(self.out, wanted)


def run_collective(device: Device) -> Iterator[OpCheck]:
    """All-reduce over two ranks, each on its own card (two processes over gloo on a CPU)."""
    tester = Tester(device, select_ops(device.kind, fused=True), "collective")

    def reduced() -> float:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(
                _rank, args=(device.kind, device.index, device.collective_backend, folder), nprocs=2
            )
        return 0.0  # a rank that sees a wrong sum raises

    yield tester.check("all_reduce", f"2 ranks, {device.collective_backend}, bf16 [64, 4096]", 0.0, reduced)


def _rank(rank: int, kind: str, first: int, backend: str, folder: str) -> None:
    import torch.distributed as dist

    device = select_device(kind, 0 if kind == "cpu" else first ^ rank)  # the card itself and its neighbour
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=180),
    )
    try:
        values = torch.full((64, 4096), float(rank + 1), dtype=torch.bfloat16, device=device.torch_device)
        dist.all_reduce(values)
        wrong = (values != 3).sum().item()
        if wrong:
            raise RuntimeError(
                f"all_reduce on rank {rank}: {wrong} of {values.numel()} values are not the sum"
            )
    finally:
        dist.destroy_process_group()
