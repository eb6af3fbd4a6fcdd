"""Captured decode steps give the plain step's logits, and say what is wrong where they cannot."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from graph_steps import BLOCK, STEPS, VOCABULARY, TinyStep, decode_inputs, make_graphs

from ascend_kit.device import graphs
from ascend_kit.device.advice import advice
from ascend_kit.device.device import select_device
from ascend_kit.device.graphs import GraphError, GraphHang, decode_sizes, memory_reserve, prompt_sizes, wait_until
from ascend_kit.device.ops import AttentionMeta


@pytest.mark.npu
@pytest.mark.parametrize("update_first", ["0", "1"])
def test_captured_steps_equal_plain_ones_whatever_the_batch(update_first, monkeypatch, device):
    monkeypatch.setenv(graphs.UPDATE_FIRST_VARIABLE, update_first)
    selected = select_device(device)
    plain, captured = (TinyStep(device, "npu") for _ in range(2))
    runner = make_graphs(captured, selected)
    info = runner.capture()

    for number, lengths in enumerate(STEPS):
        got = runner.run(*decode_inputs(lengths, seed=number)).clone()
        expected = plain(*decode_inputs(lengths, device, seed=number))
        assert torch.equal(got.cpu(), expected.cpu()), lengths

    assert (info["mode"], info["sizes"]) == ("npu_graph", [1, 2, 4])
    assert info["capture_s"] > 0 and info["capture_bytes"] > 0
    assert {k: runner.info()[k] for k in ("replays", "rows", "padded_rows")} == dict(replays=5, rows=13, padded_rows=2)
    untouched = [(a.cpu()[1:] == b.cpu()[1:]).all() for a, b in zip(plain.cache, captured.cache, strict=True)]
    assert all(untouched), "dead rows may write to block 0 only"


def prompt_inputs(chunks, seed=0):
    """A step of chunks (new tokens, tokens with them), each sequence in blocks of its own."""
    counts, lengths = (list(numbers) for numbers in zip(*chunks, strict=True))
    _, _, last = decode_inputs(lengths)
    owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    positions = torch.cat([torch.arange(length - new, length) for new, length in chunks]).int()
    tokens = torch.randint(0, VOCABULARY, (sum(counts),), generator=torch.Generator().manual_seed(seed))
    blocks = last.block_table[owners, (positions // BLOCK).long()]
    ends = torch.tensor(counts).cumsum(0).tolist()
    meta = AttentionMeta(
        blocks * BLOCK + positions % BLOCK, last.block_table, ends, lengths, last.context_lens_t, BLOCK, False
    )
    return tokens.int(), positions, meta


def on_device(inputs, device):
    tokens, positions, meta = inputs
    names = ("slot_mapping", "block_table", "context_lens_t")
    meta = replace(meta, **{name: getattr(meta, name).to(device) for name in names})
    return tokens.to(device), positions.to(device), meta


# Chunks with and without a context, decodes among them; full and padded sizes; one sequence and as many as may be.
PROMPT_STEPS = [[(1, 5), (1, 130), (50, 50), (20, 140)], [(128, 128)], [(7, 300)], [(1, 4), (200, 201)], [(3, 3)] * 4]


@pytest.mark.npu
def test_captured_steps_with_prompts_equal_plain_ones_and_write_nowhere_else(sim, device):
    plain, captured = (TinyStep(device, "npu") for _ in range(2))
    runner = make_graphs(captured, select_device(device), prompt_fn=captured, prompt_sizes=prompt_sizes(256, BLOCK))
    sim.reset()
    info = runner.capture()
    assert info["prompt_sizes"] == [128, 256] and sim.counts.captures == 3 + 2
    for mine, theirs in zip(captured.cache, plain.cache, strict=True):
        mine.copy_(theirs)  # a capture writes over blocks that nothing is in yet

    for number, chunks in enumerate(PROMPT_STEPS):
        inputs = prompt_inputs(chunks, seed=number)
        sim.reset()
        got = runner.run_prompts(*inputs).clone()
        assert (sim.counts.replays, sim.counts.updates, sim.counts.uploads, sim.counts.num_syncs) == (1, 1, 1, 0)
        torch.testing.assert_close(got.cpu(), plain(*on_device(inputs, device)).cpu(), rtol=0, atol=0)
        # A decode step between them has its own lengths.
        step = decode_inputs([130, 1, 300], seed=number)
        assert torch.equal(runner.run(*step).cpu(), plain(*on_device(step, device)).cpu())

    counted = {name: runner.info()[name] for name in ("prompt_replays", "prompt_tokens", "padded_tokens")}
    assert counted == dict(prompt_replays=5, prompt_tokens=72 + 128 + 7 + 201 + 12, padded_tokens=56 + 121 + 55 + 116)
    assert not runner.can_run_prompts(257, 1) and not runner.can_run_prompts(20, 5)
    for a, b in zip(plain.cache, captured.cache, strict=True):
        assert torch.equal(a.cpu()[1:], b.cpu()[1:]), "dead tokens may write to block 0 only"


@pytest.mark.npu
def test_inputs_may_lie_on_the_device_already(device):
    step = TinyStep(device, "npu")
    runner = make_graphs(step, select_device(device))

    got = runner.run(*decode_inputs([130, 1, 300], device)).cpu()

    assert torch.equal(got, step(*decode_inputs([130, 1, 300], device)).cpu())


@pytest.mark.npu
def test_a_captured_step_costs_one_replay_one_upload_and_no_synchronisation(sim, device):
    runner = make_graphs(TinyStep(device, "npu"), select_device(device))
    runner.capture()
    sim.reset()

    runner.run(*decode_inputs([130, 1, 300]))

    counts = sim.counts
    assert (counts.replays, counts.updates, counts.uploads) == (1, 1, 1)
    assert (counts.num_launches, counts.num_syncs) == (0, 0)


def reserved_bytes() -> int:
    """What the allocator holds, without what earlier tests left to be collected."""
    gc.collect()
    torch.npu.empty_cache()
    return torch.npu.memory_reserved()


@pytest.mark.npu
def test_graphs_of_all_sizes_share_the_memory_of_the_largest(device):
    """Temporaries of 32 MiB a graph: on a stream each they would reserve four times that."""
    step, temporary = TinyStep(device, "npu"), 32 << 20

    def wasteful(token_ids, positions, meta):
        logits = step(token_ids, positions, meta)
        return logits + torch.empty(temporary, dtype=torch.uint8, device=device)[:1].to(logits.dtype) * 0

    wasteful.ops = step.ops
    runner = make_graphs(wasteful, select_device(device), max_batch=8)
    before = reserved_bytes()

    runner.capture()

    assert len(runner.sizes) == 4
    assert temporary <= reserved_bytes() - before < 2 * temporary


@pytest.mark.npu
def test_sizes_with_prompts_share_the_memory_of_the_largest_step(device):
    step, row = TinyStep(device, "npu"), 1 << 17

    def wasteful(token_ids, positions, meta):
        wide = torch.empty(len(token_ids), row, dtype=torch.uint8, device=device)
        return step(token_ids, positions, meta) + wide[:, :1].to(torch.bfloat16) * 0

    wasteful.ops = step.ops
    before = reserved_bytes()

    runner = make_graphs(wasteful, select_device(device), prompt_fn=wasteful, prompt_sizes=prompt_sizes(512, BLOCK))
    assert len(runner.capture()["prompt_sizes"]) == 4

    assert 512 * row <= reserved_bytes() - before < 1.5 * 512 * row


@pytest.mark.npu
@pytest.mark.parametrize("batch", [129, 200])
def test_batches_beyond_a_block_of_slots_decode_in_graphs(batch, device):
    step = TinyStep(device, "npu")
    runner = make_graphs(step, select_device(device), max_batch=256)
    lengths = [1] * batch
    slots = torch.arange(2 * BLOCK, 2 * BLOCK + batch, dtype=torch.int32)
    table = (slots // BLOCK).unsqueeze(1)
    meta = AttentionMeta(
        slots, table, list(range(1, batch + 1)), lengths, torch.ones(batch, dtype=torch.int32), BLOCK, True
    )
    tokens = torch.arange(batch, dtype=torch.int32) % VOCABULARY

    got = runner.run(tokens, torch.zeros(batch, dtype=torch.int32), meta).cpu()

    assert runner.sizes[-1] == 256 and torch.isfinite(got.float()).all() and got.shape == (batch, VOCABULARY)


@pytest.mark.npu
def test_a_replay_that_never_ends_is_reported_with_advice(sim, monkeypatch, device):
    runner = make_graphs(TinyStep(device, "npu"), select_device(device), timeout_s=0.05)
    runner.capture()
    monkeypatch.setattr(runner, "_update", lambda *_: None)

    runner.run(*decode_inputs([5]))

    with pytest.raises(GraphHang, match="HCCL_OP_EXPANSION_MODE"):
        runner.wait()


@pytest.mark.npu
def test_a_capture_at_task_queue_level_2_is_refused_with_the_level_to_set(device):
    torch.npu.set_task_queue_enable(2)
    try:
        with pytest.raises(GraphError, match="export TASK_QUEUE_ENABLE=1"):
            make_graphs(TinyStep(device, "npu"), select_device(device)).capture()
    finally:
        torch.npu.set_task_queue_enable(1)


@pytest.mark.npu
def test_a_host_read_inside_the_step_is_reported_as_such(device):
    step = TinyStep(device, "npu")

    def reads(token_ids, positions, meta):
        return step(token_ids, positions, meta) * float(meta.context_lens_t.max())

    reads.ops = step.ops
    with pytest.raises(GraphError, match=r"cannot be recorded.*reads the device"):
        make_graphs(reads, select_device(device)).capture()


@pytest.mark.npu
def test_a_step_that_needs_host_lengths_is_not_captured_with_frozen_ones(device):
    with pytest.raises(GraphError, match="reads its lengths on the host"):
        make_graphs(TinyStep(device, "npu"), select_device(device), host_lengths=False).capture()


@pytest.mark.npu
def test_the_next_inputs_are_queued_while_a_replay_is_under_way(sim, monkeypatch, device):
    """The device is held back: a replay gets its lengths only when the step behind it waits for it."""
    plain, captured = (TinyStep(device, "npu") for _ in range(2))
    runner = make_graphs(captured, select_device(device))
    runner.capture()
    update, held, uploads, found, sources = runner._update, [], [], [], set()

    def wait():
        uploads.append(sim.counts.uploads)
        sources.add(runner._captured[2].inputs.host.data_ptr())
        if held:
            update(*held.pop())
            found.append(runner._captured[2].result.cpu())

    monkeypatch.setattr(runner, "_update", lambda *call: held.append(call))
    monkeypatch.setattr(runner, "wait", wait)
    steps = [decode_inputs(lengths, seed=number) for number, lengths in enumerate([[5, 6], [130, 2], [7, 8]])]
    sim.reset()
    for step in steps:
        runner.run(*step)
    counted = list(uploads)
    wait()

    assert counted == [1, 2, 3] and len(sources) == 2, "two page-locked buffers take turns"
    for got, step in zip(found, steps, strict=True):
        assert torch.equal(got, plain(*on_device(step, device)).cpu())


@pytest.mark.npu
def test_a_second_step_waits_for_an_unfinished_replay(sim, monkeypatch, device):
    runner = make_graphs(TinyStep(device, "npu"), select_device(device), timeout_s=0.05)
    runner.capture()
    monkeypatch.setattr(runner, "_update", lambda *_: None)
    runner.run(*decode_inputs([5]))

    with pytest.raises(GraphHang):
        runner.run(*decode_inputs([6]))


def test_sizes_are_few_ascending_and_end_with_the_largest_batch():
    assert decode_sizes(1) == [1]
    assert decode_sizes(16) == [1, 2, 4, 8, 16]
    assert decode_sizes(24) == [1, 2, 4, 8, 16, 24]
    assert len(decode_sizes(256)) == 12
    assert decode_sizes(1000)[-2:] == [768, 1000]


def test_sizes_with_prompts_are_a_block_apart_and_end_with_the_largest_step():
    assert prompt_sizes(256, 128) == prompt_sizes(256, 1024) == [128, 256]
    assert prompt_sizes(300, 128) == [128, 256, 300] and prompt_sizes(40, 128) == [40]
    assert prompt_sizes(256, 16) == [16, 32, 48, 64]
    assert prompt_sizes(0, 128) == []


def test_memory_for_graphs_collectives_and_activations_is_kept_free():
    shape = dict(num_heads=32, widest=24576, hidden_size=4096, vocab_size=151936, batch_size=4, step_tokens=2048)

    kept = memory_reserve("npu", **shape, graph_mode=True, prompt_sizes=[128, 256], communicates=True)

    # 16 MiB + 24 x 65,536 x 48 B + 2 x 24 x 128 x 128 x 4 x 32 B; logits of the sizes 1, 2 and 4, hidden states of 128
    # and 256 tokens, and four of the widest rows of 256
    attention = 16_777_216 + 75_497_472 + 100_663_296
    assert kept["graphs"] == attention + 2 * 151936 * 7 + 2 * 4096 * 384 + 4 * 256 * 24576 * 2
    assert kept["collectives"] == 400 << 20
    assert kept["activations"] == 4 * 2048 * 24576 * 2 + 2 * 4 * 151936 * 4
    rest = dict(prompt_sizes=[], communicates=True)
    assert memory_reserve("npu", **shape, **rest, graph_mode=False)["graphs"] == 0
    assert memory_reserve("cpu", **shape, **rest, graph_mode=True) == {}


def test_waiting_ends_when_done_and_raises_when_not():
    answers = iter([False, False, True])

    wait_until(lambda: next(answers), 1.0, "this")
    with pytest.raises(GraphHang, match=r"that did not finish within 0\.01 s"):
        wait_until(lambda: False, 0.01, "that")


def test_errors_of_the_field_are_explained():
    assert "fewer batch sizes" in advice("error code 207008")
    assert "lengths" in advice("aclnn 561002")
    assert advice("something else", "otherwise this") == "otherwise this"
