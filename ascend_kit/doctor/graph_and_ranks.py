"""Self-test of what spans more than one call: captured attention, and a two-rank all-reduce."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta

import torch
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from ascend_kit.device.device import Device, select_device
from ascend_kit.device.graphs import DecodeGraphs
from ascend_kit.device.ops import AttentionMeta, reference, select_ops
from ascend_kit.device.parallel import BACKENDS, join_group, leave_group
from ascend_kit.doctor.comparison import HEADS, AttentionCase, AttentionInputs, Comparer, make_inputs, relative_error
from ascend_kit.doctor.findings import OpCheck

GRAPH_HEADS = HEADS[1]
_SCALE = GRAPH_HEADS[2] ** -0.5
NO_PROMPTS = "graph_prompt_tokens: 0 in the parameter file runs steps with prompts operator by operator"


def run_graph(device: Device) -> Iterator[OpCheck]:
    """Capture attention as the engine does, replay it, replay it with longer sequences.

    Only the second replay proves that new lengths reach the kernel. Three requests in a graph of four
    rows leave a dead row as well. On an NPU prompts beside a decode follow, the second time of more requests.
    """
    comparer = Comparer(device, select_ops(device.kind, fused=True), "graph")
    block, allowed = device.default_block_size, comparer.bound(4)

    def step(*requests: tuple[int, int]) -> AttentionInputs:
        return make_inputs(AttentionCase("", requests), GRAPH_HEADS, block, comparer.dtype)

    first, longer = step((1, block - 1), (1, block + 1), (1, 7)), step((1, block), (1, block + 2), (1, 8))
    graphs: list[DecodeGraphs] = []

    def captured() -> float:
        graphs.append(_capture(comparer, first))
        return _replay(graphs[0], first)

    yield comparer.check("capture and replay", "decode, 3 requests and a dead row", allowed, captured)
    if graphs:
        yield comparer.check("update and replay", "one more token each", allowed, lambda: _replay(graphs[0], longer))
        graphs[0].close()
    if device.kind == "npu":
        steps = [step((1, block - 1), (93, block + 7)), step((1, block - 2), (33, 33), (60, 60))]

        def with_prompts() -> float:
            graphs = _capture(comparer, steps[0], prompt_sizes=[128])
            found = max(_replay(graphs, inputs) for inputs in steps)
            graphs.close()
            return found

        check = comparer.check("prompts in a graph", "2 and 3 requests of 94 tokens", allowed, with_prompts)
        yield replace(check, remedy=NO_PROMPTS if check.status == "fail" else "")


def _capture(comparer: Comparer, inputs: AttentionInputs, prompt_sizes: Sequence[int] = ()) -> DecodeGraphs:
    """A step whose token ids choose rows of a table of queries, over caches that stay where they are."""
    target = comparer.device.torch_device
    held = inputs.to(target, comparer.dtype, comparer.ops.make_mask(target))
    queries = torch.cat((held.q.flatten(1), held.q.flatten(1)[:1]))  # the last row is for dead tokens

    def step(token_ids: Tensor, positions: Tensor, meta: AttentionMeta) -> Tensor:
        q_TNH = queries.index_select(0, token_ids).view(-1, *held.q.shape[1:])
        return comparer.ops.paged_attention(q_TNH, held.k_cache, held.v_cache, meta, _SCALE).flatten(1)

    graphs = DecodeGraphs(
        comparer.device, step, max_batch=4, max_blocks=4, block_size=held.meta.block_size,
        mask=held.meta.mask, host_lengths=getattr(comparer.ops, "HOST_LENGTHS", False), timeout_s=60.0,
        prompt_fn=step, prompt_sizes=prompt_sizes,
    )  # fmt: skip
    graphs.capture()
    return graphs


def _replay(graphs: DecodeGraphs, inputs: AttentionInputs) -> float:
    ids = torch.arange(len(inputs.q), dtype=torch.int32)
    run = graphs.run if inputs.meta.is_decode else graphs.run_prompts
    found = run(ids, torch.zeros_like(ids), inputs.meta)  # queries are chosen by their ids
    graphs.wait()
    wanted = reference.paged_attention(inputs.q, inputs.k_cache, inputs.v_cache, inputs.meta, _SCALE)
    return relative_error(found, wanted.flatten(1))


def run_collective(device: Device) -> Iterator[OpCheck]:
    """All-reduce over two ranks, each on its own card (two processes over gloo on a CPU)."""
    comparer = Comparer(device, select_ops(device.kind, fused=True), "collective")

    def reduced() -> float:
        with tempfile.TemporaryDirectory() as folder:
            start_processes(_rank, args=(device.kind, device.index, folder), nprocs=2, start_method="spawn")
        return 0.0  # a rank that sees a wrong sum raises

    backend = BACKENDS[device.kind].rpartition(":")[2]
    yield comparer.check("all_reduce", f"2 ranks, {backend}, bf16 [64, 4096]", 0.0, reduced)


def _rank(rank: int, kind: str, first: int, folder: str) -> None:
    device = select_device(kind, 0 if kind == "cpu" else first ^ rank)  # the card itself and its neighbour
    store = torch.distributed.FileStore(f"{folder}/meeting", 2)  # type: ignore[attr-defined]
    join_group(kind, rank, 2, store, timedelta(seconds=180))
    try:
        values = torch.full((64, 4096), float(rank + 1), dtype=torch.bfloat16, device=device.torch_device)
        torch.distributed.all_reduce(values)
        wrong = (values != 3).sum().item()
        if wrong:
            raise RuntimeError(f"all_reduce on rank {rank}: {wrong} of {values.numel()} values are not the sum")
    finally:
        leave_group()
