"""The sweep over a small stand-in engine that keeps the add_request / step contract, then the real one."""

import subprocess
import sys
from pathlib import Path

import pytest
from stand_in_engine import CEILINGS, StandInDevice, StandInEngine, experiment_for, opened

from ascend_kit.device import meters
from ascend_kit.measure import engines, sweep
from ascend_kit.measure.engines import EngineBackend, quantize_scheme
from ascend_kit.measure.metrics import RequestRecord
from ascend_kit.measure.points import PointForecast, check_complete
from ascend_kit.measure.rows import SweepError, failed_points
from ascend_kit.measure.workload import make_requests
from ascend_kit.stages import RunRecord


@pytest.fixture(autouse=True)
def plain_weights(monkeypatch):
    """The stand-in engine has no checkpoint to read its scheme from."""
    real = engines.quantize_scheme
    monkeypatch.setattr(engines, "quantize_scheme", lambda folder: "none" if folder is None else real(folder))


def test_sweep_writes_one_row_per_point_with_units_and_raw_requests(tmp_path, monkeypatch):
    monkeypatch.setattr(meters, "SHORTEST_S", 0.0)
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
    monkeypatch.setattr(meters, "INTERVAL_S", 0.02)
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


def test_an_engine_that_does_not_tell_its_switches_is_reckoned_without_graphs(tmp_path):
    class Silent(EngineBackend):
        def variant(self):
            return {**super().variant(), **dict.fromkeys(engines.SWITCHES)}

    experiment = experiment_for(tmp_path, graph_mode=False)
    point = sweep.sweep_points(experiment)[0]
    known, told = (PointForecast(kind(StandInEngine(), experiment), 4000, CEILINGS) for kind in (Silent, EngineBackend))

    assert known.limits(point) == told.limits(point)
    assert known.limits(point)["prefill_floor_ms"] > 0


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
