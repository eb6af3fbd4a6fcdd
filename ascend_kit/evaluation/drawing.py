"""Which documents are asked when not all are: spread over a set's subjects, drawn by a seed. Plain numbers only."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from statistics import NormalDist

DISAGREEMENT = 0.1  # share of documents that two precisions of one model answer differently, an upper guess
POWER = 0.8
Z = NormalDist().inv_cdf(0.975)


def allocate(sizes: Mapping[str, int], limit: int) -> dict[str, int]:
    """How many documents of each subject: in proportion to their sizes (largest remainders), at least one of each."""
    total = sum(sizes.values())
    if limit >= total:
        return dict(sizes)
    exact = {name: limit * size / total for name, size in sizes.items()}
    found = {name: max(1, math.floor(value)) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: math.floor(exact[name]) - exact[name]):
        if sum(found.values()) < limit and found[name] < sizes[name]:
            found[name] += 1
    return found


def draw(sizes: Mapping[str, int], limit: int | None, seed: int) -> dict[str, list[int]]:
    """Numbers of the documents to ask, in the order of the data; subjects that are asked as a whole are left out."""
    if limit is None:
        return {}
    counts = allocate(sizes, limit)
    return {
        name: sorted(random.Random(f"{seed} {name}").sample(range(size), counts[name]))
        for name, size in sizes.items()
        if counts[name] < size
    }


def half_width(n: int) -> float:
    """Half of a 95 % interval of an accuracy of n documents at its widest, a fraction."""
    return Z * math.sqrt(0.25 / n)


def detectable(n: int, disagreement: float = DISAGREEMENT) -> float:
    """The smallest difference of two runs on the same n documents that is seen with 80 % power, a fraction."""
    return (Z + NormalDist().inv_cdf(POWER)) * math.sqrt(disagreement / n)
