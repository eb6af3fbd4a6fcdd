"""The simulation itself: device semantics, counting, and graph capture that behaves as the device's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.npu

BLOCK = 128


@pytest.fixture(autouse=True)
def started(sim):
    return sim


class PagedAttention:
    """One decode attention over a small cache, with room for changing lengths."""

    def __init__(self):
        torch.manual_seed(0)
        self.cache = [torch.randn(8, BLOCK, 2 * 128).to("npu", torch.bfloat16) for _ in range(2)]
        self.query = torch.randn(2, 4, 128).to("npu", torch.bfloat16)
        self.table = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32).to("npu")
        self.mask = torch.ones(2048, 2048, dtype=torch.int8).triu(1).to("npu")

    def __call__(self, kv_lens):
        import torch_npu

        return torch_npu.npu_fused_infer_attention_score(
            self.query,
            *self.cache,
            atten_mask=self.mask,
            block_table=self.table,
            block_size=BLOCK,
            input_layout="TND",
            num_heads=4,
            num_key_value_heads=2,
            scale=128**-0.5,
            sparse_mode=3,
            actual_seq_lengths=[1, 2],
            actual_seq_lengths_kv=kv_lens,
        )[0]


def record(step, **options):
    """(graph, whatever `step` returned), captured on a stream of its own."""
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, stream=torch.npu.Stream(), **options):
        result = step()
    return graph, result


def update(graph, kv_lens):
    graph.update(cpu_update_input=[{"actual_seq_lengths": [1, 2], "actual_seq_lengths_kv": kv_lens}])


def test_views_share_memory_and_values_match_the_cpu():
    x = torch.arange(12.0).view(3, 4).to("npu")

    x[1].add_(10)

    assert x.t().cpu().tolist() == torch.tensor([[0.0, 1, 2, 3], [14, 15, 16, 17], [8, 9, 10, 11]]).t().tolist()


def test_memory_is_accounted_for_and_runs_out():
    before = torch.npu.memory_allocated()
    held = torch.empty(1 << 20, device="npu")

    assert torch.npu.memory_allocated() - before >= 4 << 20
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(80 << 30, dtype=torch.uint8, device="npu")
    del held


def test_launches_synchronisations_and_bytes_are_counted(sim):
    x = torch.ones(8, 8).to("npu")
    sim.reset()

    total = (x @ x).sum()
    assert sim.counts.num_launches == 2
    assert sim.counts.num_syncs == 0
    assert sim.counts.bytes == 2 * 256 + 256 + 4  # x once, the product written and read, the sum

    assert total.item() == 512
    assert sim.counts.num_syncs == 1


def test_composite_operators_count_the_same_without_autograd_keys(sim):
    x, weight, bias = (torch.ones(*shape).to("npu") for shape in ((2, 4), (3, 4), (3,)))
    sim.reset()

    with torch.inference_mode():
        torch.nn.functional.linear(x, weight, bias).reshape(6).unflatten(0, (2, 3)).contiguous()

    assert dict(sim.counts.launches) == {"aten::addmm": 1}


def test_an_upload_that_does_not_wait_needs_pinned_memory(sim):
    host = torch.arange(4)

    with pytest.raises(RuntimeError, match="pageable"):
        host.to("npu", non_blocking=True)
    sim.reset()
    assert host.pin_memory().to("npu", non_blocking=True).tolist() == [0, 1, 2, 3]
    assert (sim.counts.uploads, sim.counts.num_syncs) == (1, 1)


def test_threads_started_later_are_simulated_too():
    results = []

    thread = threading.Thread(target=lambda: results.append((torch.ones(2).to("npu") + 1).tolist()))
    thread.start()
    thread.join()

    assert results == [[2.0, 2.0]]


def test_shapes_only_mode_computes_nothing_and_counts_everything(sim):
    weight = torch.empty(1 << 15, 1 << 15, dtype=torch.bfloat16, device="npu")  # 2 GiB that no page backs
    x = torch.empty(1, 1 << 15, dtype=torch.bfloat16, device="npu")
    sim.reset()
    sim.shapes_only = True

    y = torch.nn.functional.linear(x, weight)

    assert tuple(y.shape) == (1, 1 << 15)
    assert sim.counts.bytes == (1 << 31) + 2 * (1 << 16)


def test_capture_runs_nothing_and_replay_does():
    x = torch.zeros(4).to("npu")

    graph, y = record(lambda: x.add_(1) * 2)

    assert x.tolist() == [0, 0, 0, 0]
    assert all(value != value for value in y.tolist()), "before a replay the result is garbage"
    graph.replay()
    graph.replay()
    assert x.tolist() == [2, 2, 2, 2]
    assert y.tolist() == [4, 4, 4, 4]


def test_replay_reads_what_the_static_inputs_hold_by_then():
    x = torch.zeros(3).to("npu")
    graph, y = record(lambda: x + 1)

    x.copy_(torch.tensor([5.0, 6.0, 7.0]))
    graph.replay()

    assert y.tolist() == [6, 7, 8]


def test_update_hands_new_lengths_to_a_replay_that_waits_for_them():
    attend = PagedAttention()
    graph, out = record(lambda: attend([5, 130]) * 1, auto_dispatch_capture=True)

    for lens in ([6, 131], [200, 1]):
        graph.replay()
        update(graph, lens)

        torch.testing.assert_close(out.cpu(), attend(lens).cpu())


def test_update_before_replay_works_as_well():
    attend = PagedAttention()
    graph, out = record(lambda: attend([5, 130]) * 1, auto_dispatch_capture=True)

    update(graph, [77, 8])
    graph.replay()

    torch.testing.assert_close(out.cpu(), attend([77, 8]).cpu())


def test_a_replay_without_update_raises_instead_of_hanging():
    attend = PagedAttention()
    graph, out = record(lambda: attend([5, 130]) * 1, auto_dispatch_capture=True)

    graph.replay()

    with pytest.raises(RuntimeError, match="wait for ever"):
        torch.npu.synchronize()
    graph.replay()
    with pytest.raises(RuntimeError, match="wait for ever"):
        out.cpu()


def test_an_event_after_a_waiting_replay_is_not_reached(sim):
    attend = PagedAttention()
    graph, _ = record(lambda: attend([5, 130]), auto_dispatch_capture=True)

    graph.replay()
    event = torch.npu.Event()
    event.record()

    assert not event.query()
    update(graph, [5, 130])
    sim.catch_up()
    assert event.query()


def test_lengths_of_the_capture_are_frozen_without_automatic_dispatch():
    attend = PagedAttention()
    graph, out = record(lambda: attend([5, 130]) * 1)

    graph.replay()
    torch.testing.assert_close(out.cpu(), attend([5, 130]).cpu())
    with pytest.raises(RuntimeError, match="auto_dispatch_capture"):
        update(graph, [6, 131])


def test_broken_lengths_in_an_update_are_refused_when_the_kernel_runs():
    attend = PagedAttention()
    graph, _ = record(lambda: attend([5, 130]), auto_dispatch_capture=True)

    graph.replay()
    with pytest.raises(RuntimeError, match="561002"):
        graph.update(cpu_update_input=[{"actual_seq_lengths": [1], "actual_seq_lengths_kv": [6]}])


@pytest.mark.parametrize(
    "forbidden,message",
    [
        (lambda x: x.sum().item(), "reads the device from the host"),
        (lambda x: x.cpu(), "copy between host and device"),
        (lambda x: x.tolist(), "copy between host and device|reads the device"),
        (lambda x: x[x > 0], "value-dependent shape"),
        (lambda x: x.nonzero(), "value-dependent shape"),
        (lambda x: x + torch.ones(4).to("npu"), "copy between host and device"),
        (lambda x: torch.randn(4, device="npu"), "random"),
        (lambda x: x.exponential_(), "random"),
        (lambda x: torch.npu.synchronize(), "synchronisation"),
    ],
)
def test_what_a_capture_refuses(forbidden, message):
    x = torch.ones(4).to("npu")

    with pytest.raises(RuntimeError, match=message):
        record(lambda: forbidden(x))


def test_work_on_another_stream_during_capture_is_refused():
    x, default = torch.ones(4).to("npu"), torch.npu.default_stream()

    def step():
        with torch.npu.stream(default):
            return torch.empty(4, device="npu") + x

    with pytest.raises(RuntimeError, match="another stream"):
        record(step)


def test_a_graph_whose_input_was_freed_says_so():
    held = [torch.ones(4).to("npu")]
    graph, _ = record(lambda: held[0] + 1)

    held.clear()

    with pytest.raises(RuntimeError, match="was freed"):
        graph.replay()


def test_graphs_of_one_pool_reuse_memory_and_stay_correct():
    x, pool = torch.arange(4.0).to("npu"), torch.npu.graph_pool_handle()

    first, a = record(lambda: (x + 1) * 2, pool=pool)
    second, b = record(lambda: (x + 3) * 4, pool=pool)

    first.replay()
    assert a.tolist() == [2, 4, 6, 8]
    second.replay()
    assert b.tolist() == [12, 16, 20, 24]


def test_the_suite_runs_at_task_queue_level_1():
    assert torch.npu.get_task_queue_enable() == 1


def test_level_2_refuses_capture_as_the_wheel_does():
    # In a process of its own: after the refusal torch_npu's capturing stream stays current.
    code = """
import npu_sim; npu_sim.start()
import torch
with torch.npu.graph(torch.npu.NPUGraph(), stream=torch.npu.Stream()):
    pass
"""
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])

    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TASK_QUEUE_ENABLE": "2", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )

    assert done.returncode and "Do not support TASK_QUEUE_ENABLE = 2 during NPU graph capture" in done.stderr


def test_the_first_collective_needs_a_store_that_is_still_there(tmp_path):
    from npu_sim.simulator import check_store

    folder = tmp_path / "meeting"
    folder.mkdir()
    store = torch.distributed.PrefixStore("hccl", torch.distributed.FileStore(str(folder / "store"), 1))
    store.set("here", "1")
    check_store(store)

    shutil.rmtree(folder)
    with pytest.raises(RuntimeError, match="broadcastMasterID"):
        check_store(store)
