import numpy as np
import pytest

from ascend_kit.measure.workload import make_requests


def test_fixed_spread_gives_exactly_the_lengths_asked_for():
    requests = make_requests(7, 33, 5, vocab_size=300)

    assert [len(r.prompt_token_ids) for r in requests] == [33] * 7
    assert [r.num_output_tokens for r in requests] == [5] * 7
    assert [r.index for r in requests] == list(range(7))


def test_prompts_differ_from_the_first_token_on_so_that_no_prefix_is_shared():
    requests = make_requests(200, 16, 4, vocab_size=300, seed=3)

    assert len({r.prompt_token_ids[0] for r in requests}) == 200


def test_more_requests_than_token_ids_still_get_distinct_prompts():
    requests = make_requests(60, 3, 1, vocab_size=20)

    assert len({r.prompt_token_ids for r in requests}) == 60


def test_same_seed_gives_same_requests_and_another_seed_others():
    first, again, other = (make_requests(5, 12, 4, vocab_size=300, seed=s) for s in ((1, 2), (1, 2), (1, 3)))

    assert first == again
    assert first != other


def test_ids_stay_in_the_vocabulary_and_avoid_what_they_should():
    requests = make_requests(50, 64, 1, vocab_size=64, avoid_ids=(0, 63))

    ids = {t for r in requests for t in r.prompt_token_ids}
    assert ids <= set(range(1, 63))
    assert all(type(t) is int for t in ids)


def test_shared_prefix_is_shared_and_what_follows_is_not():
    requests = make_requests(20, 24, 1, vocab_size=300, shared_prefix_len=16)

    assert len({r.prompt_token_ids[:16] for r in requests}) == 1
    assert len({r.prompt_token_ids[16] for r in requests}) == 20


def test_heavy_tail_keeps_the_mean_has_long_requests_and_respects_the_limit():
    requests = make_requests(2000, 200, 50, vocab_size=5000, spread="heavy_tailed", max_total_len=4096)

    prompts = np.array([len(r.prompt_token_ids) for r in requests])
    assert prompts.mean() == pytest.approx(200, rel=0.1)  # standard error of the mean is about 2 %
    assert np.median(prompts) < 170 and prompts.max() > 800
    assert max(len(r.prompt_token_ids) + r.num_output_tokens for r in requests) <= 4096


def test_heavy_tail_is_cut_at_a_tight_limit_without_empty_prompts():
    requests = make_requests(500, 40, 20, vocab_size=500, spread="heavy_tailed", max_total_len=64)

    assert max(len(r.prompt_token_ids) + r.num_output_tokens for r in requests) <= 64
    assert min(len(r.prompt_token_ids) for r in requests) >= 1
    assert min(r.num_output_tokens for r in requests) >= 1


def test_more_prompts_than_the_vocabulary_has_are_refused():
    with pytest.raises(ValueError, match="cannot make 500 distinct prompts of 1 tokens from 50 ids"):
        make_requests(500, 1, 1, vocab_size=50)
