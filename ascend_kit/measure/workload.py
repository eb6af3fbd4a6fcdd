"""Seeded requests made of token ids: what is asked of an engine, apart from how it answers.

Token ids are drawn at random, so no tokenizer is needed and lengths are exact. Prompts differ from their
first token on unless a shared prefix is asked for: a prefix cache must not flatter a sweep by accident.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

SPREADS = ("fixed", "heavy_tailed")
_SIGMA = 0.8  # log-normal: the longest of 1,000 draws is about 10 times the mean, as chat logs show


@dataclass(frozen=True)
class Request:
    """One request: a prompt, the exact number of output tokens that must come back, and when it is sent.

    `send_at_s` counts from the start of the workload, or from the end of request `after`, the turn before; None: as
    soon as a place is free. `text` is the prompt as its author wrote it, where it has one.
    """

    index: int
    prompt_token_ids: tuple[int, ...]
    num_output_tokens: int
    send_at_s: float | None = None
    after: int | None = None
    text: str | None = None

    @property
    def total_len(self) -> int:
        """Prompt and output tokens together: the KV slots that the request needs at its end."""
        return len(self.prompt_token_ids) + self.num_output_tokens


def make_requests(
    num_requests: int,
    prompt_len: int,
    output_len: int,
    *,
    vocab_size: int,
    seed: int | tuple[int, ...] = 0,
    spread: str = "fixed",
    shared_prefix_len: int = 0,
    max_total_len: int | None = None,
    avoid_ids: Collection[int] = (),
) -> list[Request]:
    """Requests with distinct prompts, the same for the same arguments on every machine.

    `spread="fixed"` gives every request exactly these lengths; `"heavy_tailed"` draws log-normal lengths with
    these means, cut so that a request never exceeds `max_total_len` tokens. `avoid_ids` (end-of-text and the
    like) never appear in a prompt. Raises ValueError for lengths below one or a vocabulary too small to tell
    prompts apart.
    """
    _check(num_requests, prompt_len, output_len, spread, shared_prefix_len)
    rng = np.random.default_rng(np.random.SeedSequence(seed if isinstance(seed, tuple) else (seed,)))
    prompt_lens = _lengths(rng, num_requests, prompt_len, spread)
    output_lens = _lengths(rng, num_requests, output_len, spread)
    if max_total_len is not None:
        if prompt_len + output_len > max_total_len:
            raise ValueError(
                f"prompt_len {prompt_len} + output_len {output_len} is above max_total_len {max_total_len}"
            )
        prompt_lens, output_lens = _cut(prompt_lens, output_lens, max_total_len)
    allowed = np.array(sorted(set(range(vocab_size)) - set(avoid_ids)))
    if len(allowed) < 2:
        raise ValueError(f"vocab_size {vocab_size} leaves {len(allowed)} usable token ids; at least 2 are needed")
    shared = rng.choice(allowed, shared_prefix_len)
    prompts = _distinct_prompts(rng, allowed, shared, prompt_lens)
    return [
        Request(i, tuple(int(t) for t in prompt), int(n))
        for i, (prompt, n) in enumerate(zip(prompts, output_lens, strict=True))
    ]


def _check(num_requests: int, prompt_len: int, output_len: int, spread: str, shared_prefix_len: int) -> None:
    for name, value in (("num_requests", num_requests), ("prompt_len", prompt_len), ("output_len", output_len)):
        if value < 1:
            raise ValueError(f"{name} is {value}; at least 1 is needed")
    if spread not in SPREADS:
        raise ValueError(f"spread is {spread!r}; allowed: {', '.join(SPREADS)}")
    if not 0 <= shared_prefix_len < prompt_len:
        raise ValueError(
            f"shared_prefix_len is {shared_prefix_len}; it must be below prompt_len ({prompt_len}), so that "
            "each prompt keeps a token of its own"
        )


def _lengths(rng: np.random.Generator, count: int, mean: int, spread: str) -> np.ndarray:
    if spread == "fixed":
        return np.full(count, mean)
    draws = rng.lognormal(math.log(mean) - _SIGMA**2 / 2, _SIGMA, count)
    return np.maximum(1, draws.round().astype(int))


def _cut(prompt_lens: np.ndarray, output_lens: np.ndarray, max_total_len: int) -> tuple[np.ndarray, np.ndarray]:
    output_lens = np.clip(output_lens, 1, max(1, max_total_len - 1))
    return np.clip(prompt_lens, 1, max_total_len - output_lens), output_lens


def _distinct_prompts(
    rng: np.random.Generator, allowed: np.ndarray, shared: np.ndarray, lengths: np.ndarray
) -> list[np.ndarray]:
    """Random bodies behind the shared prefix; first own tokens differ for as long as the vocabulary lasts."""
    firsts = np.resize(rng.permutation(allowed), len(lengths))
    prompts: list[np.ndarray] = []
    seen: set[bytes] = set()
    for first, length in zip(firsts, lengths, strict=True):
        prefix = shared[: length - 1]
        for _ in range(100):
            body = rng.choice(allowed, length - len(prefix) - 1)
            prompt = np.concatenate([prefix, [first], body]).astype(np.int64)
            if prompt.tobytes() not in seen:
                break
            first = rng.choice(allowed)
        else:
            raise ValueError(f"cannot make {len(lengths)} distinct prompts of {length} tokens from {len(allowed)} ids")
        seen.add(prompt.tobytes())
        prompts.append(prompt)
    return prompts
