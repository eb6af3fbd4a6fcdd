"""Paired statistics against hand-worked examples and scipy; comparison and verdict of run folders."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
import pytest
from chinese_text import english_in

from ascend_kit.evaluation.compare import (
    PairedCounts,
    accuracy_interval,
    compare_accuracy,
    holm,
    pair_documents,
    paired_counts,
    score_interval,
)
from ascend_kit.evaluation.evidence import flips
from ascend_kit.evaluation.gate import gates
from ascend_kit.evaluation.judge import reasons
from ascend_kit.evaluation.perplexity import bootstrap_ratio_difference, compare_perplexity
from ascend_kit.evaluation.runs import CompareError, Run, differences, load_runs, pick_baseline
from ascend_kit.evaluation.tradeoff import Comparison, answer_length_ratio
from ascend_kit.identity import Identity
from ascend_kit.messages import use_language
from ascend_kit.params import build_experiment
from ascend_kit.results import RunFolder
from ascend_kit.show import tables
from ascend_kit.show.findings import comparison_findings

# --- statistics ---------------------------------------------------------------------------------------------


def test_counts_of_a_small_example() -> None:
    counts = paired_counts([1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 1, 1], [None] * 6)

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


@pytest.mark.parametrize(("gains", "losses", "n"), [(9, 4, 98), (0, 3, 40), (1, 0, 30), (20, 60, 500)])
def test_the_interval_ends_where_the_likelihood_puts_it(gains: int, losses: int, n: int) -> None:
    """At each end what was seen is 1.96 standard errors away, with the share of losses that is likeliest there."""
    from scipy.optimize import minimize_scalar

    ends = PairedCounts(n - gains - losses, losses, gains, 0).interval()

    for end, distance in zip(ends, (1.959964, -1.959964), strict=True):

        def unlikely(lost: float, end=end) -> float:
            won, same = lost + end, 1 - 2 * lost - end
            parts = ((gains, won), (losses, lost), (n - gains - losses, same))
            return -sum(count * math.log(share) for count, share in parts if count)

        bounds = (max(0.0, -end) + 1e-12, (1 - end) / 2 - 1e-12)
        lost = minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        error = math.sqrt((2 * lost + end - end**2) / n)
        assert ((gains - losses) / n - end) / error == pytest.approx(distance, abs=2e-3)


def test_the_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    from scipy.stats import multinomial

    for n, lost, won in ((60, 0.06, 0.06), (120, 0.10, 0.06), (400, 0.02, 0.0), (1000, 0.01, 0.01)):
        cells = [(b, c) for b in range(min(n, 60)) for c in range(min(n, 60)) if b + c <= n]
        covered = 0.0
        for b, c in cells:
            chance = multinomial.pmf([b, c, n - b - c], n, [lost, won, 1 - lost - won])
            if chance > 1e-6:
                low, high = PairedCounts(n - b - c, b, c, 0).interval()
                covered += chance * (low <= won - lost <= high)
        assert 0.93 < covered < 0.97


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


def test_the_accuracy_interval_by_hand() -> None:
    # Wilson: 7 of 10 with z = 1.96: centre (0.7 + z^2/20) / (1 + z^2/10), half z/(1 + z^2/10) sqrt(.21/10 + z^2/400).
    z = 1.959964
    centre, scale = (0.7 + z * z / 20) / (1 + z * z / 10), z / (1 + z * z / 10)
    half = scale * math.sqrt(0.21 / 10 + z * z / 400)

    low, high = accuracy_interval([1] * 7 + [0] * 3, [None] * 10)

    assert (low, high) == (pytest.approx(centre - half, abs=1e-6), pytest.approx(centre + half, abs=1e-6))
    assert accuracy_interval([1] * 5, [None] * 5)[1] == 1.0


def test_the_interval_over_passages_by_hand() -> None:
    # Ten passages of two questions, two won whole, eight unchanged. Mean 0.2; sums 2 and 0, so squares
    # (2 - 0.4)^2 * 2 + 0.4^2 * 8 = 6.4; variance 6.4 * 10 / 9 / 400 over that of 20 single questions,
    # (0.2 - 0.04) / 20: an effect of 20 / 9.
    passages = [n // 2 for n in range(20)]
    counts = paired_counts([0] * 20, [1] * 4 + [0] * 16, passages)

    assert counts.interval() == pytest.approx(score_interval(4 * 9 / 20, 0, 9, 1.959964), abs=1e-6)
    assert counts.p_value == 0.5  # two passages changed: both heads or both tails


def test_the_exact_test_over_passages_by_hand() -> None:
    # Passages won by 2, 1 and 1 and none lost: all heads or all tails of three coins.
    counts = paired_counts([0, 0, 0, 0, 1], [1, 1, 1, 1, 1], ["a", "a", "b", "c", "d"])

    assert counts.p_value == pytest.approx(2 / 8)
    # Won by 2, lost by 1: |sum| of +-2 +-1 reaches 1 always.
    assert paired_counts([0, 0, 1, 1], [1, 1, 0, 1], ["a", "a", "b", "b"]).p_value == 1.0


def test_passages_of_one_document_are_the_independent_form() -> None:
    rnd = random.Random(3)
    ours, theirs = ([rnd.randrange(2) for _ in range(200)] for _ in range(2))
    alone, known = PairedCounts(*_cells(ours, theirs)), paired_counts(ours, theirs, list(range(200)))

    assert known == alone and known.passages is None
    assert (known.interval(), known.p_value) == (alone.interval(), alone.p_value)


def _cells(ours: list[int], theirs: list[int]) -> list[int]:
    pairs = list(zip(ours, theirs, strict=True))
    return [pairs.count(cell) for cell in ((1, 1), (1, 0), (0, 1), (0, 0))]


def test_intervals_cover_where_questions_share_passages() -> None:
    numpy = pytest.importorskip("numpy")
    rng = numpy.random.default_rng(0)
    passages = [passage for passage in range(45) for _ in range(6)]
    hits = {"difference": 0, "accuracy": 0}
    for _ in range(600):
        ours = rng.random(270) < numpy.repeat(rng.beta(3, 2, 45), 6)  # accuracy 0.6, passages easy or hard
        shift = numpy.repeat(rng.choice([0, 1, -1], 45, p=[0.9, 0.05, 0.05]), 6)
        theirs = numpy.where(shift == 0, ours, shift > 0)
        ours, theirs = ours.astype(int).tolist(), theirs.astype(int).tolist()
        low, high = paired_counts(ours, theirs, passages).interval()
        hits["difference"] += low <= 0.05 * (0.4 - 0.6) <= high
        low, high = accuracy_interval(ours, passages)
        hits["accuracy"] += low <= 0.6 <= high

    assert 0.93 <= hits["difference"] / 600 <= 0.985 and 0.93 <= hits["accuracy"] / 600 <= 0.97


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_single_page_says_nothing_of_how_others_differ() -> None:
    assert bootstrap_ratio_difference([1.0], [2.0], [4.0]) == (0.25, -math.inf, math.inf)


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
        paired_counts([0.5], [1], [None])
    with pytest.raises(ValueError, match="same documents"):
        paired_counts([1, 0], [1], [None] * 2)


# --- run folders --------------------------------------------------------------------------------------------


def make_run(
    root: Path,
    name: str,
    correct: dict[str, list[int]],
    *,
    rates: Sequence[float] = (),
    asked: dict[str, Any] | None = None,
    **changes: Any,
) -> Run:
    """A run with documents (set -> right or wrong) and one sweep point, one row per rate.

    `asked` replaces parts of the identity under which the documents were answered.
    """
    experiment = build_experiment({"experiment": "e", "run": name, "output_root": str(root), **changes})
    with RunFolder.open(experiment, "05_evaluate") as folder:
        for suite, values in correct.items():
            add_task(folder, suite, [{"acc": float(value)} for value in values], **(asked or {}))
        for repeat, rate in enumerate(rates):
            folder.append("rows", sweep_row(rate, repeat))
    return Run(folder)


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


def by_set(baseline: Run, candidate: Run, **options: Any) -> dict[str, dict[str, Any]]:
    return {row["set"]: row for row in compare_accuracy(baseline, candidate, **options)}


def table_of(runs: Sequence[Run], **options: Any) -> dict[str, dict[str, Any]]:
    return {row["run"]: row for row in Comparison(runs, **options).table.to_dict("records")}


def test_runs_are_compared_per_set_and_over_all_documents(tmp_path: Path) -> None:
    base = make_run(tmp_path, "base", {"mmlu": [1, 1, 1, 0, 0], "ceval": [1, 0, 1, 0]})
    other = make_run(tmp_path, "other", {"mmlu": [1, 0, 1, 1, 0], "ceval": [0, 0, 0, 0]})

    rows = by_set(base, other)

    assert list(rows) == ["mmlu", "ceval", "all"]
    assert [rows["mmlu"][key] for key in ("n", "only_baseline", "only_candidate")] == [5, 1, 1]
    assert rows["ceval"]["difference_points"] == -50.0
    assert [rows["all"][key] for key in ("n", "only_baseline", "only_candidate")] == [9, 3, 1]
    assert rows["all"]["difference_points"] == pytest.approx(-200 / 9)
    assert rows["ceval"]["p_value"] == pytest.approx(0.5) and rows["ceval"]["p_holm"] == 1.0
    assert {row["outcome"] for row in rows.values()} == {"undecided"}
    assert "documents would settle it" in rows["all"]["verdict"]
    assert rows["all"]["baseline"] == "e/base"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"task": {"num_fewshot": 1}}, "shots: 5 -> 1"),
        ({"task": {"chat_template": "a" * 32}}, "chat template: None -> aaaaaaaaaaaa"),
        ({"task": {"version": 2}}, "task version: 1 -> 2"),
        ({"task": {"thinking": True}}, "thinking: None -> True"),
        ({"data": "edited"}, "data: 'd' -> 'edited'"),
    ],
    ids=["shots", "template", "version", "thinking", "data"],
)
def test_runs_that_were_asked_otherwise_are_not_paired_and_the_words_say_why(tmp_path, asked, words) -> None:
    answered = {"mmlu": answers(3000)}
    base = make_run(tmp_path, "base", answered, rates=[100.0])
    other = make_run(tmp_path, "other", answered, rates=[150.0], asked=asked)

    comparison = Comparison([base, other], 1.0, baseline=base)

    (row,) = compare_accuracy(base, other)
    assert row["outcome"] == "not paired" and words in row["verdict"]
    assert comparison.verdict.best == "e/base" and words in comparison.verdict.text
    assert words in table_of([base, other], baseline=base)["e/other"]["lacks"]


def test_weights_tokenizer_precision_and_versions_may_differ(tmp_path: Path) -> None:
    base = make_run(tmp_path, "base", {"mmlu": [1, 0]})
    asked = {"tokenizer": "t", "engine": {"precision": "fp16"}, "versions": {"torch": "3"}, "device": {"name": "npu"}}
    other = make_run(tmp_path, "other", {"mmlu": [1, 0]}, asked=asked)

    assert by_set(base, other)["all"]["n"] == 2


def test_what_was_asked_alike_is_compared_although_another_set_was_not(tmp_path: Path) -> None:
    base = make_run(tmp_path, "base", {"mmlu": answers(3000), "ceval": [1, 0]}, rates=[100.0])
    other = make_run(tmp_path, "other", {"mmlu": answers(3000)}, rates=[150.0])
    add_task(other.folder, "ceval", [{"acc": 1.0}, {"acc": 0.0}], task={"num_fewshot": 1})

    rows = by_set(base, other)

    assert rows["mmlu"]["n"] == rows["all"]["n"] == 3000
    assert rows["ceval"]["outcome"] == "not paired"
    assert Comparison([base, other], baseline=base).verdict.best == "e/base"  # unlike runs get no verdict


def test_only_documents_with_the_same_content_and_prompt_are_paired(tmp_path: Path) -> None:
    base = make_run(tmp_path, "base", {"mmlu": [1, 1, 0, 1]})
    other = make_run(tmp_path, "other", {"mmlu": [1, 0, 0, 1, 1]})
    changed = other.folder.table_path("documents")
    text = changed.read_text().replace('"doc_hash": "h1"', '"doc_hash": "edited"')
    changed.write_text(text.replace('"prompt_hash": "p2"', '"prompt_hash": "chat"'))

    pairs = pair_documents(base, other, "acc")

    assert [row["doc_id"] for row, _ in pairs.rows] == [0, 3]
    assert "2 of 4 documents have other prompts" in pairs.why_not


def test_a_document_cut_in_one_run_only_is_not_paired(tmp_path: Path) -> None:
    base, other = (make_run(tmp_path, name, {}) for name in ("base", "other"))
    add_task(base.folder, "mmlu", [{"acc": 1.0, "cut_tokens": 0}, {"acc": 1.0, "cut_tokens": 0}])
    add_task(other.folder, "mmlu", [{"acc": 1.0, "cut_tokens": 9}, {"acc": 1.0, "cut_tokens": 0}])

    assert [row["doc_id"] for row, _ in pair_documents(base, other, "acc").rows] == [1]


def test_questions_on_one_passage_count_as_one_observation(tmp_path: Path) -> None:
    base, other = (make_run(tmp_path, name, {}) for name in ("base", "other"))
    for run, first in ((base, 0.0), (other, 1.0)):
        values = [{"acc": first if doc < 6 else 1.0, "passage": f"passage {doc // 6}"} for doc in range(36)]
        add_task(run.folder, "agieval", values)

    row = by_set(base, other)["agieval"]

    assert (row["n"], row["num_passages"], row["only_candidate"]) == (36, 6, 6)
    assert row["p_value"] == 1.0  # six questions, one passage: no evidence, where McNemar would give 2/64
    assert row["low_points"] < -16


@pytest.mark.parametrize(
    ("wrong", "flipped", "n", "outcome"),
    [(2, 2, 3000, "within margin"), (200, 0, 3000, "worse"), (3, 2, 60, "undecided")],
)
def test_outcomes(tmp_path: Path, wrong: int, flipped: int, n: int, outcome: str) -> None:
    base = make_run(tmp_path, "base", {"mmlu": answers(n)})
    other = make_run(tmp_path, "other", {"mmlu": answers(n, wrong, flipped)})

    row = by_set(base, other, margin=0.01)["all"]

    assert row["outcome"] == outcome
    assert bool(row["low_points"] > -1.0) is (outcome == "within margin")


def test_perplexity_is_compared_on_common_pages(tmp_path: Path) -> None:
    runs = []
    for name, factor in (("base", 1.0), ("other", 1.1)):
        run = make_run(tmp_path, name, {})
        sizes = [300 + 7 * doc for doc in range(20)]
        pages = [{"logprob": -factor * size * math.log(2), "bytes": size} for size in sizes]
        add_task(run.folder, "wikitext", pages, metric="bits_per_byte")
        runs.append(run)

    row = compare_perplexity(*runs)

    assert row is not None
    assert row["baseline_bits_per_byte"] == pytest.approx(1.0)
    assert row["candidate_bits_per_byte"] == pytest.approx(1.1)
    assert row["difference_bits_per_byte"] == pytest.approx(0.1) and row["outcome"] == "worse"
    assert compare_perplexity(make_run(tmp_path, "none", {"mmlu": [1]}), runs[0]) is None


# --- accuracy against throughput, and the verdict -----------------------------------------------------------


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
    lighter = table_of(runs, point=(1, 64, 32))
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
