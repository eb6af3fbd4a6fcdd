"""The sweep over a small stand-in engine that keeps the add_request / step contract, then the real one."""

import contextlib
import itertools
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from ascend_kit.device import power, processor_time
from ascend_kit.device.device import select_device
from ascend_kit.engine.sequence import RequestOutput, SamplingParams, Timeline
from ascend_kit.identity import Identity
from ascend_kit.measure import engines, sweep
from ascend_kit.measure.apart import BackendElsewhere
from ascend_kit.measure.baseline import TransformersBackend
from ascend_kit.measure.engines import EngineBackend, quantize_scheme
from ascend_kit.measure.metrics import RequestRecord
from ascend_kit.measure.points import PointForecast, check_complete
from ascend_kit.measure.rows import SweepError, failed_points
from ascend_kit.measure.workload import make_requests
from ascend_kit.model.config import ModelConfig
from ascend_kit.params import build_experiment
from ascend_kit.results import RunFolder
from ascend_kit.stages import RunRecord

CEILINGS = {"device": "stand-in", "bf16_flops_per_s": 1e9, "int8_ops_per_s": None, "read_bytes_per_s": 1e9,
            "launch_s": 1e-7}  # fmt: skip
CONFIG = ModelConfig("qwen3", 2, 8, 2, 1, 4, 16, 1000, tie_embeddings=True, qk_norm=True)


class StandInDevice(SimpleNamespace):
    kind, name, peak, total_memory_bytes = "cpu", "stand-in", None, 2**30

    def versions(self):
        return {"torch": "stand-in"}

    def facts(self):
        return {"name": "stand-in"}

    def task_queue_level(self):
        return None

    def synchronize(self):
        pass

    def reset_peak_memory(self):
        pass

    def peak_memory_bytes(self):
        return 12345

    def memory_in_use_bytes(self):
        return 1234


class StandInEngine:
    """One token per running request and step. `break_on` names prompt lengths whose step raises."""

    def __init__(self, slots=4, break_on=(), short_on=(), step_s=0.0, weights="weights", **settings):
        self.identity = Identity(weights=weights, engine={"kind": "ascend_kit", **settings})
        self.num_loads = 0
        self.config, self.device, self.max_seq_length = CONFIG, StandInDevice(), 512
        self.model_path = None
        self.settings = SimpleNamespace(why_synchronous=lambda kind: "a stand-in")
        self.slots, self.break_on, self.short_on, self.step_s = slots, set(break_on), set(short_on), step_s
        self.sequences, self.prompts, self.most_in_flight, self.cancelled = {}, [], 0, []

    def load_model(self):
        self.num_loads += 1
        return self

    def close(self):
        self.sequences.clear()

    def stats(self):
        return {"weight_bytes": 4000}

    @property
    def has_unfinished(self):
        return bool(self.sequences)

    def add_request(self, prompt, sampling, arrival_s=None):
        assert isinstance(prompt, list) and isinstance(sampling, SamplingParams) and sampling.ignore_eos
        index = len(self.prompts)
        self.prompts.append(tuple(prompt))
        self.sequences[index] = (prompt, sampling, Timeline(arrival_s))
        self.most_in_flight = max(self.most_in_flight, len(self.sequences))
        return index

    def step(self):
        time.sleep(self.step_s)
        now, finished = time.perf_counter(), []
        for index in list(self.sequences)[: self.slots]:
            prompt, sampling, timeline = self.sequences[index]
            if len(prompt) in self.break_on:
                raise MemoryError("KV pool too small")
            timeline.token_times_s.append(now)
            wanted = sampling.max_new_tokens - (len(prompt) in self.short_on)
            if len(timeline.token_times_s) >= wanted:
                del self.sequences[index]
                finished.append(self._output(index, prompt, timeline))
        return finished

    def cancel(self, index):
        self.cancelled.append(index)
        self.sequences.pop(index, None)

    def _output(self, index, prompt, timeline):
        timeline.finished_s = timeline.token_times_s[-1]
        tokens = [1] * len(timeline.token_times_s)
        return RequestOutput(index, prompt, tokens, "", "length", None, None, timeline, 0, 0)


def experiment_for(tmp_path, **changes):
    values = dict(
        experiment="sweep", output_root=str(tmp_path), max_seq_length=512, max_new_tokens=8, batch_size=4,
        sweep_concurrency=[1, 2], sweep_prompt_len=[8, 16], sweep_output_len=[4],
    )  # fmt: skip
    return build_experiment({**values, **changes})


@pytest.fixture(autouse=True)
def plain_weights(monkeypatch):
    """The stand-in engine has no checkpoint to read its scheme from."""
    real = engines.quantize_scheme
    monkeypatch.setattr(engines, "quantize_scheme", lambda folder: "none" if folder is None else real(folder))


@contextlib.contextmanager
def opened(experiment):
    with RunFolder.open(experiment, stage="04_throughput") as folder:
        yield folder


def test_sweep_writes_one_row_per_point_with_units_and_raw_requests(tmp_path, monkeypatch):
    monkeypatch.setattr(processor_time, "SHORTEST_S", 0.0)
    experiment = experiment_for(tmp_path, sweep_repeats=2)
    with opened(experiment) as folder:
        rows = sweep.run_sweep(StandInEngine(step_s=0.001), experiment, folder, ceilings=CEILINGS)
        requests = folder.load("requests")

    assert len(rows) == 2 * 2 * 2
    assert set(rows["status"]) == {"ok"}
    assert list(rows["repeat"]) == [0] * 4 + [1] * 4  # repeats outermost
    assert (rows["num_requests"] == 4).all() and (rows["output_tokens"] == 16).all()
    assert rows[["ttft_p50_ms", "tpot_p50_ms", "itl_p99_ms", "e2e_p90_ms", "output_tokens_per_s"]].notna().all(None)
    assert (rows["peak_memory_bytes"] == 12345).all() and (rows["weight_bytes"] == 4000).all()
    assert (rows["decode_floor_ms"] > 0).all() and (rows["ceiling_tokens_per_s"] > 0).all()
    if sys.platform == "linux":
        assert (rows["own_cpu_cores"] >= 0).all() and (rows["other_cpu_cores"] >= 0).all()
    joined = rows.merge(requests, on="point_id")
    assert len(joined) == 8 * 4
    assert all(len(times) == 4 for times in requests["token_times_s"])


def test_rows_of_a_card_have_its_power_and_the_energy_of_a_token_others_have_none(tmp_path, monkeypatch):
    tool = tmp_path / "npu-smi"
    tool.write_text(f"#!/bin/sh\ncat {Path(__file__).parent}/data/npu_smi_info_910b.txt\n")
    tool.chmod(0o755)
    experiment = experiment_for(tmp_path, sweep_concurrency=[4], sweep_prompt_len=[8])
    with opened(experiment) as folder:
        (row,) = sweep.run_sweep(StandInEngine(), experiment, folder, ceilings=CEILINGS).to_dict("records")
    assert "energy_j_per_output_token" in row and row["power_source"] in (None, "rapl")

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "2,3")
    monkeypatch.setattr(StandInDevice, "kind", "npu")
    monkeypatch.setattr(power, "INTERVAL_S", 0.02)
    with opened(experiment_for(tmp_path, run="npu", sweep_concurrency=[4], sweep_prompt_len=[8])) as folder:
        engine = StandInEngine(step_s=0.1)
        (row,) = sweep.run_sweep(engine, experiment, folder, ceilings=CEILINGS).to_dict("records")

    assert row["power_w"] == pytest.approx(92.7) and row["power_source"] == "npu-smi"  # of the third card
    assert row["energy_j_per_output_token"] * row["output_tokens"] == pytest.approx(92.7 * row["wall_s"], rel=0.1)


def test_closed_loop_keeps_exactly_the_stated_number_in_flight(tmp_path):
    for concurrency in (1, 3):
        engine = StandInEngine(slots=8)
        backend = EngineBackend(engine, experiment_for(tmp_path))

        records = backend.run(make_requests(7, 8, 5, vocab_size=1000), concurrency)

        assert engine.most_in_flight == concurrency
        assert sorted(r.index for r in records) == list(range(7))


def test_request_arrives_when_a_place_is_free_and_queueing_counts_into_ttft(tmp_path):
    engine = StandInEngine(slots=1, step_s=0.002)
    backend = EngineBackend(engine, experiment_for(tmp_path))

    records = sorted(backend.run(make_requests(2, 8, 5, vocab_size=1000), 2), key=lambda r: r.index)
    first, second = records

    assert second.arrival_s < first.token_times_s[0]  # both in flight from the start
    assert second.token_times_s[0] > first.token_times_s[-1]  # but one slot: the second waits its turn
    alone = sorted(backend.run(make_requests(2, 8, 5, vocab_size=1000), 1), key=lambda r: r.index)
    assert alone[1].arrival_s >= alone[0].token_times_s[-1]


def test_no_prompt_is_seen_twice_in_a_sweep_warm_up_included(tmp_path):
    experiment, engine = experiment_for(tmp_path, sweep_repeats=2), StandInEngine()
    with opened(experiment) as folder:
        sweep.run_sweep(engine, experiment, folder, ceilings=CEILINGS)

    assert len(set(engine.prompts)) == len(engine.prompts)
    measured = 2 * 2 * 2 * 4
    assert len(engine.prompts) == measured + 2 * (1 + 2)  # a warm-up per concurrency and prompt length


def test_failing_point_becomes_a_row_and_the_sweep_goes_on(tmp_path):
    experiment, engine = experiment_for(tmp_path), StandInEngine(break_on=[8])
    with opened(experiment) as folder:
        rows = sweep.run_sweep(engine, experiment, folder, ceilings=CEILINGS)

    bad, good = rows[rows["prompt_len"] == 8], rows[rows["prompt_len"] == 16]
    assert list(bad["status"]) == ["failed", "failed"]
    assert (bad["error"] == "MemoryError: KV pool too small").all()
    assert bad["output_tokens_per_s"].isna().all()
    assert list(good["status"]) == ["ok", "ok"]
    assert engine.cancelled and not engine.has_unfinished
    assert len(failed_points(rows)) == 2


def test_wrong_number_of_tokens_is_a_failure_and_not_a_fast_result(tmp_path):
    experiment = experiment_for(tmp_path)
    with opened(experiment) as folder:
        rows = sweep.run_sweep(StandInEngine(short_on=[16]), experiment, folder, ceilings=CEILINGS)

    error = rows[rows["prompt_len"] == 16].iloc[0]["error"]
    assert "asked for 4 tokens and gave 3" in error


def test_resume_measures_only_what_is_missing_or_failed(tmp_path):
    experiment = experiment_for(tmp_path)
    with opened(experiment) as folder:
        sweep.run_sweep(StandInEngine(break_on=[8]), experiment, folder, ceilings=CEILINGS)
    engine, seen = StandInEngine(), []
    with opened(experiment) as folder:
        rows = sweep.run_sweep(engine, experiment, folder, ceilings=CEILINGS, on_progress=lambda *a: seen.append(a))

    assert {len(prompt) for prompt in engine.prompts} == {8}
    assert (rows["status"] == "ok").sum() == 4
    assert failed_points(rows).empty
    assert [done for done, _, _ in seen] == [1, 2, 3, 4]
    assert sorted(text.endswith("already done") for *_, text in seen) == [False, False, True, True]


def test_a_sweep_grows_and_shows_what_is_asked(tmp_path):
    experiment = experiment_for(tmp_path)
    with opened(experiment) as folder:
        before = sweep.run_sweep(StandInEngine(), experiment, folder, ceilings=CEILINGS)
        engine, more = StandInEngine(), experiment.with_changes(sweep_concurrency=[1, 2, 8])
        grown = sweep.run_sweep(engine, more, folder, ceilings=CEILINGS)
        fewer = sweep.run_sweep(engine, experiment.with_changes(sweep_concurrency=[8]), folder, ceilings=CEILINGS)
        kept = list(folder.rows("rows"))

    assert engine.most_in_flight == 8 and len(engine.prompts) == 2 * (16 + 8)  # concurrency 8 alone, and its warm-up
    assert list(grown["concurrency"]) == [1, 2, 8] * 2
    assert set(before["point_id"]) <= set(grown["point_id"])
    assert list(fewer["concurrency"]) == [8, 8]
    assert len(kept) == 6  # what is not asked any more stays in its file


@pytest.mark.parametrize("changed", [{"weights": "other"}, {"quantize": "w8a8"}, {"seed": 1}])
def test_another_identity_is_measured_again_and_never_shown_beside_the_first(tmp_path, changed):
    experiment = experiment_for(tmp_path)
    with opened(experiment) as folder:
        first = sweep.run_sweep(StandInEngine(), experiment, folder, ceilings=CEILINGS)
        engine = StandInEngine(**changed)
        rows = sweep.run_sweep(engine, experiment, folder, ceilings=CEILINGS)
        again = sweep.run_sweep(StandInEngine(), experiment, folder, ceilings=CEILINGS)

    assert engine.prompts and len(rows) == 4
    assert not set(rows["point_id"]) & set(first["point_id"])
    assert list(again["point_id"]) == list(first["point_id"])  # the first weights are back, and so are their rows


def test_another_seed_or_limit_is_another_point(tmp_path):
    experiment, engine = experiment_for(tmp_path), StandInEngine()
    with opened(experiment) as folder:
        sweep.run_sweep(StandInEngine(), experiment, folder, ceilings=CEILINGS)
        rows = sweep.run_sweep(engine, experiment.with_changes(seed=3), folder, ceilings=CEILINGS)
        limited = sweep.run_sweep(engine, experiment.with_changes(ttft_limit_ms=1e4), folder, ceilings=CEILINGS)

    assert (rows["seed"] == 3).all() and len(rows) == 4
    assert (limited["goodput_requests_per_s"] > 0).all() and len(limited) == 4


def test_engine_is_loaded_by_the_first_point_that_needs_it_and_afresh_after_a_failure(tmp_path):
    experiment, engine = experiment_for(tmp_path), StandInEngine(break_on=[8])
    closed = []
    engine.close = lambda: closed.append(len(engine.prompts))
    with opened(experiment) as folder:
        sweep.run_sweep(engine, experiment, folder, ceilings=CEILINGS)
        idle = StandInEngine()
        sweep.run_sweep(idle, experiment.with_changes(sweep_prompt_len=[16]), folder, ceilings=CEILINGS)

    assert len(closed) == 2  # after each of the two failed points
    assert idle.num_loads == 0


def test_engine_that_cannot_be_loaded_fails_every_point_after_one_try(tmp_path):
    experiment, engine = experiment_for(tmp_path), StandInEngine()
    tries = []

    def load():
        tries.append(1)
        raise MemoryError("no room for the weights")

    engine.load_model = load
    with opened(experiment) as folder:
        rows = sweep.run_sweep(engine, experiment, folder, ceilings=CEILINGS)

    assert len(tries) == 1
    assert list(rows["error"]) == ["MemoryError: no room for the weights"] * 4


def test_impossible_points_become_rows_with_their_reason_and_cost_nothing(tmp_path):
    experiment, engine = experiment_for(tmp_path), StandInEngine()
    engine.max_seq_length = 18
    with opened(experiment) as folder:
        rows = sweep.run_sweep(engine, experiment, folder, ceilings=CEILINGS)
        again = sweep.run_sweep(StandInEngine(), experiment, folder, ceilings=CEILINGS)
        folder.close()
        state = RunRecord.read(folder.path).stages["04_throughput"].state

    pruned = rows[rows["prompt_len"] == 16]
    assert list(pruned["status"]) == ["pruned"] * 2 and len(engine.prompts[0]) == 8
    assert pruned["error"].str.startswith("16 + 4 tokens are above max_seq_length 18; lower prompt_len").all()
    assert all(len(prompt) == 8 for prompt in engine.prompts) and state == "ok"
    assert list(again["status"]) == ["ok"] * 4  # a pruned point is measured once it can be
    with opened(experiment) as folder, pytest.raises(SweepError, match="no point can be measured"):
        engine.max_seq_length = 10
        sweep.run_sweep(engine, experiment, folder, ceilings=CEILINGS)


def test_interrupt_stops_the_sweep_and_keeps_what_was_measured(tmp_path):
    experiment, engine = experiment_for(tmp_path), StandInEngine()

    def stop_after_two(done, total, text):
        if done == 2:
            raise KeyboardInterrupt

    with opened(experiment) as folder:
        with pytest.raises(KeyboardInterrupt):
            sweep.run_sweep(engine, experiment, folder, ceilings=CEILINGS, on_progress=stop_after_two)
        assert list(folder.load("rows")["status"]) == ["ok", "ok"]


def test_what_the_engine_held_over_time_is_kept_and_summed_up(tmp_path):
    experiment, engine = experiment_for(tmp_path, sweep_concurrency=[8], sweep_prompt_len=[8]), StandInEngine(slots=2)
    engine.step_s = 0.03
    total = 10
    engine.stats = lambda: {"weight_bytes": 4000, "running": min(2, len(engine.sequences)), "kv_blocks_total": total,
                            "kv_blocks_free": total - len(engine.sequences)}  # fmt: skip
    with opened(experiment) as folder:
        (row,) = sweep.run_sweep(engine, experiment, folder, ceilings=CEILINGS).to_dict("records")
        samples = folder.load("samples")

    assert set(samples["point_id"]) == {row["point_id"]} and (samples["memory_bytes"] == 1234).all()
    assert (row["running_max"], row["waiting_max"], row["kv_use_max"]) == (2, 6, pytest.approx(0.8))  # 8 came at once
    assert 0 < row["waiting_mean"] < 6
    gaps = samples["time_s"].diff().dropna()
    assert len(gaps) >= 4 and gaps.min() > 0.1  # 16 requests, 4 tokens, 2 a step of 30 ms


class Shown:
    """Keeps what a display was given, the first and every update."""

    def __init__(self, part):
        self.parts = [part]

    def update(self, part):
        self.parts.append(part)


def test_in_the_browser_a_table_and_a_chart_grow_between_points_and_stay_without_a_kernel(tmp_path, monkeypatch):
    from ascend_kit.show import live

    shown = []
    monkeypatch.setattr(live, "DRAW_EVERY_S", 0.0)
    monkeypatch.setattr("IPython.display.display", lambda part, **_: shown.append(Shown(part)) or shown[-1])
    experiment, engine = experiment_for(tmp_path), StandInEngine(step_s=0.001)
    with opened(experiment) as folder, live.LiveSweep(experiment, folder, browser=True) as progress:
        progress._bar = SimpleNamespace(update=lambda *_: None, finish=lambda **_: None)
        progress(0.5, 4, "inside the first point")
        assert shown == []  # nothing is drawn while a point is measured
        sweep.run_sweep(engine, experiment, folder, ceilings=CEILINGS, on_progress=progress)

    table, chart = shown
    lines = [part.data.split("<details>")[0].count("<tr>") for part in table.parts]  # further columns lie in folds
    assert lines[:4] == [2, 3, 4, 5]  # a head and a line a point
    assert chart.parts[-1].data.startswith(b"\x89PNG") and len(chart.parts) == 5  # the last is drawn at the end


def test_how_long_a_sweep_takes_is_told_before_it_starts(capsys):
    from ascend_kit.measure.pace import EnginePlan
    from ascend_kit.show.live import LiveSweep

    for plans in ([EnginePlan("a", 12, 30.0), EnginePlan("b", 6, 90.0), EnginePlan("c", 6, None)],
                  [EnginePlan("a", 18, None)]):  # fmt: skip
        with LiveSweep(None, None, plans=plans, browser=False):
            pass

    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("24 points on 3 engines, about 2:00 min of computing") and first.endswith("for c.")
    assert second == "18 points on 1 engines."


def test_each_engine_of_a_sweep_has_a_time_of_its_own_before_it_starts(tmp_path, tiny_qwen3_dir):
    from ascend_kit.engine.engine import AscendInferEngine
    from ascend_kit.measure.pace import engine_plans

    experiment = build_experiment({
        "input_model": str(tiny_qwen3_dir), "use_model": "source", "device": "cpu", "output_root": str(tmp_path),
        "max_seq_length": 512, "max_new_tokens": 8, "sweep": {"concurrency": [4], "prompt_len": [16, 505],
        "output_len": [7, 8]}, "sweep_repeats": 2, "dataset_path": "d", "prompts_file": "p",
        "variants": ["padded_to_max", "padded", "continuous_batching", "fused_operators"],
    })  # fmt: skip
    ceilings = {**CEILINGS, "fp32_flops_per_s": 1e9, "device": select_device("cpu").name}
    engine = AscendInferEngine.from_experiment(experiment)
    with opened(experiment) as folder:
        folder.write_json("ceilings", ceilings)

        to_max, padded, plain, fused = engine_plans(engine, experiment, folder)

    assert [plan.num_points for plan in (to_max, padded, plain, fused)] == [6] * 4  # 505 + 8 tokens do not fit
    assert engine.core is None  # nothing was loaded
    # Padding all to 505 instead of 16 prompt tokens is compute; operators without fusion are launches.
    assert to_max.seconds > 2 * padded.seconds and plain.seconds > fused.seconds


def test_the_time_left_is_reckoned_from_what_was_measured():
    from ascend_kit.measure.pace import EnginePlan, left_s

    plans = [EnginePlan("slow", 4, 10.0), EnginePlan("fast", 4, 2.0), EnginePlan("server", 2, None)]

    def row(name, seconds, open_s=0.0, status="ok"):
        return {"backend": name, "status": status, "measured_in_s": seconds + open_s, "open_s": open_s}

    assert left_s(plans, []) is None
    # Twice as long as predicted: 3 points of 5 s; 4 of fast, twice 2 s in all, and 2 of the server like the mean, 5 s
    # each; both load as long as the first did.
    assert left_s(plans, [row("slow", 5.0, open_s=3.0)]) == pytest.approx(15 + (4 + 3) + (10 + 3))
    # A failed point is done, a pruned one was not planned: 2 points of 5 s, as before. The mean is (5 + 1) / 2; what
    # was predicted for one point of each is 2.5 + 0.5 s, measured are 6 s.
    rows = [row("slow", 5.0, 3.0), {"backend": "slow", "status": "failed"}, {"backend": "slow", "status": "pruned"}]
    assert left_s(plans, [*rows, row("fast", 1.0, 1.0)]) == pytest.approx(10 + 3 + (2 * 3 + 2))
    assert left_s(plans, [row(plan.name, 1.0) for plan in plans for _ in range(5)]) == 0  # with more repeats


def test_the_bar_counts_down_from_the_time_that_is_left(tmp_path, monkeypatch, capsys):
    from ascend_kit.measure.pace import EnginePlan
    from ascend_kit.show import live, progress

    now = SimpleNamespace(monotonic=lambda: now.time_s, time_s=0.0)
    monkeypatch.setattr(live, "time", now)
    monkeypatch.setattr(progress, "time", now)
    experiment, lines = experiment_for(tmp_path), []
    with opened(experiment) as folder, live.LiveSweep(
        experiment, folder, plans=[EnginePlan("a", 4, 1.0)], browser=False
    ) as told:  # fmt: skip
        capsys.readouterr()
        for done, seconds in ((0.5, 10), (1, 20), (1.5, 30)):
            if done == 1:
                folder.append("rows", {"backend": "a", "measured_in_s": 20.0, "open_s": 0.0})
            now.time_s = seconds
            told(done, 4, "a point")
            lines.append(capsys.readouterr().out)

    assert "left" not in lines[0]  # nothing is known in the first point
    assert "about 1:00 min left" in lines[1] and "about 50 s left" in lines[2]


def test_goodput_carries_its_limits(tmp_path):
    experiment = experiment_for(tmp_path, ttft_limit_ms=1e4, tpot_limit_ms=1e-6)
    with opened(experiment) as folder:
        rows = sweep.run_sweep(StandInEngine(step_s=0.001), experiment, folder, ceilings=CEILINGS)

    assert (rows["goodput_requests_per_s"] == 0).all()
    assert (rows["ttft_limit_ms"] == 1e4).all() and (rows["tpot_limit_ms"] == 1e-6).all()


def test_engine_that_loses_a_request_is_reported_and_does_not_hang(tmp_path):
    engine = StandInEngine()
    engine.step = lambda: engine.sequences.clear() or []

    with pytest.raises(RuntimeError, match="the engine lost 2 requests"):
        EngineBackend(engine, experiment_for(tmp_path)).run(make_requests(2, 8, 5, vocab_size=1000), 2)


def test_missing_and_failed_requests_are_told_apart():
    requests = make_requests(2, 4, 2, vocab_size=1000)
    good = RequestRecord(0, 4, 2, 0.0, (1.0, 2.0), "length")
    bad = RequestRecord(1, 4, 0, 0.0, (), "error", "prompt too long")

    with pytest.raises(RuntimeError, match="1 of 2 requests never came back"):
        check_complete(requests, [good])
    with pytest.raises(RuntimeError, match="1 of 2 requests failed; the first: prompt too long"):
        check_complete(requests, [good, bad])


def test_replicas_read_their_weights_each_and_share_the_load(tmp_path):
    experiment = experiment_for(tmp_path, cards=2)
    engine = StandInEngine()
    engine.device.kind = "npu"
    two = PointForecast(EngineBackend(engine, experiment), 4000, CEILINGS)
    one = PointForecast(EngineBackend(engine, experiment_for(tmp_path)), 4000, CEILINGS)
    points = sweep.sweep_points(experiment_for(tmp_path, sweep_concurrency=[1, 2, 4]))
    single, double = points[0], points[1]

    assert two.limits(double)["ceiling_tokens_per_s"] == pytest.approx(2 * one.limits(single)["ceiling_tokens_per_s"])
    assert two.limits(double)["prefill_floor_ms"] == one.limits(double)["prefill_floor_ms"]


def test_expectations_are_known_before_anything_runs(tmp_path):
    experiment, engine = experiment_for(tmp_path), StandInEngine()
    with opened(experiment) as folder:
        folder.write_json("ceilings", CEILINGS)
        table = sweep.expectations(engine, experiment, folder)

    assert engine.prompts == []
    assert len(table) == 4
    assert (table["predicted_tokens_per_s"] < table["ceiling_tokens_per_s"]).all()


def test_quantisation_is_read_from_the_checkpoint_and_not_from_the_wish(tmp_path, tiny_qwen3_dir):
    assert quantize_scheme(tiny_qwen3_dir) == "none"
    experiment = experiment_for(tmp_path, quantize="w8a8")
    engine = StandInEngine()
    engine.model_path = tiny_qwen3_dir

    assert EngineBackend(engine, experiment).variant()["quantize"] == "none"


def test_transformers_baseline_reports_real_times_for_every_token_of_ragged_requests(tiny_qwen3_dir):
    from ascend_kit.device.device import select_device

    backend = TransformersBackend(tiny_qwen3_dir, device=select_device("cpu"), precision="fp32", max_seq_length=256)
    requests = [
        *make_requests(2, 12, 3, vocab_size=256, seed=1),
        *[r.__class__(r.index + 2, r.prompt_token_ids, r.num_output_tokens)
          for r in make_requests(1, 30, 6, vocab_size=256, seed=2)],
    ]  # fmt: skip

    records = backend.run(requests, concurrency=2)

    check_complete(requests, records)
    by_index = {r.index: r for r in records}
    assert by_index[0].arrival_s == by_index[1].arrival_s  # one batch
    assert by_index[2].arrival_s >= by_index[0].token_times_s[-1]  # the next batch waits for the whole one
    for record in records:
        times = (record.arrival_s, *record.token_times_s)
        assert all(before < after for before, after in itertools.pairwise(times))


def test_real_engine_and_baseline_fill_one_table(tmp_path, tiny_qwen3_dir):
    from ascend_kit import AscendInferEngine

    experiment = experiment_for(
        tmp_path, input_model=str(tiny_qwen3_dir), precision="fp32", device="cpu", use_model="source",
        max_seq_length=128, sweep_prompt_len=[24], kv_cache_gib=0.01, graph_mode=False,
    )  # fmt: skip
    with opened(experiment) as folder:
        with AscendInferEngine.from_experiment(experiment) as engine:
            sweep.run_sweep(engine, experiment, folder)
        rows = sweep.measure_engines(experiment, folder)
        ceilings = folder.read_json("ceilings")

    assert list(rows["backend"]) == ["ascend_kit"] * 2 + ["transformers"] * 2
    assert rows["error"].isna().all()
    assert (rows["prefix_hit_rate"] == 0).all() and (rows["num_preemptions"] == 0).all()
    assert (rows["weight_bytes"] == rows["weight_bytes"].iloc[0]).all()  # the same float32 model twice
    assert rows["mbu"].between(0, 1).all() and rows["mfu"].between(0, 1).all()
    assert (rows["ceiling_share"] < 1).all()
    assert ceilings["fp32_flops_per_s"] > 0


def test_continuous_batching_gives_the_greedy_tokens_of_generate_with_a_time_each(tiny_qwen3_dir):
    import torch
    from transformers import AutoModelForCausalLM

    from ascend_kit.device.device import select_device
    from ascend_kit.measure.continuous import ContinuousBackend

    backend = ContinuousBackend(tiny_qwen3_dir, device=select_device("cpu"), precision="fp32", max_seq_length=512)
    shapes = [(12, 3), (300, 6), (40, 1), (7, 9)]  # the second needs two pages of the cache
    requests = [
        replace(make_requests(1, prompt, output, vocab_size=256, seed=9 + n)[0], index=n, send_at_s=0.05 * n)
        for n, (prompt, output) in enumerate(shapes)
    ]
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir, dtype=torch.float32)

    before = time.perf_counter()
    served = {request.index: (at_s, result) for request, at_s, result in backend.serve(requests, 2)}
    again = backend.run(requests, 2)  # on the manager that was kept
    backend.close()

    for request in requests:
        prompt = torch.tensor([request.prompt_token_ids])
        right = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, eos_token_id=None, pad_token_id=0,
            min_new_tokens=request.num_output_tokens, max_new_tokens=request.num_output_tokens,
        )  # fmt: skip
        at_s, result = served[request.index]
        assert result.generated_tokens == right[0, prompt.shape[1] :].tolist()
        times = (before, at_s, *result.timestamps, time.perf_counter())
        assert len(result.timestamps) == request.num_output_tokens
        assert all(first < later for first, later in itertools.pairwise(times))
    check_complete(requests, again)
    assert [r.arrival_s - again[0].arrival_s for r in sorted(again, key=lambda r: r.index)] == pytest.approx(
        [0, 0.05, 0.1, 0.15]
    )
    assert not [thread for thread in threading.enumerate() if "_run_generation_loop" in thread.name]


def test_a_failure_of_continuous_batching_is_told_and_the_next_run_is_whole(tiny_qwen3_dir, monkeypatch):
    from ascend_kit.device.device import select_device
    from ascend_kit.measure.continuous import ContinuousBackend

    backend = ContinuousBackend(tiny_qwen3_dir, device=select_device("cpu"), precision="fp32", max_seq_length=256)
    requests = make_requests(3, 12, 4, vocab_size=256)
    backend.open()
    forward = backend._model.forward

    def failing(*_, **__):
        raise MemoryError("no page left")

    monkeypatch.setattr(backend._model, "forward", failing)
    with pytest.raises(RuntimeError, match="no page left"):
        check_complete(requests, backend.run(requests, 2))
    monkeypatch.setattr(backend._model, "forward", forward)

    check_complete(requests, backend.run(requests, 2))
    backend.close()


def test_continuous_batching_is_refused_where_it_does_not_run_before_anything_is_measured(tmp_path, monkeypatch):
    import transformers

    experiment = experiment_for(tmp_path, engines=[{"kind": "transformers", "batching": "continuous"}])
    with opened(experiment) as folder:
        monkeypatch.setattr(sweep, "resolve_device", lambda *_: ("npu", 0))
        with pytest.raises(ValueError, match="runs on cpu and cuda, not on npu; allowed: padded"):
            sweep.measure_engines(experiment, folder)
        monkeypatch.setattr(sweep, "resolve_device", lambda *_: ("cpu", 0))
        monkeypatch.setattr(transformers, "ContinuousBatchingConfig", object)  # as before page_size
        with pytest.raises(ValueError, match=r"needs transformers 5\.17 or later, here is"):
            sweep.measure_engines(experiment, folder)


@pytest.mark.multiproc
def test_the_baseline_of_a_notebooks_kernel_runs_in_a_process_of_its_own(tmp_path, tiny_qwen3_dir, monkeypatch):
    monkeypatch.setattr(sweep, "needs_process", lambda kind: True)
    experiment = experiment_for(
        tmp_path, input_model=str(tiny_qwen3_dir), precision="fp32", device="cpu", max_seq_length=128,
        sweep_concurrency=[2], sweep_prompt_len=[24],
    )  # fmt: skip
    (spec,) = [spec for spec in experiment.engine_specs if spec.kind == "transformers"]
    with opened(experiment) as folder:
        backend = sweep.open_backend(spec, experiment, folder)
        monkeypatch.setattr(sweep, "needs_process", lambda kind: False)
        here = sweep.open_backend(spec, experiment, folder)
    before = time.perf_counter()
    seen: list[int] = []
    records = backend.run(make_requests(3, 24, 4, vocab_size=320), 2, seen.append)
    with opened(experiment) as folder:
        (row,) = sweep.run_sweep(backend, experiment, folder, ceilings=CEILINGS).to_dict("records")
    backend.close()

    assert isinstance(backend, BackendElsewhere) and here._model is None  # nothing was loaded in this process
    assert backend.identity == here.identity and backend.variant() == here.variant()
    assert seen == [2, 3] and [len(record.token_times_s) for record in records] == [4, 4, 4]
    assert all(before < moment < time.perf_counter() for record in records for moment in record.token_times_s)
    assert row["error"] is None and row["peak_memory_bytes"] > row["weight_bytes"] > 0
    backend.close()


def test_sweep_of_overwritten_weights_is_measured_again(tmp_path):
    """The folder keeps its name and its parameters, only the bytes of the weights are others."""
    from conftest import make_model

    from ascend_kit import AscendInferEngine

    model = make_model(tmp_path / "model", "qwen3")
    experiment = experiment_for(
        tmp_path, input_model=str(model), precision="fp32", device="cpu", use_model="source", max_seq_length=128,
        sweep_concurrency=[1], sweep_prompt_len=[8], kv_cache_gib=0.01, graph_mode=False,
    )  # fmt: skip
    ceilings = {**CEILINGS, "fp32_flops_per_s": 1e9}

    def measured():
        with opened(experiment) as folder:
            rows = sweep.run_sweep(AscendInferEngine.from_experiment(experiment), experiment, folder, ceilings=ceilings)
            baseline = sweep.measure_engines(experiment, folder)
        return list(rows["point_id"]), list(baseline["point_id"])

    _, both = measured()
    _, same = measured()
    make_model(tmp_path / "model", "qwen3", seed=1)
    other, both_again = measured()

    assert same == both  # resumed, and nothing was measured twice
    assert len(other) == 1 and other[0] not in both
    assert len(both_again) == 2 and not set(both_again) & set(both)


@pytest.mark.long
def test_24_points_survive_a_kill_a_dying_server_and_one_that_answers_500(tiny_qwen3_dir):
    script = Path(__file__).parent.parent / "benchmarks" / "sweep_survives.py"

    done = subprocess.run([sys.executable, script, "--model", tiny_qwen3_dir], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
