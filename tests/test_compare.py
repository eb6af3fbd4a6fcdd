"""Comparison of run folders: what is paired, what is refused, and what comes of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from compared_runs import add_task, answers, by_set, make_run, table_of

from ascend_kit.evaluation.compare import compare_accuracy, pair_documents
from ascend_kit.evaluation.perplexity import compare_perplexity
from ascend_kit.evaluation.tradeoff import Comparison


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
