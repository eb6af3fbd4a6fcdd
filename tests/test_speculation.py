"""Guessed tokens change how many steps an answer takes, and nothing else."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from scipy.stats import chisquare

from ascend_kit import AscendInferEngine, SamplingParams
from ascend_kit.engine.speculation import LONGEST_PAUSE, PromptLookup

REPEATING = [[5, 6, 7, 8] * 10, list(range(30)) * 3, [116] * 12]


def make_engine(folder, device, speculate, **changes):
    settings = dict(precision="fp32", device=device, max_seq_length=512, batch_size=8, block_size=16, kv_cache_gib=0.05)
    return AscendInferEngine(folder, **{**settings, "speculate": speculate, **changes})


def prompts():
    draw = random.Random(1)
    return [[draw.randrange(256) for _ in range(length)] for length in (3, 20, 50)] + REPEATING


@pytest.mark.parametrize("graph_mode", [True, pytest.param(False, marks=pytest.mark.long)])
def test_greedy_and_sampled_answers_are_those_of_plain_decoding(graph_mode, tiny_qwen3_dir, device):
    sampling = [
        SamplingParams(max_new_tokens=40),
        SamplingParams(max_new_tokens=40, temperature=0.5, top_k=3, seed=4),
        SamplingParams(max_new_tokens=40, repetition_penalty=1.05, presence_penalty=0.1, logprobs=2),
    ]
    every, answers, counts = [(p, s) for p in prompts() for s in sampling], {}, {}

    for speculate in (0, 4):
        # Prompts in chunks and too few slots: guesses meet every kind of step.
        options = dict(graph_mode=graph_mode, max_tokens_per_step=40)
        with make_engine(tiny_qwen3_dir, device, speculate, **options) as engine:
            outputs = engine.generate(*map(list, zip(*every, strict=True)))
            counts[speculate] = engine.stats()
        answers[speculate] = [(o.token_ids, o.text, o.finish_reason) for o in outputs]
        assert all(o.logprobs is None or len(o.logprobs) == len(o.token_ids) for o in outputs)
        logprobs = [entry.logprob for o in outputs for entry in o.logprobs or ()]
        answers[f"logprobs {speculate}"] = logprobs

    assert answers[4] == answers[0]
    assert answers["logprobs 4"] == pytest.approx(answers["logprobs 0"], abs=1e-4)
    assert counts[0]["decodes"] == counts[0]["decoded_tokens"] == counts[4]["decoded_tokens"]
    assert counts[4]["decodes"] < counts[0]["decodes"] and counts[4]["steps"] < counts[0]["steps"]


def test_sampled_tokens_have_the_distribution_of_the_model(tiny_qwen3_dir):
    """Four tokens after a prompt with guesses right and wrong, against transformers' probabilities of every outcome."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir, dtype=torch.float32).eval()
    with make_engine(tiny_qwen3_dir, "cpu", 0) as engine:  # where the model has begun to repeat itself
        (start,) = engine.generate([[9] * 5], SamplingParams(max_new_tokens=60, ignore_eos=True))
    count, prompt, temperature = 1200, [9] * 5 + start.token_ids, 4.0
    sampling = [
        SamplingParams(max_new_tokens=4, temperature=temperature, top_k=2, seed=n, ignore_eos=True)
        for n in range(count)
    ]

    with make_engine(tiny_qwen3_dir, "cpu", 4) as engine:
        outputs = engine.generate([prompt] * count, sampling)
        stats = engine.stats()

    seen = dict.fromkeys(itertools.product(*[range(2)] * 4), 0)
    expected = dict.fromkeys(seen, float(count))
    ids = {}  # outcome so far -> its tokens
    with torch.inference_mode():
        for place in range(4):
            for start in itertools.product(*[range(2)] * place):
                logits = model(torch.tensor([[*prompt, *ids.get(start, [])]])).logits[0, -1]
                best = logits.topk(2)
                for number, share in enumerate((best.values / temperature).softmax(-1).tolist()):
                    ids[(*start, number)] = [*ids.get(start, []), int(best.indices[number])]
                    for outcome in expected:
                        if outcome[: place + 1] == (*start, number):
                            expected[outcome] *= share
    outcome_of = {tuple(ids[outcome]): outcome for outcome in seen}
    for output in outputs:
        seen[outcome_of[tuple(output.token_ids)]] += 1

    assert stats["decodes"] < stats["decoded_tokens"] < 4 * stats["decodes"], "some guesses must be right, some wrong"
    assert chisquare(list(seen.values()), list(expected.values())).pvalue > 0.001


def test_the_text_after_the_latest_like_run_is_proposed_and_runs_on_where_it_ends():
    lookup = PromptLookup(4)

    assert lookup.propose([1, 2, 3, 9, 1, 2, 4, 8, 7, 6, 1, 2], 4) == [4, 8, 7, 6]
    assert lookup.propose([1, 2, 3, 9, 1, 2, 4, 8, 7, 6, 1, 2], 2) == [4, 8]
    assert PromptLookup(4).propose([5, 6, 7, 5, 6, 7], 4) == [5, 6, 7, 5]
    assert PromptLookup(4).propose([1, 2, 3, 4, 5], 4) == []


def test_wrong_guesses_become_rare_and_a_right_one_brings_them_back():
    lookup, text, guessed = PromptLookup(4), [1, 2, 3, 1, 2], 0
    for _ in range(1000):
        if lookup.propose(text, 4):
            guessed += 1
            lookup.learn(1, 0)

    assert guessed <= 6 + 1000 // LONGEST_PAUSE
    lookup.learn(1, 1)
    assert len(lookup.propose(text, 4)) == 3
