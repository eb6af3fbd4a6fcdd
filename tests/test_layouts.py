"""A sweep whose points need one, two or four cards, on real engines over one Ray."""

from __future__ import annotations

import os
import signal

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install ascend-kit[cluster]")

from ascend_kit import AscendInferEngine, RunFolder, run_sweep
from ascend_kit.engine.ray_session import RaySession
from ascend_kit.measure import layouts
from ascend_kit.measure.sweep import load_rows
from ascend_kit.params import ParameterError, build_experiment

CEILINGS = {"device": "stand-in", "fp32_flops_per_s": 1e9, "int8_ops_per_s": None, "read_bytes_per_s": 1e9,
            "launch_s": 1e-7}  # fmt: skip


def experiment_for(tmp_path, model, **changes):
    values = dict(
        experiment="layouts", output_root=str(tmp_path), input_model=str(model), use_model="source", device="cpu",
        precision="fp32", max_seq_length=128, batch_size=2, block_size=16, kv_cache_gib=0.01, graph_mode=False,
        cards=4, sweep_concurrency=[2], sweep_prompt_len=[8], sweep_output_len=[4],
    )  # fmt: skip
    return build_experiment({**values, **changes})


@pytest.fixture(scope="module")
def four_cards():
    session = RaySession("cpu", 4)
    yield session
    session.close()


def sweep(experiment, **options):
    with RunFolder.open(experiment, stage="04_throughput") as folder:
        # What is read off the engine before it is closed does not depend on its cards; one card starts at once.
        engine = AscendInferEngine.from_experiment(experiment.on_cards(1)).load_model()
        rows = run_sweep(engine, experiment, folder, ceilings=CEILINGS, **options)
        assert engine.core is None
        return rows, folder.load("cards")


@pytest.mark.multiproc
def test_points_of_one_two_and_four_cards_share_the_cards_and_resume(four_cards, tmp_path, tiny_qwen3_dir, monkeypatch):
    experiment = experiment_for(
        tmp_path, tiny_qwen3_dir, cards=4, sweep_cards=[1, 2], sweep_tensor_parallel=[1, 2], sweep_at_once=True,
    )  # fmt: skip
    seen = []

    rows, cards = sweep(experiment, on_progress=lambda *given: seen.append(given))

    assert list(rows["status"]) == ["ok"] * 3, rows["error"].tolist()
    assert list(rows["cell"]) == [0, 1, 2]  # in input order, whenever they were measured
    assert list(zip(rows["cards"], rows["tensor_parallel"], strict=True)) == [(1, 1), (2, 1), (2, 2)]
    assert any(rows["ran_with"].map(len) > 0)
    together = {(cell, other) for cell, others in zip(rows["cell"], rows["ran_with"], strict=True) for other in others}
    assert together == {(other, cell) for cell, other in together}
    assert seen[-1][:2] == (3, 3) and any(text.startswith("at work: ") for *_, text in seen)
    for row in rows.itertuples():  # each card of the point is accounted for
        mine = cards[cards["point_id"] == row.point_id]
        assert len(mine) == row.cards and mine.drop_duplicates("replica")["output_tokens"].sum() == 16
        assert mine["busy_share"].between(0, 1).all() and (mine["peak_memory_bytes"] > 0).all()

    with RunFolder.open(experiment, stage="04_throughput") as folder:
        kept = [line for line in folder.table_path("rows").read_text().splitlines(True) if '"cell": 0' not in line]
        folder.table_path("rows").write_text("".join(kept))
    opened = []
    monkeypatch.setattr(
        layouts._EngineBench, "open", lambda bench, real=layouts._EngineBench.open: opened.append(1) or real(bench)
    )
    rows, _ = sweep(experiment)

    assert len(opened) == 1 and len(kept) == 2 and list(rows["cell"]) == [0, 1, 2]


@pytest.mark.multiproc
def test_on_a_cpu_points_run_one_by_one_unless_asked_and_a_lost_engine_fails_its_point_alone(
    four_cards, tmp_path, tiny_qwen3_dir, monkeypatch
):
    experiment = experiment_for(tmp_path, tiny_qwen3_dir, cards=2, sweep_cards=[1, 2])
    real = layouts._EngineBench.measure

    def measure(bench, cell, neighbours):
        if cell.layout.cards == 2:
            core = bench._engine.core
            monkeypatch.setattr(core.session, "total_cards", lambda: 0)
            for pid in [pid for row in core.replica_rows() for pid in row["pids"]]:
                os.kill(pid, signal.SIGKILL)
        return real(bench, cell, neighbours)

    monkeypatch.setattr(layouts._EngineBench, "measure", measure)
    rows, _ = sweep(experiment)

    assert list(rows["status"]) == ["ok", "failed"], rows["error"].tolist()
    assert "ReplicasLost" in rows["error"][1] and not any(rows["ran_with"])


def test_every_number_of_cards_must_be_usable(tmp_path):
    with pytest.raises(ParameterError, match=r"sweep_cards=\[2, 8\]: 8 is above cards=4"):
        experiment_for(tmp_path, "demo", sweep_cards=[2, 8])
    with pytest.raises(ParameterError, match=r"sweep_cards: 1 cannot be divided by tensor parallel sizes \[2\]"):
        experiment_for(tmp_path, "demo", sweep_cards=[1, 2], sweep_tensor_parallel=[2])
    with pytest.raises(ParameterError, match=r"sweep_tensor_parallel: 4 divides none of the card counts \[2\]"):
        experiment_for(tmp_path, "demo", sweep_cards=[2], sweep_tensor_parallel=[1, 4])
    assert experiment_for(tmp_path, "demo", sweep_cards=[1, 2], sweep_tensor_parallel=[1, 2]).sweep_layouts == [
        (1, 1),
        (2, 1),
        (2, 2),
    ]


def test_rows_come_back_in_the_order_of_the_points(tmp_path):
    experiment = experiment_for(tmp_path, "demo")
    with RunFolder.open(experiment, stage="04_throughput") as folder:
        folder.append_all("rows", [{"backend": name, "cell": cell} for name, cell in (("b", 1), ("a", 0), ("b", 0))])
        rows = load_rows(folder)

    assert list(zip(rows["backend"], rows["cell"], strict=True)) == [("b", 0), ("b", 1), ("a", 0)]


def test_findings_name_the_best_point_of_each_layout_and_what_shared_the_host():
    import pandas

    from ascend_kit.show.findings import sweep_findings

    row = {"status": "ok", "backend": "ascend_kit", "prompt_len": 8, "output_len": 4, "ttft_p50_ms": 1.0}
    row |= {"tpot_p50_ms": 1.0, "concurrency": 2, "device_kind": "npu", "error": None}
    rows = [
        {**row, "cards": 1, "tensor_parallel": 1, "output_tokens_per_s": 10.0, "ran_with": [1]},
        {**row, "cards": 2, "tensor_parallel": 2, "output_tokens_per_s": 15.0, "ran_with": [0]},
        {**row, "cards": 1, "tensor_parallel": 1, "output_tokens_per_s": 5.0, "ran_with": [],
         "backend": "transformers"},
    ]  # fmt: skip

    lines = list(map(str, sweep_findings(pandas.DataFrame(rows))))

    assert [line.split(":")[0] for line in lines[:2]] == [
        "ascend_kit, 1 card",
        "ascend_kit, 2 cards, tensor parallel 2",
    ]
    assert any(line.startswith("ascend_kit, 2 cards, tensor parallel 2 writes 3.0 times") for line in lines)
    (shared,) = [line for line in lines if "ran_with" in line]
    assert shared.startswith("2 of 3 points were measured while others ran") and "sweep_at_once: false" in shared
    on_cpu = list(map(str, sweep_findings(pandas.DataFrame([{**one, "device_kind": "cpu"} for one in rows]))))
    assert any("shared the processor's cores" in line for line in on_cpu)
