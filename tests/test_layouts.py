"""A sweep whose points need one, two or four cards, on real engines, one layout after the other."""

from __future__ import annotations

import importlib.util

import pytest

from ascend_kit import AscendInferEngine, RunFolder, run_sweep
from ascend_kit.measure.rows import load_cards
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


def sweep(experiment, **options):
    with RunFolder.open(experiment, stage="04_throughput") as folder:
        engine = AscendInferEngine.from_experiment(experiment.alone(cards=1, tensor_parallel=1)).load_model()
        rows = run_sweep(engine, experiment, folder, ceilings=CEILINGS, **options)
        assert engine.core is None  # its cards were needed
        return rows, load_cards(folder)


@pytest.mark.long
@pytest.mark.multiproc
def test_layouts_are_measured_one_after_the_other_and_resume(tmp_path, tiny_qwen3_dir, monkeypatch):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install ascend-kit[cluster]")
    experiment = experiment_for(tmp_path, tiny_qwen3_dir, cards=2, sweep_cards=[1, 2], sweep_tensor_parallel=[1, 2])
    seen = []

    rows, cards = sweep(experiment, on_progress=lambda *given: seen.append(given))

    assert list(rows["status"]) == ["ok"] * 3, rows["error"].tolist()
    assert list(zip(rows["cards"], rows["tensor_parallel"], strict=True)) == [(1, 1), (2, 1), (2, 2)]
    assert {1, 2, 3} <= {done for done, *_ in seen} and seen[-1][:2] == (3, 3)
    for row in rows[rows["cards"] > 1].itertuples():  # each card of the point is accounted for
        mine = cards[cards["point_id"] == row.point_id]
        assert len(mine) == row.cards and mine.drop_duplicates("replica")["output_tokens"].sum() == 16
        assert mine["busy_share"].between(0, 1).all() and (mine["peak_memory_bytes"] > 0).all()

    loads = []
    load = AscendInferEngine.load_model
    monkeypatch.setattr(AscendInferEngine, "load_model", lambda engine: loads.append(engine.settings) or load(engine))
    again, _ = sweep(experiment.with_changes(sweep_cards=[2]))

    assert list(again["point_id"]) == list(rows["point_id"])[1:]
    assert [one.cards for one in loads] == [1]  # that of this test; no layout was loaded


def test_every_number_of_cards_must_be_usable(tmp_path):
    with pytest.raises(ParameterError, match=r"sweep: cards \[2, 8\]: 8 is above cards=4"):
        experiment_for(tmp_path, "demo", sweep_cards=[2, 8])
    with pytest.raises(ParameterError, match=r"sweep: cards: 1 cannot be divided by tensor parallel sizes \[2\]"):
        experiment_for(tmp_path, "demo", sweep_cards=[1, 2], sweep_tensor_parallel=[2])
    with pytest.raises(ParameterError, match=r"sweep: tensor_parallel: 4 divides none of the card counts \[2\]"):
        experiment_for(tmp_path, "demo", sweep_cards=[2], sweep_tensor_parallel=[1, 4])
    assert experiment_for(tmp_path, "demo", sweep_cards=[1, 2], sweep_tensor_parallel=[1, 2]).sweep_settings == [
        {"cards": 1, "tensor_parallel": 1},
        {"cards": 2, "tensor_parallel": 1},
        {"cards": 2, "tensor_parallel": 2},
    ]


def test_findings_name_the_best_point_of_each_layout():
    import pandas

    from ascend_kit.show.findings import sweep_findings

    row = {"status": "ok", "backend": "ascend_kit", "prompt_len": 8, "output_len": 4, "ttft_p50_ms": 1.0}
    row |= {"tpot_p50_ms": 1.0, "concurrency": 2, "device_kind": "npu", "error": None}
    rows = [
        {**row, "cards": 1, "tensor_parallel": 1, "output_tokens_per_s": 10.0},
        {**row, "cards": 2, "tensor_parallel": 2, "output_tokens_per_s": 15.0},
        {**row, "cards": 1, "tensor_parallel": 1, "output_tokens_per_s": 5.0, "backend": "transformers"},
    ]  # fmt: skip

    lines = list(map(str, sweep_findings(pandas.DataFrame(rows))))

    assert [line.split(":")[0] for line in lines[:2]] == [
        "ascend_kit, 1 card",
        "ascend_kit, 2 cards, tensor parallel 2",
    ]
    assert any(line.startswith("ascend_kit, 2 cards, tensor parallel 2 writes 3.0 times") for line in lines)
