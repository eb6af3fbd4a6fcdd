"""Accuracy against throughput, and the verdict of a comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import pytest
from chinese_text import english_in
from compared_runs import answers, by_set, make_run, sweep_row, table_of

from ascend_kit.evaluation.evidence import flips
from ascend_kit.evaluation.gate import gates
from ascend_kit.evaluation.judge import reasons
from ascend_kit.evaluation.runs import CompareError, differences, load_runs, pick_baseline
from ascend_kit.evaluation.tradeoff import Comparison, answer_length_ratio
from ascend_kit.messages import use_language
from ascend_kit.params import build_experiment
from ascend_kit.show import tables
from ascend_kit.show.findings import comparison_findings


def test_the_table_has_intervals_on_both_axes(tmp_path: Path) -> None:
    table = table_of(
        [
            make_run(tmp_path, "a", {"mmlu": answers(90)}, rates=[100.0, 110.0, 105.0]),
            make_run(tmp_path, "b", {"mmlu": answers(90, wrong=3)}, rates=[200.0, 190.0]),
        ]
    )

    a, b = table["e/a"], table["e/b"]
    assert a["output_tokens_per_s"] == pytest.approx(105.0)
    assert (a["output_tokens_per_s_low"], a["output_tokens_per_s_high"]) == (100.0, 110.0)
    assert a["rate_interval"] == "range of 3 repeats"
    assert a["accuracy_percent"] == pytest.approx(100 * 60 / 90)
    assert b["accuracy_percent"] == pytest.approx(100 * 57 / 90)
    assert a["accuracy_low_percent"] < a["accuracy_percent"] < a["accuracy_high_percent"]
    assert (b["concurrency"], b["prompt_len"], b["output_len"], b["lacks"]) == (4, 64, 32, "")


def test_accuracy_uses_only_documents_that_all_runs_answered(tmp_path: Path) -> None:
    table = table_of(
        [
            make_run(tmp_path, "a", {"mmlu": [1, 0, 1, 1], "ceval": [0, 0]}, rates=[1.0]),
            make_run(tmp_path, "b", {"mmlu": [1, 0]}, rates=[1.0]),
        ]
    )

    assert [row["n"] for row in table.values()] == [2, 2] and table["e/a"]["accuracy_percent"] == 50.0
    assert table["e/b"]["lacks"] == "only one of the runs has ceval"


def test_a_single_measurement_gets_its_interval_from_its_own_course(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", {"mmlu": [1, 0]}, rates=[100.0])
    steady = [i / 100 for i in range(1, 1001)]  # 100 tokens a second for ten seconds
    run.folder.append("requests", {"point_id": "4-0", "arrival_s": 0.0, "token_times_s": steady[::2]})
    run.folder.append("requests", {"point_id": "4-0", "arrival_s": 0.0, "token_times_s": steady[1::2]})

    row = table_of([run])["e/a"]

    assert row["rate_interval"] == "10 windows of one measurement"
    assert 98 < row["output_tokens_per_s_low"] <= 100 <= row["output_tokens_per_s_high"] < 102


def test_runs_are_compared_at_the_heaviest_point_they_share(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name, {"mmlu": [1, 0]}) for name in ("a", "b")]
    for concurrency in (1, 4, 16):
        runs[0].folder.append("rows", sweep_row(10.0 * concurrency, concurrency=concurrency))
    for concurrency in (1, 4):
        runs[1].folder.append("rows", sweep_row(11.0 * concurrency, concurrency=concurrency))
    runs[1].folder.append("rows", sweep_row(99.0, concurrency=16, status="failed", error="out of memory"))
    runs[1].folder.append("rows", sweep_row(99.0, concurrency=16, backend="transformers"))

    table = table_of(runs)

    assert [row["concurrency"] for row in table.values()] == [4, 4]
    assert [row["output_tokens_per_s"] for row in table.values()] == [40.0, 44.0]
    lighter = table_of(runs, point={"concurrency": 1, "prompt_len": 64, "output_len": 32})
    assert [row["output_tokens_per_s"] for row in lighter.values()] == [10.0, 11.0]


def test_a_run_with_other_points_or_without_evaluation_is_listed_and_stops_no_other(tmp_path: Path) -> None:
    n = 3000
    base = make_run(tmp_path, "base", {"mmlu": answers(n)}, rates=[100.0, 101.0], use_model="source")
    good = make_run(tmp_path, "good", {"mmlu": answers(n)}, rates=[150.0, 149.0])
    elsewhere = make_run(tmp_path, "elsewhere", {"mmlu": answers(n)})
    elsewhere.folder.append("rows", sweep_row(300.0, concurrency=32))
    killed = make_run(tmp_path, "killed", {}, rates=[500.0], use_model="source", quantize="none")
    unlike = make_run(tmp_path, "unlike", {"ceval": [1, 0]}, rates=[120.0])

    comparison = Comparison([killed, base, good, elsewhere, unlike])
    table = table_of(comparison.runs)

    assert (comparison.baseline.name, comparison.verdict.best) == ("e/base", "e/good")
    assert table["e/good"]["lacks"] == "" and table["e/good"]["n"] == n
    assert table["e/killed"]["lacks"] == "no evaluation: run 05_evaluate"
    assert (
        "not measured at concurrency 4, prompt 64, output 32 (only at concurrency 32" in table["e/elsewhere"]["lacks"]
    )
    assert table["e/elsewhere"]["n"] == n
    assert "only one of the runs has ceval" in table["e/unlike"]["lacks"]
    assert set(comparison.paired["candidate"]) == {"e/good", "e/elsewhere", "e/killed", "e/unlike"}


def test_runs_that_all_lack_something_get_no_verdict_but_a_reason(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "a", {"mmlu": [1, 0]}), make_run(tmp_path, "b", {}, rates=[1.0])]

    found = Comparison(runs).verdict

    assert found.best == "none" and "No verdict: the baseline e/a lacks something (no sweep: run 04" in found.text


def test_the_verdict_takes_the_fastest_run_within_the_margin(tmp_path: Path) -> None:
    n = 3000
    base = make_run(tmp_path, "base", {"mmlu": answers(n)}, rates=[100.0, 101.0], use_model="source")
    good = make_run(tmp_path, "good", {"mmlu": answers(n, 3, 2)}, rates=[150.0, 149.0])
    bad = make_run(tmp_path, "bad", {"mmlu": answers(n, 300)}, rates=[300.0, 300.0])
    slow = make_run(tmp_path, "slow", {"mmlu": answers(n)}, rates=[120.0, 121.0])

    found = Comparison([bad, base, good, slow]).verdict
    table = found.table.set_index("run")

    assert (found.best, found.baseline) == ("e/good", "e/base")
    assert table.loc["e/good", "speedup"] == pytest.approx(149.5 / 100.5)
    assert table["qualifies"].to_dict() == {"e/bad": False, "e/base": True, "e/good": True, "e/slow": True}
    assert found.text.startswith("Use e/good: 150 output tokens/s, 1.49 times e/base; no loss above 1 points")
    assert "e/bad is 2.99 times as fast as the baseline but does not qualify: less accurate" in found.text
    assert found.cautions == []


def test_a_run_with_an_alarm_is_never_recommended_nor_a_baseline_of_choice(tmp_path: Path) -> None:
    base = make_run(tmp_path, "base", {"mmlu": answers(3000)}, rates=[100.0])
    broken = make_run(tmp_path, "broken", {"mmlu": answers(3000)}, rates=[300.0], use_model="source")
    broken.folder.alarm("evaluation.chance", "25 % is what guessing gives")

    found = Comparison([broken, base])

    assert found.baseline is base and found.verdict.best == "e/base"
    assert "e/broken is 3.00 times" in found.verdict.text and "25 % is what guessing gives" in found.verdict.text
    assert Comparison([broken]).verdict.best == "none"


def test_too_few_documents_keep_the_baseline_and_say_what_is_missing(tmp_path: Path) -> None:
    base = make_run(tmp_path, "base", {"mmlu": answers(60)}, rates=[100.0])
    fast = make_run(tmp_path, "fast", {"mmlu": answers(60, 2, 2)}, rates=[150.0])

    found = Comparison([base, fast], baseline=base).verdict

    assert found.best == "e/base"
    assert "no faster run is shown to lose at most 1 points" in found.text
    assert "cannot be excluded" in found.text and "documents would settle it" in found.text
    assert Comparison([base, fast], 20, baseline=base).verdict.best == "e/fast"


def test_one_set_that_collapses_disqualifies_although_the_mean_holds(tmp_path: Path) -> None:
    base = make_run(tmp_path, "base", {"mmlu": answers(20000), "ceval": answers(100)}, rates=[100.0])
    other = make_run(tmp_path, "other", {"mmlu": answers(20000), "ceval": answers(100, wrong=40)}, rates=[150.0])

    found = Comparison([base, other], baseline=base).verdict

    assert found.table.set_index("run").loc["e/other", "outcome"] == "within margin"
    assert found.best == "e/base" and "ceval: less accurate" in found.text


def test_in_chinese_all_that_a_comparison_shows_is_chinese(tmp_path: Path) -> None:
    asked = {"base": ([100.0, 130.0], {}), "fast": ([300.0, 310.0], {}), "once": ([200.0], {}), "none": ([], {}),
             "slow": ([50.0, 51.0], {}), "apart": ([400.0, 401.0], {"task": {"num_fewshot": 1}})}  # fmt: skip
    base, *others = runs = [make_run(tmp_path, name, {"mmlu": answers(900)}, rates=rates, asked=parts)
                            for name, (rates, parts) in asked.items()]  # fmt: skip
    runs += [make_run(tmp_path, "worse", {"mmlu": answers(900, wrong=300)}, rates=[200.0, 201.0])]
    compared = Comparison(runs, baseline=base)
    decision = compared.verdict

    use_language("zh")
    try:
        shown = [tables.runs(compared.table), tables.paired(compared.paired), tables.verdict(decision.table),
                 tables.readable(gates(base, runs[1:], compared.margin)), tables.readable(flips(base, others)),
                 tables.readable(reasons(["mmlu", "ceval", "gpqa", "ifeval", "wikitext", "agieval"]))]  # fmt: skip
        told = "<br>".join(map(str, comparison_findings(decision, compared.perplexity)))
        left = english_in("".join(table.data for table in shown if table) + told, *asked, "worse")
    finally:
        use_language("en")

    assert left == [] and "采用" in shown[3].data


def test_overlapping_speeds_and_short_answers_are_cautions(tmp_path: Path) -> None:
    base = make_run(tmp_path, "base", {"mmlu": answers(3000)}, rates=[100.0, 130.0])
    other = make_run(tmp_path, "other", {"mmlu": answers(3000)}, rates=[120.0, 125.0])
    for run, length in ((base, 100), (other, 80)):
        for index in range(3):
            run.folder.append("answers", {"index": index, "prompt": "p", "num_output_tokens": length})

    found = Comparison([base, other], baseline=base).verdict

    assert answer_length_ratio(base, other) == pytest.approx(0.8)
    assert found.best == "e/other" and len(found.cautions) == 2
    overlap, short = map(str, found.cautions)
    assert "overlap" in overlap and "80 % of the baseline's length" in short


def test_the_first_caution_of_a_verdict_names_the_runs_measured_on_a_busy_machine(tmp_path: Path) -> None:
    base = make_run(tmp_path, "base", {"mmlu": answers(3000)}, rates=[100.0, 130.0])
    other = make_run(tmp_path, "other", {"mmlu": answers(3000)}, rates=[120.0])
    busy = {"device_kind": "cpu", "cpu_cores": 2, "own_cpu_cores": 0.9, "other_cpu_cores": 1.1}
    other.folder.append("rows", sweep_row(125.0, 1, **busy))

    found = Comparison([base, other], baseline=base).verdict
    first = next(one for one in comparison_findings(found, pandas.DataFrame()) if one.level == "caution")

    assert first.key == "sweep.disturbed" and "1.1 of 2 cores during one measurement" in str(first)
    assert "e/other 4/64/32 (" in str(first) and "overlap" in str(found.cautions[1])


def test_without_a_verdict_the_runs_measured_on_a_busy_machine_are_named_all_the_same(tmp_path: Path) -> None:
    busy = {"device_kind": "cpu", "cpu_cores": 2, "own_cpu_cores": 0.9, "other_cpu_cores": 1.1}
    runs = [make_run(tmp_path, name, {}, rates=[]) for name in ("base", "other")]
    runs[1].folder.append("rows", sweep_row(125.0, 0, **busy))

    found = Comparison(runs, baseline=runs[0]).verdict

    assert found.best == "none" and "No verdict" in found.text
    (caution,) = found.cautions
    assert caution.key == "sweep.disturbed" and "e/other 4/64/32" in str(caution)


def test_a_run_that_its_sequential_test_stopped_is_named_with_that_verdict(tmp_path: Path) -> None:
    base = make_run(tmp_path, "base", {"mmlu": answers(2000)}, rates=[100.0, 101.0])
    other = make_run(tmp_path, "other", {"mmlu": answers(2000)}, rates=[200.0, 201.0], quantize="w8a8")
    stopped = {"documents": 480, "outcome": "within margin", "baseline": "base"}
    other.folder.write_json("evaluation", {**(other.folder.read_json("evaluation") or {}), "stopped": stopped})

    (caution,) = Comparison([base, other]).verdict.cautions

    assert "e/other was stopped by its sequential test after 480 documents (within margin against base)" in str(caution)


def test_the_plainest_run_is_the_baseline(tmp_path: Path) -> None:
    plain = make_run(
        tmp_path, "z", {}, use_model="source", graph_mode=False, operator_fusion=False, memory_optimize=False
    )
    source = make_run(tmp_path, "b", {}, use_model="source")
    int8 = make_run(tmp_path, "a", {}, quantize="w8a8")

    assert pick_baseline([int8, source, plain]) is plain
    assert pick_baseline([int8, source]) is source


def test_differences_show_what_the_runs_were_measured_with(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "a", {"mmlu": [1]}), make_run(tmp_path, "b", {"mmlu": [1]}, quantize="w8a8")]

    table = differences(runs)

    assert list(table.index) == ["quantize"] and list(table.loc["quantize"]) == ["none", "w8a8"]


def test_runs_are_found_by_name_experiment_or_path(tmp_path: Path) -> None:
    for name in ("first", "second"):
        make_run(tmp_path, name, {"mmlu": [1]})
    make_run(tmp_path, "empty", {})
    values = {"experiment": "e", "output_root": str(tmp_path)}

    every = load_runs(build_experiment(values))
    some = load_runs(build_experiment({**values, "compare_runs": ["second", "e/first", str(tmp_path / "e/first")]}))

    assert [run.name for run in every] == ["e/first", "e/second"]
    assert [run.name for run in some] == ["e/second", "e/first", "e/first"]
    with pytest.raises(CompareError, match="did you mean 'first'"):
        load_runs(build_experiment({**values, "compare_runs": ["frist"]}))
    with pytest.raises(CompareError, match="no run below"):
        load_runs(build_experiment({**values, "experiment": "other"}))


def test_rows_survive_a_torn_last_line(tmp_path: Path) -> None:
    base = make_run(tmp_path, "base", {"mmlu": [1, 0, 1]})
    with open(base.folder.table_path("documents"), "a") as file:
        file.write(json.dumps({"task": "mmlu_x"})[:9])

    assert by_set(base, base)["all"]["n"] == 3


def test_rates_of_arrival_are_points_of_their_own_and_the_verdict_names_the_rate(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name, {"mmlu": answers(400)}) for name in ("base", "fast")]
    for run, speeds in zip(runs, ((100.0, 180.0), (110.0, 360.0)), strict=True):
        for rate, speed in zip((1.0, 4.0), speeds, strict=True):
            run.folder.append("rows", sweep_row(speed, concurrency=4096, load="poisson", rate=rate))

    found = Comparison(runs, baseline=runs[0]).verdict

    (best,) = [row for row in found.table.to_dict("records") if row["run"] == found.best]
    assert found.best.endswith("fast") and best["speedup"] == pytest.approx(2.0)  # at 4 requests/s, the higher rate
    first = str(comparison_findings(found, pandas.DataFrame())[0])
    assert "360 output tokens/s at 4 requests/s, 2.00 times" in first


def test_a_load_that_only_one_run_has_is_named_with_what_is_unusual_of_it(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name, {"mmlu": answers(400)}) for name in ("base", "other")]
    runs[0].folder.append("rows", sweep_row(100.0))
    runs[1].folder.append("rows", sweep_row(300.0, shared_prefix=0.5))

    lacks = runs[1].lacks(runs[0].points.copy().pop())

    assert lacks == ["not measured at concurrency 4, prompt 64, output 32 "
                     "(only at concurrency 4, prompt 64, output 32, shared_prefix 0.5)"]  # fmt: skip
