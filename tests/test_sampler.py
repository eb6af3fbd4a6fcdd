"""Sampling: the right distribution, repeatable, and independent of the batch."""

from __future__ import annotations

import torch

from ascend_kit.engine.sampler import sample, token_logprobs, uniform
from ascend_kit.engine.sequence import SamplingParams, Sequence

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 0.5])


def draws(count=4000, logits=LOGITS, **params):
    sequences = [
        Sequence(
            [0],
            SamplingParams(temperature=1.0, seed=seed, **params)
            if "temperature" not in params
            else SamplingParams(seed=seed, **params),
            arrival_s=0.0,
        )
        for seed in range(count)
    ]
    return sample(logits.repeat(count, 1), sequences, ())


def frequencies(tokens):
    return torch.bincount(tokens, minlength=len(LOGITS)) / len(tokens)


def test_uniform_numbers_are_uniform_and_differ_by_seed_and_position():
    by_seed = torch.tensor([uniform(s, 0) for s in range(5000)])
    by_position = torch.tensor([uniform(0, p) for p in range(5000)])

    for numbers in (by_seed, by_position):
        assert numbers.min() >= 0 and numbers.max() < 1
        # 5000 draws: the standard error of a tenth's share is 0.0042
        assert (torch.histc(numbers, 10, 0, 1) / 5000 - 0.1).abs().max() < 0.02
    assert uniform(1, 2) == uniform(1, 2) != uniform(2, 1)


def test_tokens_follow_the_softmax():
    assert (frequencies(draws()) - LOGITS.softmax(-1)).abs().max() < 0.03  # standard error at most 0.008


def test_temperature_divides_the_logits():
    assert (frequencies(draws(temperature=0.5)) - (LOGITS / 0.5).softmax(-1)).abs().max() < 0.03


def test_top_k_keeps_the_k_best():
    expected = torch.zeros(5)
    expected[[1, 2]] = LOGITS[[1, 2]].softmax(-1)

    assert (frequencies(draws(top_k=2)) - expected).abs().max() < 0.03


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probabilities = LOGITS.softmax(-1)
    assert probabilities[1] < 0.7 < probabilities[[1, 2]].sum()

    assert set(draws(top_p=0.7).tolist()) == {1, 2}
    assert set(draws(top_p=1e-6).tolist()) == {1}


def test_greedy_and_sampled_rows_share_a_step():
    sequences = [
        Sequence([0], SamplingParams(), arrival_s=0.0),
        Sequence([0], SamplingParams(temperature=1.0, seed=3), arrival_s=0.0),
    ]

    both = sample(LOGITS.repeat(2, 1), sequences, ())
    alone = sample(LOGITS.repeat(1, 1), sequences[1:], ())

    assert both[0] == 1 and both[1] == alone[0]


def test_equal_logits_give_the_same_token_with_and_without_a_neighbour_that_sorts_all():
    logits = (torch.randn(1, 4000, generator=torch.Generator().manual_seed(0)) * 2).round() / 2  # many are equal

    for seed in range(40):
        cut = Sequence([0], SamplingParams(temperature=1.0, top_k=20, seed=seed), arrival_s=0.0)
        whole = Sequence([0], SamplingParams(temperature=1.0, seed=seed), arrival_s=0.0)

        assert sample(logits, [cut], ())[0] == sample(logits.repeat(2, 1), [cut, whole], ())[0]


def test_the_end_is_forbidden_before_min_new_tokens():
    early = Sequence([0], SamplingParams(min_new_tokens=1), arrival_s=0.0)

    assert sample(LOGITS.repeat(1, 1), [early], (1,)).item() == 2


def test_logprobs_are_a_log_softmax():
    logits = torch.randn(3, 7)

    chosen, ids, values = token_logprobs(logits, torch.tensor([0, 3, 6]), 2)

    full = logits.log_softmax(-1)
    torch.testing.assert_close(chosen, full[[0, 1, 2], [0, 3, 6]])
    torch.testing.assert_close(values, full.topk(2).values)
    assert torch.equal(ids, full.topk(2).indices)
