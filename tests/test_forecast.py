"""Costs against arithmetic written out in the test and the published sizes of real models; forecasts against both."""

from dataclasses import replace

import pytest

from ascend_kit.device.peaks import PEAKS, HardwarePeak
from ascend_kit.measure import forecast
from ascend_kit.measure.forecast import Card, Deployment, Limit
from ascend_kit.measure.metrics import RequestRecord
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.tensors import uniform_schemes, weight_bytes

QWEN3_8B = ModelConfig("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, qk_norm=True)
QWEN25_7B = ModelConfig("qwen2", 28, 3584, 28, 4, 128, 18944, 152064, attention_bias=True)
TINY = ModelConfig("qwen3", 2, 8, 2, 1, 4, 16, 32, tie_embeddings=True, qk_norm=True)
CARD = Card(PEAKS["910B2"])


def small_card(flops_per_s: float, bytes_per_s: float) -> Card:
    return Card(HardwarePeak("small", flops_per_s, flops_per_s, bytes_per_s, 2**34, "the test"))


@pytest.mark.parametrize(
    ("config", "quantize", "per_step_gb"),
    [(QWEN25_7B, "none", 14.1), (QWEN3_8B, "none", 15.1), (QWEN3_8B, "w8a8", 8.2), (QWEN25_7B, "w8a8", 7.6)],
)
def test_bytes_read_per_step_match_the_known_sizes_of_real_models(config, quantize, per_step_gb):
    assert Deployment(config, CARD, quantize=quantize).weights.per_step / 1e9 == pytest.approx(per_step_gb, abs=0.05)


@pytest.mark.parametrize(("config", "expected"), [(QWEN25_7B, 57344), (QWEN3_8B, 147456)])
def test_kv_bytes_per_token_match_the_known_sizes_of_real_models(config, expected):
    assert forecast.kv_bytes_per_token(config, "bf16") == expected
    assert forecast.kv_bytes_per_token(config, "fp32") == 2 * expected
    assert forecast.kv_bytes_per_token(config, "bf16", "int8") == expected // 2 + expected // (2 * config.head_dim) * 4


def test_one_layer_kept_in_float_is_counted_as_the_converter_counts_it():
    """`model.layers.1` names layer 1 alone, not 10 to 19 as well: 8.4 GB, where a search for the text gave 10.3."""
    keep = ("lm_head", "model.layers.1")

    reckoned = Deployment(QWEN3_8B, CARD, quantize="w8a8", keep=keep).weights

    assert reckoned == weight_bytes(QWEN3_8B, uniform_schemes(QWEN3_8B, "w8a8", keep), 2)
    assert reckoned.per_step / 1e9 == pytest.approx(8.4, abs=0.05)


def test_loaded_weights_lose_the_embedding_table_only_where_untied():
    table = 151936 * 4096 * 2

    assert Deployment(TINY, CARD, stored_bytes=1000).weights.per_step == 1000
    assert Deployment(QWEN3_8B, CARD, stored_bytes=16381470720).weights.per_step == 16381470720 - table


def test_prefill_flops_are_the_sum_over_tokens_and_cached_tokens_are_free():
    per_token = 2 * 2 * (8 * 8 + 2 * 4 * 8 + 8 * 8 + 3 * 16 * 8)
    scores = 4 * 2 * 2 * 4 * (1 + 2 + 3)  # three tokens see 1, 2 and 3

    assert forecast.prefill_flops(TINY, 3) == 3 * per_token + scores + 2 * 32 * 8
    assert forecast.prefill_flops(TINY, 3, cached_len=2) == per_token + 4 * 2 * 2 * 4 * 3 + 2 * 32 * 8


def test_work_of_a_request_counts_the_prompt_pass_and_every_decode_step():
    record = RequestRecord(0, 5, 3, 0.0, (1.0, 2.0, 3.0), "length")
    steps = forecast.decode_flops(TINY, 1, 6) + forecast.decode_flops(TINY, 1, 7)  # KV lengths of tokens 2 and 3

    assert forecast.request_flops(TINY, [record]) == pytest.approx(forecast.prefill_flops(TINY, 5) + steps)


def test_floor_is_the_slower_of_compute_and_memory():
    assert Limit(1e12, 1e9).floor_s(flops=5e11, num_bytes=1e9) == 1.0
    assert Limit(1e12, 1e9).floor_s(flops=5e12, num_bytes=1e9) == 5.0


def test_decode_floor_of_one_request_is_the_weights_over_the_bandwidth():
    floor = Deployment(QWEN3_8B, CARD).decode_floor_s(1, 0)

    assert floor * 1e3 == pytest.approx(9.5, abs=0.05)  # published arithmetic for this model


def test_throughput_ceiling_grows_with_concurrency_until_compute_binds():
    one, four, many, more = (Deployment(QWEN3_8B, CARD).ceiling_tokens_per_s(256, 128, n) for n in (1, 4, 4096, 8192))

    assert one == pytest.approx(1.6e12 / 15.14e9, rel=0.01)
    assert four == pytest.approx(4 * one, rel=0.02)
    assert many == more  # FLOPs do not care how many share the weights
    assert many * forecast.prefill_flops(QWEN3_8B, 256) / 128 < 353.9e12


def test_throughput_ceiling_is_above_what_any_step_by_step_schedule_reaches():
    group = Deployment(TINY, small_card(1e9, 1e7))

    decode = sum(group.decode_floor_s(4, 16 + i) for i in range(1, 8))

    assert 4 * 8 / (4 * group.prefill_floor_s(16) + decode) < group.ceiling_tokens_per_s(16, 8, 4)


def test_replicas_that_share_a_processor_have_their_part_of_its_ceilings_but_a_lone_prompt_has_all():
    alone = Deployment(TINY, small_card(1e9, 1e7))
    half = replace(alone, card_share=0.5)

    assert half.decode_floor_s(2, 10) == 2 * alone.decode_floor_s(2, 10)
    assert half.ceiling_tokens_per_s(16, 8, 2) == alone.ceiling_tokens_per_s(16, 8, 2) / 2
    assert half.prefill_floor_s(16) == alone.prefill_floor_s(16)


def test_a_graph_on_an_ascend_is_no_faster_than_the_host_gives_its_layers_their_lengths():
    tiny = replace(TINY, num_layers=40)

    assert Deployment(tiny, CARD).decode_s(1, 10) == pytest.approx(40 * 115e-6 + 8 * 15e-6)
    assert Deployment(tiny, CARD, graph_mode=False, launches_per_layer=1).decode_s(1, 10) < 40 * 115e-6
    assert Deployment(tiny, Card(PEAKS["H200"])).decode_s(1, 10) < 40 * 115e-6
    assert [name for name, peak in PEAKS.items() if not peak.is_ascend] == [
        "H200", "H100-SXM", "H100-PCIe", "A100-80GB", "A100-40GB"
    ]  # fmt: skip
    assert HardwarePeak("Ascend910B3 (measured)", 1, 1, 1, 1, "").is_ascend


def test_all_reduces_of_one_server_start_on_the_vector_cores():
    card = replace(CARD, launch_s=0.0, graph_update_s=0.0, peak=replace(CARD.peak, link_bytes_per_s=None))
    split, more = (Deployment(QWEN3_8B, card, tp_size=size)._communication_s(1) for size in (8, 16))

    assert split == pytest.approx(72 * 10e-6) and more == pytest.approx(72 * 20e-6)


def test_guesses_cost_rows_and_may_lift_the_ceiling_but_no_prediction():
    plain = Deployment(TINY, small_card(1e6, 1e12), async_scheduling=False)  # which guesses rule out
    guessing = replace(plain, speculate=3)

    assert guessing.decode_s(2, 10) == pytest.approx(plain.decode_s(8, 10))
    assert guessing.tpot_s(16, 5, 1) == pytest.approx(plain.decode_s(4, 18.5))
    # Every guess right: four tokens a step, of which the weights are read once.
    slow = replace(guessing, card=small_card(1e12, 1e3))
    assert slow.ceiling_tokens_per_s(1, 9, 1) > 2 * replace(slow, speculate=0).ceiling_tokens_per_s(1, 9, 1)


def test_what_the_engine_refuses_is_refused():
    assert "int8" in str(Deployment(QWEN3_8B, CARD, kv_cache_dtype="int8").check())
    assert Deployment(QWEN3_8B, small_card(1, 1), kv_cache_dtype="int8").check() is None
    assert "vocab_size" in str(Deployment(replace(QWEN3_8B, vocab_size=151_937), CARD, tp_size=2).check())
    assert "hidden_size" in str(Deployment(replace(QWEN3_8B, hidden_size=4097), CARD, tp_size=2).check())
