"""What a sweep shows while it runs, and how long it will take."""

from types import SimpleNamespace

import pytest
from stand_in_engine import CEILINGS, StandInEngine, experiment_for, opened

from ascend_kit.device.device import select_device
from ascend_kit.measure import engines, sweep
from ascend_kit.params import build_experiment


@pytest.fixture(autouse=True)
def plain_weights(monkeypatch):
    """The stand-in engine has no checkpoint to read its scheme from."""
    real = engines.quantize_scheme
    monkeypatch.setattr(engines, "quantize_scheme", lambda folder: "none" if folder is None else real(folder))


class Shown:
    """Keeps what a display was given, the first and every update."""

    def __init__(self, part):
        self.parts = [part]

    def update(self, part):
        self.parts.append(part)


def test_in_the_browser_a_table_and_a_chart_grow_between_points_and_stay_without_a_kernel(tmp_path, monkeypatch):
    from ascend_kit.show import progress as live

    shown = []
    monkeypatch.setattr(live, "FIGURE_EVERY_S", 0.0)
    monkeypatch.setattr("IPython.display.display", lambda part, **_: shown.append(Shown(part)) or shown[-1])
    experiment, engine = experiment_for(tmp_path), StandInEngine(step_s=0.001)
    with opened(experiment) as folder, live.LiveSweep(experiment, folder, browser=True) as progress:
        progress._bar = SimpleNamespace(bar=SimpleNamespace(), text=SimpleNamespace(), finish=lambda *_: None)
        progress(0.5, 4, "inside the first point")
        assert shown == []  # nothing is drawn while a point is measured
        sweep.run_sweep(engine, experiment, folder, ceilings=CEILINGS, on_progress=progress)

    table, chart = shown
    lines = [part.data.split("<details>")[0].count("<tr>") for part in table.parts]  # further columns lie in folds
    assert lines[:4] == [2, 3, 4, 5]  # a head and a line a point
    assert chart.parts[-1].data.startswith(b"\x89PNG") and len(chart.parts) == 5  # the last is drawn at the end


def test_how_long_a_sweep_takes_is_told_before_it_starts(capsys):
    from ascend_kit.measure.pace import EnginePlan
    from ascend_kit.show.progress import LiveSweep

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
    from ascend_kit.show import progress

    now = SimpleNamespace(monotonic=lambda: now.time_s, time_s=0.0)
    monkeypatch.setattr(progress, "time", now)
    experiment, lines = experiment_for(tmp_path), []
    with opened(experiment) as folder, progress.LiveSweep(
        experiment, folder, plans=[EnginePlan("a", 4, 1.0)], browser=False
    ) as told:  # fmt: skip
        capsys.readouterr()
        for done, seconds in ((0.5, 10), (1, 20), (1.5, 30), (1.6, 100)):
            if done == 1:
                folder.append("rows", {"backend": "a", "measured_in_s": 20.0, "open_s": 0.0})
            now.time_s = seconds
            told(done, 4, "a point")
            lines.append(capsys.readouterr().out)

    assert "left" not in lines[0]  # nothing is known in the first point
    assert "about 1:00 min left" in lines[1] and "about 50 s left" in lines[2]
    assert lines[3] and "left" not in lines[3]  # longer than it should take
