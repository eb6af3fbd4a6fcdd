"""Paired statistics against hand-worked examples and scipy; comparison and verdict of run folders."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ascend_kit.evaluation.compare import (
    CompareError,
    compare_accuracy,
    compare_perplexity,
    load_runs,
    pick_baseline,
    run_name,
)
from ascend_kit.evaluation.paired import (
    PairedCounts,
    binomial_two_sided,
    bootstrap_ratio_difference,
    holm,
    paired_counts,
    wilson_interval,
)
from ascend_kit.evaluation.tradeoff import accuracy_throughput, answer_length_ratio, verdict
from ascend_kit.identity import Identity
from ascend_kit.params import build_experiment
from ascend_kit.results import RunFolder, run_parameters

# --- statistics ---------------------------------------------------------------------------------------------


def test_counts_of_a_small_example() -> None:
    counts = paired_counts([1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 1, 1])

    assert counts == PairedCounts(both_right=2, only_baseline=1, only_candidate=2, both_wrong=1)
    assert (counts.n, counts.discordant) == (6, 3)
    assert counts.difference == pytest.approx(1 / 6)
    assert (counts.baseline_accuracy, counts.candidate_accuracy) == (pytest.approx(3 / 6), pytest.approx(4 / 6))


def test_mcnemar_by_hand() -> None:
    # One gain against five losses: 2 * (1 + 6) / 2**6.
    assert PairedCounts(50, 5, 1, 10).p_value == pytest.approx(14 / 64)
    # Three against three: every split is at least as likely, so the probability is capped at 1.
    assert PairedCounts(0, 3, 3, 0).p_value == 1.0
    assert PairedCounts(80, 0, 0, 20).p_value == 1.0


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (0, 8), (3, 10), (7, 10), (40, 120), (600, 1300)])
def test_the_exact_test_equals_scipys_binomial_test(successes: int, trials: int) -> None:
    stats = pytest.importorskip("scipy.stats")

    assert binomial_two_sided(successes, trials) == pytest.approx(stats.binomtest(successes, trials).pvalue, rel=1e-9)


def test_the_interval_by_hand() -> None:
    # n = 98, so n + 2 = 100: gain (9 + 1) / 100, loss (4 + 1) / 100.
    low, high = PairedCounts(45, 4, 9, 40).interval()

    half = 1.959964 * math.sqrt((0.10 + 0.05 - 0.05**2) / 100)
    assert (low, high) == (pytest.approx(0.05 - half, abs=1e-6), pytest.approx(0.05 + half, abs=1e-6))


def test_the_interval_covers_the_true_difference_about_as_often_as_it_says() -> None:
    rnd = random.Random(0)
    hits = 0
    for _ in range(2000):
        draws = rnd.choices(range(4), weights=[55, 10, 6, 29], k=120)  # true difference -0.04
        low, high = PairedCounts(*(draws.count(cell) for cell in range(4))).interval()
        hits += low <= -0.04 <= high

    assert 0.935 < hits / 2000 < 0.975  # 95 % with about half a percent of simulation error


def test_no_discordant_document_still_leaves_doubt() -> None:
    low, high = PairedCounts(20, 0, 0, 10).interval()

    assert low == pytest.approx(-high) and high > 0.05


def test_the_detectable_difference_is_detected_with_the_stated_power() -> None:
    counts = PairedCounts(560, 60, 60, 320)  # 12 % of 1000 documents disagree
    difference = counts.min_detectable()
    rnd = random.Random(1)
    gain, loss = 0.06 - difference / 2, 0.06 + difference / 2
    found = 0
    for _ in range(400):
        draws = rnd.choices(range(4), weights=[0.56, loss, gain, 0.32], k=1000)
        found += PairedCounts(*(draws.count(cell) for cell in range(4))).p_value < 0.05

    assert difference == pytest.approx((1.95996 + 0.84162) * math.sqrt(122 / 1002 / 1000), rel=1e-4)
    assert 0.72 < found / 400 < 0.88  # 0.8; the exact test is a little conservative


def test_documents_needed_shrink_with_the_margin_squared() -> None:
    counts = PairedCounts(70, 10, 10, 10)

    assert counts.documents_needed(0.02) == math.ceil(22 / 102 * (2.801585 / 0.02) ** 2)
    assert counts.documents_needed(0.01) == pytest.approx(4 * counts.documents_needed(0.02), rel=1e-3)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (7, 10), (10, 10), (300, 1346)])
def test_the_accuracy_interval_equals_scipys(right: int, n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")

    assert wilson_interval(right, n) == (pytest.approx(expected.low, abs=1e-9), pytest.approx(expected.high, abs=1e-9))


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_bootstrap_of_a_ratio_agrees_with_the_normal_interval() -> None:
    rnd = random.Random(2)
    sizes = [rnd.randrange(200, 400) for _ in range(300)]
    base = [size * 1.0 for size in sizes]
    other = [size * rnd.gauss(1.02, 0.05) for size in sizes]

    change, low, high = bootstrap_ratio_difference(base, other, sizes)

    residuals = [b - a - change * size for a, b, size in zip(base, other, sizes, strict=True)]
    half = 1.96 * math.sqrt(sum(r * r for r in residuals)) / sum(sizes)
    assert change == pytest.approx(sum(other) / sum(sizes) - 1)
    assert (low, high) == (pytest.approx(change - half, abs=half / 5), pytest.approx(change + half, abs=half / 5))
    assert bootstrap_ratio_difference(base, other, sizes) == (change, low, high)  # seeded


def test_other_values_than_right_and_wrong_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0 .wrong. or 1 .right."):
        paired_counts([0.5], [1])
    with pytest.raises(ValueError, match="same documents"):
        paired_counts([1, 0], [1])


# --- run folders --------------------------------------------------------------------------------------------


def make_run(
    root: Path,
    name: str,
    correct: dict[str, list[int]],
    *,
    rates: Sequence[float] = (),
    asked: dict[str, Any] | None = None,
    **changes: Any,
) -> RunFolder:
    """A run folder with documents (set -> right or wrong) and one sweep point, one row per rate.

    `asked` replaces parts of the identity under which the documents were answered.
    """
    experiment = build_experiment({"experiment": "e", "run": name, "output_root": str(root), **changes})
    with RunFolder.open(experiment, "05_evaluate") as folder:
        for suite, values in correct.items():
            add_task(folder, suite, [{"acc": float(value)} for value in values], **(asked or {}))
        for repeat, rate in enumerate(rates):
            folder.append("rows", sweep_row(rate, repeat))
    return folder


def add_task(folder: RunFolder, suite: str, values: list[dict[str, Any]], metric: str = "acc", **parts: Any) -> None:
    """A finished task with a document per entry of `values`, and its identity among those asked for."""
    task = {"version": 1, "num_fewshot": 5, "chat_template": None, **parts.pop("task", {})}
    identity = Identity(**{"weights": folder.path.name, "data": "d", "task": task, **parts})
    head = {"task": f"{suite}_x", "set": suite}
    documents = [
        {**head, "doc_id": doc, "doc_hash": f"h{doc}", "prompt_hash": f"p{doc}", **row}
        for doc, row in enumerate(values)
    ]
    score = {**head, "kind": "task", "metric": metric, "value": 0.5, "n": len(values), "conditions": "c"}
    folder.append_all("documents", documents, identity)
    folder.append("scores", score, identity)
    asked = (folder.read_json("evaluation") or {}).get("identities", {})
    folder.write_json("evaluation", {"identities": {**asked, f"{suite}_x": identity.id}})


def sweep_row(rate: float, repeat: int = 0, concurrency: int = 4, **changes) -> dict:
    return {
        "backend": "ascend_kit",
        "concurrency": concurrency,
        "prompt_len": 64,
        "output_len": 32,
        "repeat": repeat,
        "point_id": f"{concurrency}-{repeat}",
        "output_tokens_per_s": rate,
        "tpot_p50_ms": 1000 / rate,
        **changes,
    }


def answers(n: int, wrong: int = 0, flipped: int = 0) -> list[int]:
    """n answers, every third wrong; then `wrong` right ones made wrong and `flipped` wrong ones right."""
    values = [int(i % 3 != 0) for i in range(n)]
    for i in [i for i, value in enumerate(values) if value][:wrong]:
        values[i] = 0
    for i in [i for i in range(0, n, 3)][:flipped]:
        values[i] = 1
    return values


def test_runs_are_compared_per_set_and_over_all_documents(tmp_path: Path) -> None:
    base = make_run(tmp_path, "base", {"mmlu": [1, 1, 1, 0, 0], "ceval": [1, 0, 1, 0]})
    other = make_run(tmp_path, "other", {"mmlu": [1, 0, 1, 1, 0], "ceval": [0, 0, 0, 0]})

    table = compare_accuracy(base, other).set_index("set")

    assert list(table.index) == ["mmlu", "ceval", "all"]
    assert table.loc["mmlu", ["n", "only_baseline", "only_candidate"]].tolist() == [5, 1, 1]
    assert table.loc["ceval", "difference_points"] == -50.0
    assert table.loc["all", ["n", "only_baseline", "only_candidate"]].tolist() == [9, 3, 1]
    assert table.loc["all", "difference_points"] == pytest.approx(-200 / 9)
    assert table.loc["ceval", "p_value"] == 0.5 and table.loc["ceval", "p_holm"] == 1.0
    assert set(table["outcome"]) == {"undecided"}
    assert "documents would settle it" in table.loc["all", "verdict"]
    assert (table["baseline"] == "e/base").all()


def test_only_documents_with_the_same_content_are_paired(tmp_path: Path) -> None:
    base = make_run(tmp_path, "base", {"mmlu": [1, 1, 0]})
    other = make_run(tmp_path, "other", {"mmlu": [1, 0, 0, 1]})
    changed = other.table_path("documents")
    changed.write_text(changed.read_text().replace('"doc_hash": "h1"', '"doc_hash": "edited"'))

    table = compare_accuracy(base, other).set_index("set")

    assert table.loc["all", "n"] == 2


def test_other_prompts_are_counted(tmp_path: Path) -> None:
    base = make_run(tmp_path, "base", {"mmlu": [1, 1, 0]})
    other = make_run(tmp_path, "other", {"mmlu": [1, 1, 0]})
    path = other.table_path("documents")
    path.write_text(path.read_text().replace('"prompt_hash": "p2"', '"prompt_hash": "chat"'))

    assert compare_accuracy(base, other).set_index("set").loc["all", "other_prompts"] == 1


def test_runs_without_a_common_document_are_refused(tmp_path: Path) -> None:
    base = make_run(tmp_path, "base", {"mmlu": [1, 1]})
    other = make_run(tmp_path, "other", {"ceval": [1, 1]})

    with pytest.raises(CompareError, match=r"no common document with 'acc' \(documents: .*e/base.: 2"):
        compare_accuracy(base, other)


@pytest.mark.parametrize(
    ("wrong", "flipped", "n", "outcome"),
    [(2, 2, 3000, "within margin"), (200, 0, 3000, "worse"), (3, 2, 60, "undecided")],
)
def test_outcomes(tmp_path: Path, wrong: int, flipped: int, n: int, outcome: str) -> None:
    base = make_run(tmp_path, "base", {"mmlu": answers(n)})
    other = make_run(tmp_path, "other", {"mmlu": answers(n, wrong, flipped)})

    row = compare_accuracy(base, other, margin=0.01).iloc[-1]

    assert row["outcome"] == outcome
    assert bool(row["low_points"] > -1.0) is (outcome == "within margin")


def test_perplexity_is_compared_on_common_pages(tmp_path: Path) -> None:
    folders = []
    for name, factor in (("base", 1.0), ("other", 1.1)):
        folder = make_run(tmp_path, name, {})
        sizes = [300 + 7 * doc for doc in range(20)]
        pages = [{"logprob": -factor * size * math.log(2), "bytes": size} for size in sizes]
        add_task(folder, "wikitext", pages, metric="bits_per_byte")
        folders.append(folder)

    row = compare_perplexity(*folders)

    assert row["baseline_bits_per_byte"] == pytest.approx(1.0)
    assert row["candidate_bits_per_byte"] == pytest.approx(1.1)
    assert row["difference_bits_per_byte"] == pytest.approx(0.1) and row["outcome"] == "worse"
    assert compare_perplexity(make_run(tmp_path, "none", {"mmlu": [1]}), folders[0]) is None


# --- accuracy against throughput, and the verdict -----------------------------------------------------------


def test_the_table_has_intervals_on_both_axes(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path, "a", {"mmlu": answers(90)}, rates=[100.0, 110.0, 105.0]),
        make_run(tmp_path, "b", {"mmlu": answers(90, wrong=3)}, rates=[200.0, 190.0]),
    ]

    table = accuracy_throughput(runs).set_index("run")

    assert table.loc["e/a", "output_tokens_per_s"] == pytest.approx(105.0)
    assert table.loc["e/a", ["output_tokens_per_s_low", "output_tokens_per_s_high"]].tolist() == [100.0, 110.0]
    assert table.loc["e/a", "rate_interval"] == "range of 3 repeats"
    assert table.loc["e/a", "accuracy_percent"] == pytest.approx(100 * 60 / 90)
    assert table.loc["e/b", "accuracy_percent"] == pytest.approx(100 * 57 / 90)
    assert (table["accuracy_low_percent"] < table["accuracy_percent"]).all()
    assert table.loc["e/b", ["concurrency", "prompt_len", "output_len"]].tolist() == [4, 64, 32]


def test_accuracy_uses_only_documents_that_all_runs_answered(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path, "a", {"mmlu": [1, 0, 1, 1], "ceval": [0, 0]}, rates=[1.0]),
        make_run(tmp_path, "b", {"mmlu": [1, 0]}, rates=[1.0]),
    ]

    table = accuracy_throughput(runs).set_index("run")

    assert table["n"].tolist() == [2, 2] and table.loc["e/a", "accuracy_percent"] == 50.0


def test_a_single_measurement_gets_its_interval_from_its_own_course(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", {"mmlu": [1, 0]}, rates=[100.0])
    steady = [i / 100 for i in range(1, 1001)]  # 100 tokens a second for ten seconds
    run.append("requests", {"point_id": "4-0", "arrival_s": 0.0, "token_times_s": steady[::2]})
    run.append("requests", {"point_id": "4-0", "arrival_s": 0.0, "token_times_s": steady[1::2]})

    row = accuracy_throughput([run]).iloc[0]

    assert row["rate_interval"] == "10 windows of one measurement"
    assert 98 < row["output_tokens_per_s_low"] <= 100 <= row["output_tokens_per_s_high"] < 102


def test_runs_are_compared_at_the_heaviest_point_they_share(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name, {"mmlu": [1, 0]}) for name in ("a", "b")]
    for concurrency in (1, 4, 16):
        runs[0].append("rows", sweep_row(10.0 * concurrency, concurrency=concurrency))
    for concurrency in (1, 4):
        runs[1].append("rows", sweep_row(11.0 * concurrency, concurrency=concurrency))
    runs[1].append("rows", sweep_row(99.0, concurrency=16, status="failed", error="out of memory"))
    runs[1].append("rows", sweep_row(99.0, concurrency=16, backend="transformers"))

    table = accuracy_throughput(runs).set_index("run")

    assert table["concurrency"].tolist() == [4, 4]
    assert table["output_tokens_per_s"].tolist() == [40.0, 44.0]
    assert accuracy_throughput(runs, point=(1, 64, 32))["output_tokens_per_s"].tolist() == [10.0, 11.0]


def test_runs_without_a_common_point_are_refused(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name, {"mmlu": [1]}) for name in ("a", "b")]
    runs[0].append("rows", sweep_row(1.0, concurrency=1))
    runs[1].append("rows", sweep_row(1.0, concurrency=2))

    with pytest.raises(CompareError, match="no common sweep point"):
        accuracy_throughput(runs)


def test_the_verdict_takes_the_fastest_run_within_the_margin(tmp_path: Path) -> None:
    n = 3000
    base = make_run(tmp_path, "base", {"mmlu": answers(n)}, rates=[100.0, 101.0], use_model="source")
    good = make_run(tmp_path, "good", {"mmlu": answers(n, 3, 2)}, rates=[150.0, 149.0])
    bad = make_run(tmp_path, "bad", {"mmlu": answers(n, 300)}, rates=[300.0, 300.0])
    slow = make_run(tmp_path, "slow", {"mmlu": answers(n)}, rates=[120.0, 121.0])

    found = verdict([bad, base, good, slow])
    table = found.table.set_index("run")

    assert (found.best, found.baseline) == ("e/good", "e/base")
    assert table.loc["e/good", "speedup"] == pytest.approx(149.5 / 100.5)
    assert table["qualifies"].to_dict() == {"e/bad": False, "e/base": True, "e/good": True, "e/slow": True}
    assert found.text.startswith("Use e/good: 149.5 output tokens/s, 1.49 times e/base; no loss above 1 points")
    assert "e/bad is 2.99 times as fast as the baseline but does not qualify: less accurate" in found.text
    assert found.cautions == []


def test_too_few_documents_keep_the_baseline_and_say_what_is_missing(tmp_path: Path) -> None:
    base = make_run(tmp_path, "base", {"mmlu": answers(60)}, rates=[100.0])
    fast = make_run(tmp_path, "fast", {"mmlu": answers(60, 2, 2)}, rates=[150.0])

    found = verdict([base, fast], baseline=base)

    assert found.best == "e/base"
    assert "no faster run is shown to lose at most 1 points" in found.text
    assert "cannot be excluded" in found.text and "documents would settle it" in found.text
    assert verdict([base, fast], baseline=base, margin=0.2).best == "e/fast"


def test_one_set_that_collapses_disqualifies_although_the_mean_holds(tmp_path: Path) -> None:
    base = make_run(tmp_path, "base", {"mmlu": answers(20000), "ceval": answers(100)}, rates=[100.0])
    other = make_run(tmp_path, "other", {"mmlu": answers(20000), "ceval": answers(100, wrong=40)}, rates=[150.0])

    found = verdict([base, other], baseline=base)

    assert found.table.set_index("run").loc["e/other", "outcome"] == "within margin"
    assert found.best == "e/base" and "ceval: less accurate" in found.text


def test_overlapping_speeds_and_short_answers_are_cautions(tmp_path: Path) -> None:
    base = make_run(tmp_path, "base", {"mmlu": answers(3000)}, rates=[100.0, 130.0])
    other = make_run(tmp_path, "other", {"mmlu": answers(3000)}, rates=[120.0, 125.0])
    for folder, length in ((base, 100), (other, 80)):
        for index in range(3):
            folder.append("answers", {"index": index, "prompt": "p", "num_output_tokens": length})

    found = verdict([base, other], baseline=base)

    assert answer_length_ratio(base, other) == pytest.approx(0.8)
    assert found.best == "e/other" and len(found.cautions) == 2
    assert "overlap" in found.cautions[0] and "80 % of the baseline's length" in found.cautions[1]


def test_a_run_that_was_not_evaluated_does_not_qualify(tmp_path: Path) -> None:
    base = make_run(tmp_path, "base", {"mmlu": answers(60)}, rates=[100.0])
    other = make_run(tmp_path, "other", {}, rates=[150.0])

    found = verdict([base, other], baseline=base)

    assert found.best == "e/base" and "not evaluated" in found.text
    with pytest.raises(CompareError, match="baseline run e/other has no accuracy_percent: run 05_evaluate"):
        verdict([base, other], baseline=other)


def test_the_plainest_run_is_the_baseline(tmp_path: Path) -> None:
    plain = make_run(
        tmp_path, "z", {}, use_model="source", graph_mode=False, operator_fusion=False, memory_optimize=False
    )
    source = make_run(tmp_path, "b", {}, use_model="source")
    int8 = make_run(tmp_path, "a", {}, quantize="w8a8")

    assert run_name(pick_baseline([int8, source, plain])) == "e/z"
    assert run_name(pick_baseline([int8, source])) == "e/b"


def test_parameters_are_those_of_the_measurement_not_of_the_last_stage(tmp_path: Path) -> None:
    values = {"experiment": "e", "run": "a", "output_root": str(tmp_path)}
    measured = build_experiment({**values, "quantize": "w8a8"})
    with RunFolder.open(measured, "04_throughput") as folder:
        folder.begin(measured, "rows", "requests")
    compared = build_experiment(values)
    with RunFolder.open(compared, "06_compare") as folder:
        folder.begin(compared, "comparison")

    assert run_parameters(folder)["quantize"] == "w8a8"


def test_runs_are_found_by_name_experiment_or_path(tmp_path: Path) -> None:
    for name in ("first", "second"):
        make_run(tmp_path, name, {"mmlu": [1]})
    make_run(tmp_path, "empty", {})
    values = {"experiment": "e", "output_root": str(tmp_path)}

    every = load_runs(build_experiment(values))
    some = load_runs(build_experiment({**values, "compare_runs": ["second", "e/first", str(tmp_path / "e/first")]}))

    assert [run_name(folder) for folder in every] == ["e/first", "e/second"]
    assert [run_name(folder) for folder in some] == ["e/second", "e/first", "e/first"]
    with pytest.raises(CompareError, match="did you mean 'first'"):
        load_runs(build_experiment({**values, "compare_runs": ["frist"]}))
    with pytest.raises(CompareError, match="no run below"):
        load_runs(build_experiment({**values, "experiment": "other"}))


def test_rows_survive_a_torn_last_line(tmp_path: Path) -> None:
    base = make_run(tmp_path, "base", {"mmlu": [1, 0, 1]})
    with open(base.table_path("documents"), "a") as file:
        file.write(json.dumps({"task": "mmlu_x"})[:9])

    assert compare_accuracy(base, base).iloc[-1]["n"] == 3
