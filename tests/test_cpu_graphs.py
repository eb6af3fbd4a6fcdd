"""Decode steps on a CPU: recorded, compiled, or as they are where neither can be."""

from __future__ import annotations

import pytest
import torch
from graph_steps import STEPS, TinyStep, decode_inputs, make_graphs

from ascend_kit.device.device import select_device
from ascend_kit.device.ops import native


def test_a_cpu_step_gives_the_plain_logits_for_every_batch_and_width(monkeypatch):
    step = TinyStep("cpu", "cpu", torch.float32)
    runner = make_graphs(step, select_device("cpu"))
    # Compiling takes half a minute; what surrounds it does not depend on it.
    monkeypatch.setattr(runner._compiled, "step_fn", step)

    for number, lengths in enumerate(STEPS):
        got = runner.run(*decode_inputs(lengths, seed=number)).clone()
        torch.testing.assert_close(got, step(*decode_inputs(lengths, seed=number)), rtol=1e-5, atol=1e-5)

    assert runner.info()["replays"] == len(STEPS)


@pytest.mark.skipif(native.library() is None, reason=f"CPU kernels are {native.status()}")
def test_a_recorded_cpu_step_repeats_the_torch_operators_between_its_kernels():
    step = TinyStep("cpu", "cpu", torch.float32)  # adds in torch; the tail writes in place and copies a strided view
    tail = lambda *inputs: step(*inputs).mul_(2).t().contiguous().t()  # noqa: E731
    runner = make_graphs(step, select_device("cpu"), records=True)
    runner._compiled.step_fn = tail

    for number, lengths in enumerate([*STEPS, *STEPS]):
        got = runner.run(*decode_inputs(lengths, seed=number)).clone()
        torch.testing.assert_close(got, 2 * step(*decode_inputs(lengths, seed=number)), rtol=1e-5, atol=1e-5)

    assert runner.info()["mode"] == "recorded_calls"


@pytest.mark.parametrize("records", [True, False])
def test_a_cpu_step_that_cannot_be_recorded_runs_eagerly_and_says_why(records):
    step = TinyStep("cpu", "cpu", torch.float32)
    reading = lambda ids, *rest: step(ids, *rest) * (1 + int(ids.sum().item() < 0))  # noqa: E731

    with pytest.warns(UserWarning, match="without a graph: .*(reads numbers|plain attention)"):
        runner = make_graphs(step, select_device("cpu"), records=records)
        if records:
            runner._compiled.step_fn = runner.step_fn = reading
        got = runner.run(*decode_inputs(STEPS[0]))

    torch.testing.assert_close(got, step(*decode_inputs(STEPS[0])))
    assert runner.info()["mode"].startswith("eager (")


def test_a_prefill_or_a_batch_too_large_is_refused():
    runner = make_graphs(TinyStep("cpu", "cpu", torch.float32), select_device("cpu"), max_batch=2)
    ids, positions, meta = decode_inputs([3, 4])
    meta.is_decode = False

    with pytest.raises(ValueError, match="prefill"):
        runner.run(ids, positions, meta)
    with pytest.raises(ValueError, match="does not fit"):
        runner.run(*decode_inputs([1, 2, 3]))
