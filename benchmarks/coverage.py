"""How often the 95 % intervals of an evaluation cover the truth, and how often its tests cry wolf, in simulation.

    python benchmarks/coverage.py [--rounds 4000] [--sequential 1000]

First the paired difference of independent questions, computed without simulation: 40 to 1,000 questions of which 2 to
20 % are lost or won, from as many lost as won to lost only. Then two equally good models answer 270 questions on 45
passages of six: coverage of the paired difference and of the accuracy, and the share of tests below 5 % (asked: 93 to
97 %, and at most 5 %; above 97 % where fewer than five documents or passages differ on average). Then the sequential
test, which looks after every document: how often it errs, how often it decides and after how many documents.
"""

from __future__ import annotations

import argparse
import itertools

import numpy
from scipy.stats import binom

from ascend_kit.evaluation.compare import PairedCounts, paired_counts
from ascend_kit.evaluation.scores import accuracy_interval
from ascend_kit.evaluation.sequential import SequentialTest

PASSAGES, QUESTIONS = 45, 6
# name: (share of passages won or lost as a whole, share of single questions that differ, Beta of a passage's easiness)
CASES = {
    "independent questions": (0.0, 0.10, None),
    "passages easy or hard": (0.0, 0.10, (3, 2)),
    "one passage in ten won or lost": (0.1, 0.02, (3, 2)),
    "three in ten won or lost": (0.3, 0.05, (3, 2)),
    "few differ at all": (0.02, 0.02, (6, 4)),
    "accuracy near 1": (0.1, 0.02, (18, 2)),
}


SIZES, FLIPS, LEANINGS = (40, 100, 270, 1000), (0.02, 0.05, 0.10, 0.20), (0.0, 0.25, 0.5, 0.75, 1.0)


def exact_coverage(n: int, flips: float, leaning: float) -> float:
    """Chance that the interval holds the truth: of n questions a share flips, (1 + leaning) / 2 of it to the worse."""
    lost, won = flips * (1 + leaning) / 2, flips * (1 - leaning) / 2
    most = int(binom.ppf(1 - 1e-7, n, flips)) + 1
    covered = 0.0
    for total in range(most + 1):
        for losses in range(total + 1):
            chance = binom.pmf(total, n, flips) * binom.pmf(losses, total, lost / flips)
            if chance > 1e-8:
                low, high = PairedCounts(n - total, losses, total - losses, 0).interval()
                covered += chance * (low - 1e-9 <= won - lost <= high + 1e-9)
    return covered


def simulate(
    rounds: int, shifted: float, flipped: float, easiness: tuple[float, float] | None, seed: int
) -> list[float]:
    """Shares of rounds: difference covered, accuracy covered, p-value below 5 %."""
    rng = numpy.random.default_rng(seed)
    mean = 0.6 if easiness is None else easiness[0] / sum(easiness)
    passages = [None if easiness is None else n // QUESTIONS for n in range(PASSAGES * QUESTIONS)]
    found = numpy.zeros(3)
    for _ in range(rounds):
        chance = numpy.full(PASSAGES, mean) if easiness is None else rng.beta(*easiness, PASSAGES)
        answers = [rng.random((PASSAGES, QUESTIONS)) < chance[:, None] for _ in range(2)]
        # Both models share most answers; whole passages and single questions go either way with equal chance.
        ours, theirs = answers[0].copy(), answers[0].copy()
        whole = rng.random(PASSAGES)
        for side, low, high in ((ours, 0, shifted / 2), (theirs, shifted / 2, shifted)):
            chosen = (whole >= low) & (whole < high)
            side[chosen] = False
        other = rng.random((PASSAGES, QUESTIONS)) < flipped
        theirs = numpy.where(other, answers[1], theirs)
        counts = paired_counts(*(side.astype(int).ravel().tolist() for side in (ours, theirs)), passages)
        low, high = counts.interval()
        found[0] += low <= 0 <= high
        low, high = accuracy_interval(answers[0].astype(int).ravel().tolist(), passages)
        found[1] += low <= mean <= high
        found[2] += counts.p_value < 0.05
    return list(found / rounds)


# name: (share of documents lost, share won), margin 2 points, 3,000 documents; a tenth differ
SEQUENTIAL = {
    "loss of 2 points, the margin itself": (0.06, 0.04),
    "loss of 2.5 points": (0.0625, 0.0375),
    "loss of 1 point": (0.055, 0.045),
    "no loss": (0.05, 0.05),
    "no loss, 2 in 100 differ": (0.01, 0.01),
    "loss of 5 points": (0.075, 0.025),
}
MARGIN, DOCUMENTS = 0.02, 3000


def simulate_sequential(rounds: int, lost: float, won: float, seed: int) -> tuple[float, float, float]:
    """Shares of rounds that end within the margin and beyond it, and the mean number of documents asked."""
    rng = numpy.random.default_rng(seed)
    ends: list[str] = []
    asked = []
    for _ in range(rounds):
        test = SequentialTest(MARGIN)
        for value in rng.choice([-1.0, 1.0, 0.0], DOCUMENTS, p=[lost, won, 1 - lost - won]):
            if test.add([value]) != "undecided":
                break
        ends.append(test.outcome)
        asked.append(test.n)
    return ends.count("within margin") / rounds, ends.count("worse than margin") / rounds, float(numpy.mean(asked))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4000)
    parser.add_argument("--sequential", type=int, default=1000, help="rounds of the sequential test")
    parsed = parser.parse_args()
    rounds = parsed.rounds
    print("difference of independent questions, by how many flip and how many of these are lost (50 to 100 %)")
    for n, flips in itertools.product(SIZES, FLIPS):
        found = [exact_coverage(n, flips, leaning) for leaning in LEANINGS]
        print(f"{n:5} questions, {n * flips:5.1f} flip:", *(f"{share:6.1%}" for share in found), flush=True)
    print(f"\n{'case':32} {'difference':>11} {'accuracy':>9} {'p < 0.05':>9}")
    for seed, (name, case) in enumerate(CASES.items()):
        shares = simulate(rounds, *case, seed)
        print(f"{name:32} {shares[0]:11.1%} {shares[1]:9.1%} {shares[2]:9.1%}")
    print(f"\n{'sequential':36} {'within margin':>14} {'beyond it':>10} {'documents':>10}")
    for seed, (name, case) in enumerate(SEQUENTIAL.items()):
        within, beyond, asked = simulate_sequential(parsed.sequential, *case, seed)
        print(f"{name:36} {within:14.1%} {beyond:10.1%} {asked:10.0f}")


if __name__ == "__main__":
    main()
