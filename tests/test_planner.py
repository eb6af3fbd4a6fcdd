"""Predictions of a group of cards, and the ways to use several."""

from dataclasses import replace

import pytest

from ascend_kit.device.peaks import PEAKS
from ascend_kit.measure.forecast import Card, Deployment
from ascend_kit.measure.planner import MODELS, plan

QWEN3_8B, QWEN25_7B = MODELS["Qwen3-8B"], MODELS["Qwen2.5-7B"]
CARD = Card(PEAKS["910B2"])


def test_prediction_of_one_step_is_the_roofline_plus_its_launches():
    group = Deployment(QWEN3_8B, CARD)

    expected = (group.weights.per_step + 100 * 147456) / (0.6 * 1.6e12) + 2e-6 * (13 * 36 + 13)
    assert group.decode_s(1, 100) == pytest.approx(expected)
    assert Deployment(QWEN3_8B, CARD, graph_mode=False).decode_s(1, 100) > expected


def test_a_short_prompt_is_captured_and_padded_a_longer_one_launched_while_the_card_computes():
    card = replace(CARD, compute_share=1e6, bandwidth_share=1e6, launch_s=0.0)  # the host alone takes time
    group = Deployment(QWEN3_8B, card)

    assert group.prefill_s(100) == pytest.approx(36 * 115e-6 + 7 * 15e-6, rel=1e-3)  # rows, lm_head and the choice
    assert group.prefill_s(300) == pytest.approx((13 * 36 + 12) * 15e-6, rel=1e-3)
    assert replace(group, graph_prompt_tokens=0).prefill_s(100) == group.prefill_s(300)
    assert [group.padded_tokens(number) for number in (100, 129, 300)] == [128, 256, 300]


def test_prediction_is_never_below_the_floor_nor_above_the_ceiling():
    for quantize in ("none", "w8a8", "w8a16"):
        for tp in (1, 2, 4):
            group = Deployment(QWEN3_8B, CARD, quantize=quantize, tp_size=tp)
            assert group.decode_s(8, 500) > group.decode_floor_s(8, 500)
            assert group.prefill_s(500) > group.prefill_floor_s(500)
            assert group.output_tokens_per_s(500, 100, 8) < group.ceiling_tokens_per_s(500, 100, 8)


def test_requests_that_fit_fill_the_memory_left_beside_the_weights():
    group = Deployment(QWEN3_8B, CARD)

    most = group.max_concurrency(4096)
    room = 0.9 * CARD.peak.memory_bytes - group.weights.stored
    assert most * 4096 * 147456 <= room < (most + 1) * 4096 * 147456


def test_small_card_that_cannot_hold_the_weights_is_infeasible_with_the_reason():
    small = replace(CARD, peak=replace(CARD.peak, memory_bytes=16 * 2**30))

    plans = plan(Deployment(QWEN3_8B, small), 1000, 100, 8, card_counts=(1, 2))

    by_split = {(p.cards, p.tensor_parallel): p for p in plans}
    assert "no request of 1100 tokens fits" in by_split[1, 1].reason
    assert by_split[1, 1].output_tokens_per_s is None
    assert by_split[2, 2].reason is None and plans[0] == by_split[2, 2]


def test_tensor_parallel_beyond_the_kv_heads_is_refused_by_name():
    plans = plan(Deployment(QWEN25_7B, CARD), 1000, 100, 8, card_counts=(8,))

    reasons = {p.tensor_parallel: p.reason for p in plans}
    assert reasons[8].startswith("tensor_parallel=8 does not divide num_heads=28, num_kv_heads=4")
    assert reasons[4] is None


def test_one_request_is_served_fastest_by_splitting_and_many_as_fast_by_copies():
    single = plan(Deployment(QWEN3_8B, CARD), 512, 256, 1, card_counts=(4,))
    many = plan(Deployment(QWEN3_8B, CARD), 512, 256, 10_000, card_counts=(4,))

    assert single[0].tensor_parallel == 4
    (copies,) = (item for item in many if item.replicas == 4)
    assert many[-1].tensor_parallel == 4 and (copies.output_tokens_per_s or 0) > 0.99 * (
        many[0].output_tokens_per_s or 0
    )


def test_idle_replicas_add_nothing_for_a_single_request():
    plans = plan(Deployment(QWEN3_8B, CARD), 512, 256, 1)

    by_split = {(p.cards, p.tensor_parallel): p for p in plans}
    assert by_split[8, 1].output_tokens_per_s == by_split[1, 1].output_tokens_per_s
    assert by_split[8, 1].concurrency == 1


def test_uneven_load_counts_each_replica_with_what_it_serves():
    group = Deployment(QWEN3_8B, CARD)

    three_on_two = next(p for p in plan(Deployment(QWEN3_8B, CARD), 512, 256, 3, card_counts=(2,)) if p.replicas == 2)

    both = group.output_tokens_per_s(512, 256, 2) + group.output_tokens_per_s(512, 256, 1)
    assert three_on_two.output_tokens_per_s == pytest.approx(both)
    assert three_on_two.tpot_ms == pytest.approx(group.tpot_s(512, 256, 2) * 1e3)


def test_limit_that_the_load_does_not_meet_is_named_in_the_reason():
    worst = plan(Deployment(QWEN3_8B, CARD), 8000, 100, 64, limits_ms={"tpot": 3}, card_counts=(1,))[0]
    slow = plan(Deployment(QWEN3_8B, CARD), 8000, 100, 1, limits_ms={"ttft": 10}, card_counts=(1,))[0]

    assert "TPOT" in worst.reason and "limit of 3 ms" in worst.reason
    assert "TTFT" in slow.reason and "limit of 10 ms" in slow.reason


def test_int8_reads_fewer_bytes_and_multiplies_faster_but_launches_more():
    wide, int8 = Deployment(QWEN3_8B, CARD), Deployment(QWEN3_8B, CARD, quantize="w8a8")

    assert int8.decode_s(1, 500) < 0.7 * wide.decode_s(1, 500)
    assert int8.prefill_s(4000) < 0.7 * wide.prefill_s(4000)
    weight_only = Deployment(QWEN3_8B, CARD, quantize="w8a16")
    assert weight_only.prefill_s(4000) == pytest.approx(wide.prefill_s(4000))


def test_mix_not_chosen_yet_counts_as_the_cheapest_it_may_become():
    assert Deployment(QWEN3_8B, CARD, quantize="auto").decode_s(1, 9) == Deployment(
        QWEN3_8B, CARD, quantize="w8a8"
    ).decode_s(1, 9)


def test_measured_ceilings_make_a_card_without_guessed_shares():
    measured = {"device": "CPU", "bf16_flops_per_s": 1e12, "int8_ops_per_s": None, "read_bytes_per_s": 2e10,
                "launch_s": 1e-6}  # fmt: skip

    card = Card.from_ceilings(measured, memory_bytes=2**34)

    assert (card.compute_share, card.bandwidth_share) == (1, 1)
    assert card.limit("w8a8").flops_per_s == 1e12  # no int8 rate measured: the wide one
    with pytest.raises(ValueError, match="fp32 matrix rate"):
        Card.from_ceilings({**measured, "fp32_flops_per_s": None}, memory_bytes=1, precision="fp32")


def test_there_is_a_plan_for_every_split_of_every_card_count():
    plans = plan(Deployment(QWEN3_8B, CARD), 512, 128, 8)

    assert {(p.cards, p.tensor_parallel) for p in plans} == {
        (c, t) for c in (1, 2, 4, 8) for t in (1, 2, 4, 8) if t <= c
    }
    assert all(p.replicas * p.tensor_parallel == p.cards for p in plans)
