"""Engines in processes of their own, without Ray: the same answers, live streams, and faults in the middle."""

from __future__ import annotations

import os
import signal
import textwrap
from pathlib import Path

import pytest
from small_engine import generate_while_a_rank_dies, prompts_of, tokens

from ascend_kit import AscendInferEngine, SamplingParams
from ascend_kit.checkpoint.tensor_file import CheckpointError
from ascend_kit.engine import elsewhere, opened_model, replicas
from ascend_kit.engine.core import ReplicasLost
from ascend_kit.engine.elsewhere import describe_device, with_device
from ascend_kit.engine.processes import LocalProcesses, WorkerDied
from ascend_kit.engine.worker import Worker
from ascend_kit.params import build_experiment

pytestmark = pytest.mark.multiproc

SETTINGS = dict(precision="fp32", device="cpu", max_seq_length=512, batch_size=4, block_size=16, kv_cache_gib=0.02)
TESTS = Path(__file__).parent
POISON = 255  # a token no other prompt has


class Poisonable(Worker):
    """A worker that dies as if by the kernel's hand as soon as a poisonous request has come in."""

    def advance(self, requests, cancelled):
        if any(POISON in request.prompt_ids for request in requests):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().advance(requests, cancelled)


class Loud(Worker):
    """A worker that says something and dies."""

    def clock_s(self):
        print("the card is on fire", flush=True)
        os._exit(3)


@pytest.fixture
def local(monkeypatch):
    """All cards are processes of this machine."""
    monkeypatch.setattr(replicas, "_processes", lambda settings: LocalProcesses(Poisonable))
    monkeypatch.setattr(opened_model, "needs_process", lambda kind: True)


def one_card(folder, prompts, sampling):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opened_model, "needs_process", lambda kind: False)
        with AscendInferEngine(folder, **SETTINGS) as engine:
            return [output.token_ids for output in engine.generate(prompts, sampling)]


def test_one_worker_gives_the_same_answers_streams_live_and_survives_its_death(local, tiny_qwen3_dir):
    prompts, sampling = prompts_of(5), SamplingParams(max_new_tokens=150, ignore_eos=True)
    expected = one_card(tiny_qwen3_dir, prompts, sampling)

    with AscendInferEngine(tiny_qwen3_dir, **SETTINGS) as engine:
        assert engine.stats()["replicas"][0]["pids"] != [os.getpid()]
        stream = engine.stream([prompts[0]], sampling)
        first = next(stream)
        assert engine.stats()["output_tokens"] < 150, "the first token is there before the last is written"
        assert [first.token_id, *(event.token_id for event in stream)] == expected[0]
        pids = list(engine.stats()["replicas"][0]["pids"])

        def kill(done, total):
            if pids:
                os.kill(pids.pop(), signal.SIGKILL)

        assert tokens(engine.generate(prompts, sampling, on_progress=kill)) == expected
        assert engine.stats()["restarts"] == 1
        pid = engine.stats()["replicas"][0]["pids"][0]
    assert not Path(f"/proc/{pid}").exists()


def in_parts(experiment, fails, *, on_progress):
    on_progress(1, 2, experiment.experiment)
    if fails:
        raise CheckpointError(f"no such part {fails}")
    return os.getpid()


def hopeless(experiment):
    print("out of memory", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_function_that_opens_a_device_runs_in_a_process_that_is_gone_afterwards(monkeypatch):
    experiment, said = build_experiment({"experiment": "e", "device": "cpu"}), []
    here = with_device(in_parts, experiment, None, on_progress=lambda *given: said.append(given))
    monkeypatch.setattr(elsewhere, "needs_process", lambda kind: True)

    there = with_device(in_parts, experiment, None, on_progress=lambda *given: said.append(given))

    assert here == os.getpid() != there and not Path(f"/proc/{there}").exists()
    assert said == [(1, 2, "e")] * 2
    assert describe_device(experiment)["kind"] == "cpu"
    with pytest.raises(CheckpointError, match="no such part 7"):
        with_device(in_parts, experiment, 7, on_progress=print)
    with pytest.raises(WorkerDied, match=r"(?s)by signal 9.*out of memory"):
        with_device(hopeless, experiment)


def test_replicas_of_two_ranks_answer_as_one_card_and_survive_a_lost_rank(local, tiny_qwen3_dir):
    prompts, sampling = prompts_of(7), SamplingParams(max_new_tokens=40, ignore_eos=True)
    expected = one_card(tiny_qwen3_dir, prompts, sampling)

    with AscendInferEngine(tiny_qwen3_dir, cards=4, tensor_parallel=2, **SETTINGS) as engine:
        quiet, disturbed, rows = generate_while_a_rank_dies(engine, prompts, sampling)

    assert quiet == disturbed == expected
    assert [row["restarts"] for row in rows] == [1, 0] and [row["cards"] for row in rows] == [2, 2]


def test_a_request_that_ends_two_workers_is_reported_and_the_rest_completes(local, tiny_qwen3_dir):
    prompts = prompts_of(9)
    prompts[4] = [1, POISON, 2]

    with AscendInferEngine(tiny_qwen3_dir, **SETTINGS) as engine:
        outputs = engine.generate(prompts, SamplingParams(max_new_tokens=6))

        assert [output.index for output in outputs if output.finish_reason == "error"] == [4]
        assert "2 replicas were lost" in outputs[4].error and "ended by signal 9" in outputs[4].error
        assert engine.stats()["restarts"] == 2


def test_a_worker_that_cannot_start_again_is_an_error_with_what_had_finished(local, tiny_qwen3_dir, monkeypatch):
    monkeypatch.setattr(LocalProcesses, "total_cards", lambda self: 0)
    sampling = [SamplingParams(max_new_tokens=2), SamplingParams(max_new_tokens=400, ignore_eos=True)]

    with AscendInferEngine(tiny_qwen3_dir, **SETTINGS) as engine:
        pids = list(engine.stats()["replicas"][0]["pids"])

        def kill(done, total):
            while done and pids:
                os.kill(pids.pop(), signal.SIGKILL)

        with pytest.raises(ReplicasLost, match="all 1 replicas are lost") as caught:
            engine.generate(prompts_of(2), sampling, on_progress=kill)

    assert [output.index for output in caught.value.outputs] == [0]


def test_an_error_while_loading_is_the_workers_own(local, tiny_qwen3_dir):
    with pytest.raises(ValueError, match="does not hold one block"):
        AscendInferEngine(tiny_qwen3_dir, **{**SETTINGS, "kv_cache_gib": 1e-9}).load_model()


def test_a_dead_worker_tells_what_it_wrote_last():
    processes = LocalProcesses(Loud)
    (worker,) = processes.create(1)

    call = processes.call(worker, "clock_s")
    processes.wait([call], 60)

    with pytest.raises(WorkerDied, match=r"(?s)exit status 3.*the card is on fire"):
        processes.result(call)
    with pytest.raises(WorkerDied):
        processes.result(processes.call(worker, "clock_s"))
    processes.close()


SITECUSTOMIZE = """
import sys

if any("ascend_kit.engine.processes" in word for word in sys.orig_argv):
    import npu_sim

    npu_sim.start(1)
"""
IN_KERNEL = """
import os, signal, sys, time
from ascend_kit import AscendInferEngine, SamplingParams
from ascend_kit.engine.elsewhere import describe_device, with_device
from ascend_kit.measure.agreement import convert_and_compare
from ascend_kit.params import build_experiment

with open("prompts.txt", "w") as file:
    file.write("one\\ntwo\\n")
experiment = build_experiment(dict(experiment="e", device="npu", input_model=FOLDER, output_model="converted",
                                   precision="fp32", prompts_file="prompts.txt", max_seq_length=512))
described = describe_device(experiment)
converted = with_device(convert_and_compare, experiment, on_progress=lambda *given: None)
apart = [described["kind"], described["task_queue_level"], len(converted["rows"]), converted["failures"]]
engine = AscendInferEngine(FOLDER, precision="fp32", device="npu", max_seq_length=512, batch_size=4, block_size=128,
                           kv_cache_gib=0.02, graph_mode=True).load_model()
level = engine.device.task_queue_level()
sampling = SamplingParams(max_new_tokens=12, ignore_eos=True)
streamed = [event.token_id for event in engine.stream([[1, 2, 3]], sampling)]
pids = list(engine.stats()["replicas"][0]["pids"])
def kill(done, total):
    while pids:
        os.kill(pids.pop(), signal.SIGKILL)
after = engine.generate([[1, 2, 3]], sampling, on_progress=kill)[0]
graphs = engine.stats()["graphs"]["mode"]
print("RESULT", [level, engine.device.kind, graphs, "torch_npu" in sys.modules, streamed, after.token_ids,
                 engine.stats()["restarts"], apart])
engine.close()
"""


@pytest.mark.npu
def test_in_a_notebooks_kernel_an_npu_engine_runs_in_a_process_with_its_task_queue_on(tmp_path, sim, device):
    """A real ipykernel: torch_npu is never imported there, and the kernel outlives its worker."""
    from conftest import make_model
    from jupyter_client.manager import start_new_kernel

    folder = make_model(tmp_path / "m", "qwen3", head_dim=128)
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    path = os.pathsep.join([str(tmp_path), str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "TASK_QUEUE_ENABLE": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    manager, client = start_new_kernel(kernel_name="python3", env=environment, cwd=str(tmp_path))
    said: list[str] = []

    def hear(message):
        content = message["content"]
        said.append(content.get("text", "") + "\n".join(content.get("traceback", [])))

    try:
        reply = client.execute_interactive(
            textwrap.dedent(IN_KERNEL).replace("FOLDER", repr(str(folder))), timeout=400, output_hook=hear
        )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)

    assert reply["content"]["status"] == "ok", "".join(said)[-3000:]
    (line,) = [line for line in "".join(said).splitlines() if line.startswith("RESULT")]
    with AscendInferEngine(folder, **{**SETTINGS, "block_size": 128}) as engine:
        expected = engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=12, ignore_eos=True))[0].token_ids
    assert line == f"RESULT {[1, 'npu', 'npu_graph', False, expected, expected, 1, ['npu', 1, 2, []]]}"
