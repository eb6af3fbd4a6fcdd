"""Evidence, the sequential test and the quantisation gate, each against an example worked out by hand."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pandas
import pytest
from compared_runs import answers, make_run, sweep_row

from ascend_kit.evaluation import evidence
from ascend_kit.evaluation.gate import break_even, gate, speed_ratios
from ascend_kit.evaluation.sequential import Decision, SequentialTest
from ascend_kit.show import charts

SURE = [math.log(0.9), math.log(0.1)]
UNSURE = [math.log(0.4), math.log(0.6)]


def documents() -> pandas.DataFrame:
    """Two sure answers of which one is right, and two less sure ones that are both right."""
    rows = [(SURE, 0, 0), (SURE, 0, 1), (UNSURE, 1, "B"), (UNSURE, 1, [1])]
    return pandas.DataFrame(
        [
            {"set": "s", "choice_logprobs": logprobs, "prediction": given, "target": right, "acc": float(n != 1)}
            for n, (logprobs, given, right) in enumerate(rows)
        ]
    )


def test_calibration_by_hand() -> None:
    (row,) = evidence.calibration(documents()).to_dict("records")

    # Bins: 0.9 -> 1 of 2 right, 0.6 -> 2 of 2 right; both gaps are 0.4.
    assert row["expected_calibration_error"] == pytest.approx(0.4)
    # (0.1^2 + 0.1^2 + 0.9^2 + 0.9^2 + 2 (0.4^2 + 0.4^2)) / 4
    assert row["brier"] == pytest.approx((0.02 + 1.62 + 0.64) / 4)
    assert row["mean_confidence"] == pytest.approx(0.75) and row["accuracy"] == 0.75
    bins = evidence.reliability(documents())
    assert list(bins["confidence"]) == pytest.approx([0.6, 0.9]) and list(bins["accuracy"]) == [1.0, 0.5]


def test_the_calibration_figure_joins_only_bins_of_enough_documents() -> None:
    bins = {"set": "s", "bin": [4, 6, 9], "documents": [12, 1, 30], "confidence": [0.45, 0.62, 0.95]}
    figure = charts.reliability(pandas.DataFrame({**bins, "accuracy": [0.5, 0.0, 0.9]}))

    lines = {line.get_linestyle(): list(line.get_xdata()) for line in figure.axes[0].lines}
    assert lines["None"] == [62.0] and [45.0, 95.0] in lines.values()


def test_letters_are_counted_as_given_and_as_right() -> None:
    table = evidence.letters(documents()).set_index("letter")

    assert list(table["given_percent"]) == [50.0, 50.0] and list(table["right_percent"]) == [25.0, 75.0]
    many = documents().assign(choice_logprobs=[[-1.0] * 28] * 4)
    assert list(evidence.letters(many)["letter"])[24:] == ["Y", "Z", "27", "28"]


def test_cut_and_empty_answers_are_counted() -> None:
    rows = pandas.DataFrame(
        {
            "set": ["g"] * 4,
            "answer": ["4", " ", "5", "6"],
            "finish_reason": ["stop", "stop", "length", "stop"],
            "num_output_tokens": [2, 0, 8, 2],
            "num_thinking_tokens": [10, 20, 30, None],
        }
    )

    (row,) = evidence.ends(rows).to_dict("records")

    assert (row["cut_percent"], row["empty_percent"], row["mean_answer_tokens"]) == (25.0, 25.0, 3.0)
    assert row["mean_thinking_tokens"] == 20.0


def test_flips_are_told_in_both_directions_with_examples(tmp_path: Path) -> None:
    base = make_run(tmp_path, "base", {"mmlu": [1, 1, 1, 0, 0, 1]})
    other = make_run(tmp_path, "other", {"mmlu": [1, 0, 0, 1, 0, 1]})

    table = evidence.flips(base, [other])

    lost, won = (table[table["direction"] == name] for name in ("lost", "won"))
    assert list(lost["documents"]) == [2, 2] and sorted(lost["doc_id"]) == [1, 2]
    assert list(won["doc_id"]) == [3]


# --- the sequential test ----------------------------------------------------------------------------------------------


def test_equal_answers_end_within_the_margin_and_a_large_loss_beyond_it() -> None:
    equal, worse = SequentialTest(0.02), SequentialTest(0.02)
    generator = random.Random(0)

    while equal.outcome == "undecided":
        equal.add([0.0])
    while worse.outcome == "undecided":
        worse.add([-1.0 if generator.random() < 0.15 else 0.0])

    assert (equal.outcome, worse.outcome) == ("within margin", "worse than margin")
    assert equal.n < 1000 and worse.n < 400
    assert worse.lost > 0 == worse.won


def test_the_first_bet_by_hand() -> None:
    test = SequentialTest(0.02)  # the border of (difference + 1) / 2 is 0.49, the first guess 0.5

    test.add([1.0])

    stake = 0.01 / (0.05 + 0.01**2)
    assert test._above.log_capital == pytest.approx(math.log(1 + stake * (1.0 - 0.49)))
    assert test._below.log_capital == 0.0  # nothing is staked on a loss that was not seen


def test_looking_after_every_document_errs_as_seldom_as_it_says() -> None:
    generator, wrong = random.Random(1), 0
    for _ in range(120):  # the loss is exactly the margin: whoever says it is smaller errs
        test = SequentialTest(0.05)
        while test.outcome == "undecided" and test.n < 400:
            test.add([generator.choices((-1.0, 1.0, 0.0), (0.10, 0.05, 0.85))[0]])
        wrong += test.outcome == "within margin"

    assert wrong <= 12  # 5 % of 120 and two standard deviations


def test_documents_count_in_a_drawn_order_and_passages_together_whatever_order_they_are_answered_in() -> None:
    row = {"doc_hash": "d", "prompt_hash": "p", "acc": 1.0}
    baseline = {("t", n): row | {"passage": f"p{n // 2}"} for n in range(200)}
    keys = list(baseline)
    forth, back = Decision(baseline, 0.2, seed=3), Decision(baseline, 0.2, seed=3)
    outcomes = []
    for decision, order in ((forth, keys), (back, keys[::-1])):
        for key in order:
            decision.add(key, row)
        outcomes.append((decision.test.outcome, decision.test.n))

    assert outcomes[0] == outcomes[1] and outcomes[0][0] == "within margin"
    assert outcomes[0][1] % 2 == 0 and outcomes[0][1] < 200
    assert all(forth.places["t", n] == forth.places["t", n + 1] for n in range(0, 200, 2))
    assert Decision(baseline, 0.2, seed=4).places != forth.places


# --- the gate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "rates", "word", "words"),
    [
        (0, {1: [200.0], 4: [300.0]}, "use it", "2.00 to 3.00 times (measured once) as fast"),
        (0, {1: [90.0], 4: [150.0]}, "use it from a load on", "faster from 4 requests in flight on"),
        (0, {1: [90.0], 4: [90.0]}, "not", "not faster at the highest loads"),
        (0, {1: [149.0, 151.0], 4: [90.0, 130.0]}, "undecided", "not surely faster at the highest loads"),
        (200, {1: [200.0], 4: [300.0]}, "not", "less accurate"),
    ],
)
def test_the_gate_says_use_it_from_a_load_on_or_not(tmp_path: Path, wrong, rates, word, words) -> None:
    base = make_run(tmp_path, "base", {"mmlu": answers(2000)})
    other = make_run(tmp_path, "w4a16", {"mmlu": answers(2000, wrong=wrong)})
    for load, repeats in rates.items():
        for repeat, rate in enumerate(repeats):
            base.folder.append("rows", sweep_row(100.0 + repeat, concurrency=load, repeat=repeat))
            other.folder.append("rows", sweep_row(rate, concurrency=load, repeat=repeat))

    found = gate(base, other, 0.01)

    assert found.word == word and words in found.text
    json.dumps(found.to_row())


def test_the_quotient_of_speeds_has_an_interval_by_hand(tmp_path: Path) -> None:
    # Means 150 and 100, standard errors 1 and 1 of two repeats each; t with one degree of freedom is 12.7062.
    base, other = (make_run(tmp_path, name, {"mmlu": answers(20)}) for name in ("base", "w4a16"))
    for repeat, shift in enumerate((-1.0, 1.0)):
        base.folder.append("rows", sweep_row(100 + shift, concurrency=4, repeat=repeat))
        other.folder.append("rows", sweep_row(150 + shift, concurrency=4, repeat=repeat))

    (row,) = speed_ratios(base, other)

    factor = math.exp(12.7062047 * math.hypot(1 / 150, 1 / 100))
    assert (row["speedup"], row["low"], row["high"]) == pytest.approx((1.5, 1.5 / factor, 1.5 * factor))
    assert break_even([row]) == 4


def test_speeds_of_unlike_loads_and_those_that_arrivals_bound_are_not_divided(tmp_path: Path) -> None:
    base, other = (make_run(tmp_path, name, {"mmlu": answers(20)}) for name in ("base", "w8a8"))
    base.folder.append("rows", sweep_row(100, shared_prefix=0.5))
    other.folder.append("rows", sweep_row(300, shared_prefix=0.0))
    for run in (base, other):
        run.folder.append("rows", sweep_row(50, concurrency=4096, load="poisson", rate=2.0))

    assert speed_ratios(base, other) == []


def test_break_even_is_where_it_stays_faster() -> None:
    speeds = [{"concurrency": load, "speedup": ratio} for load, ratio in ((1, 1.2), (2, 0.9), (4, 1.1), (8, 1.3))]

    assert break_even(speeds) == 4
    assert break_even(speeds[:2]) is None
