"""What the last busy card costs: fixed slices of the requests against least-loaded dispatch, simulated.

    python benchmarks/dispatch_tail.py [--requests 4000] [--seeds 5] [--out dispatch_tail.csv]

Each card is a continuous-batching engine with `slots` running requests; a step takes a fixed time plus a little per
running request and per prompt token, so speed depends on the load. Output lengths are log-normal up to
`max_new_tokens`: the median answer is short, the mean more than twice as long. Fixed slices give card i the i-th part
of the list; least loaded is `engine.dispatcher.Dispatcher`, the code the engine runs. Three cases: requests in random
order, grouped by kind with the talkative kinds last (as files usually are), and random order with one card a fifth
slower. Reported: makespan, and the share of card time after a card's last request while another still works.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

from ascend_kit.engine.dispatcher import Dispatcher

# Qwen2.5-7B in bf16 on one card of 1.6 TB/s at 60 %: 15.2 GB of weights a step, and KV of about 1000 tokens a request.
STEP_S, PER_REQUEST_S, PER_PROMPT_TOKEN_S = 0.0159, 0.00006, 0.00009


@dataclass(frozen=True)
class Work:
    """One request."""

    prompt: int  # tokens
    output: int  # tokens


CASES = {"random order": (False, 1.0), "grouped by kind": (True, 1.0), "one card 20 % slower": (False, 1.25)}


def workload(count: int, seed: int, longest: int, is_grouped: bool) -> list[Work]:
    """Heavy-tailed requests of four kinds, of which each writes twice as much as the one before."""
    draw = random.Random(seed)
    works = []
    for number in range(count):
        kind = number * 4 // count
        length = draw.lognormvariate(3.6 + kind * 0.69, 1.1)
        works.append(Work(draw.randrange(32, 512), min(longest, max(1, round(length)))))
    if not is_grouped:
        draw.shuffle(works)
    return works


class Card:
    """A replica in simulated time: runs until its next request ends."""

    def __init__(self, slots: int, slowness: float = 1.0):
        self.slots, self.slowness, self.now, self.steps = slots, slowness, 0.0, 0
        self.ends: list[tuple[int, int]] = []  # (step at which it ends, number), a heap
        self.waiting: list[tuple[int, Work]] = []
        self.prefill = 0

    def give(self, number: int, work: Work) -> None:
        self.waiting.append((number, work))
        self._admit()

    def _admit(self) -> None:
        while self.waiting and len(self.ends) < self.slots:
            number, work = self.waiting.pop(0)
            heapq.heappush(self.ends, (self.steps + work.output, number))
            self.prefill += work.prompt

    @property
    def next_end_s(self) -> float:
        """When its next request ends, if nothing is added."""
        if not self.ends:
            return float("inf")
        steps = self.ends[0][0] - self.steps
        busy_s = self.prefill * PER_PROMPT_TOKEN_S + steps * (STEP_S + len(self.ends) * PER_REQUEST_S)
        return self.now + busy_s * self.slowness

    def advance(self) -> int:
        """Run to the next end; the number of the request that ended."""
        self.now, self.prefill = self.next_end_s, 0
        self.steps, number = heapq.heappop(self.ends)
        self._admit()
        return number


def fixed_slices(works: list[Work], cards: list[Card]) -> list[float]:
    """Finishing time of each card, s."""
    share = -(-len(works) // len(cards))
    for number, card in enumerate(cards):
        for place, work in enumerate(works[number * share : (number + 1) * share]):
            card.give(place, work)
        while card.ends:
            card.advance()
    return [card.now for card in cards]


def least_loaded(works: list[Work], cards: list[Card]) -> list[float]:
    """The same with requests placed one by one by the engine's dispatcher."""
    dispatcher = Dispatcher(slots=cards[0].slots, tokens_per_step=2048, block_size=128)
    for number in range(len(cards)):
        dispatcher.add_replica(number)
    for number, work in enumerate(works):
        dispatcher.submit(number, [number] * work.prompt)
    while dispatcher.jobs:
        for where, number in dispatcher.assign():
            card = cards[where]
            if not card.ends:
                card.now = max(card.now, min((c.now for c in cards if c.ends), default=card.now))
            card.give(number, works[number])
        dispatcher.remove(min(cards, key=lambda card: card.next_end_s).advance())
    return [card.now for card in cards]


def compare(case: str, num_cards: int, options: argparse.Namespace) -> dict[str, object]:
    """A row: both ways of dispatch on the same requests, means over the seeds."""
    is_grouped, slowness = CASES[case]
    makespans, losses = {}, {}
    for name, play in (("fixed", fixed_slices), ("least_loaded", least_loaded)):
        runs = []
        for seed in range(options.seeds):
            cards = [Card(options.slots, slowness if number == 0 else 1.0) for number in range(num_cards)]
            runs.append(play(workload(options.requests, seed, options.max_new_tokens, is_grouped), cards))
        makespans[name] = statistics.fmean(max(run) for run in runs)
        losses[name] = statistics.fmean(1 - statistics.fmean(run) / max(run) for run in runs)
    return {
        "case": case,
        "cards": num_cards,
        "requests": options.requests,
        "slots": options.slots,
        "fixed_s": round(makespans["fixed"], 1),
        "least_loaded_s": round(makespans["least_loaded"], 1),
        "fixed_lost": round(losses["fixed"], 3),
        "least_loaded_lost": round(losses["least_loaded"], 3),
        "speedup": round(makespans["fixed"] / makespans["least_loaded"], 3),
    }


def main() -> None:
    """Print a table, and write it as CSV when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [compare(case, num_cards, options) for case in CASES for num_cards in (2, 4, 8)]
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    if options.out:
        with options.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
