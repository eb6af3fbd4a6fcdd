"""Costs against arithmetic written out in the test and against the published sizes of real models."""

import pytest

from ascend_kit.measure import costs
from ascend_kit.measure.costs import Limit
from ascend_kit.measure.metrics import RequestRecord
from ascend_kit.model.config import ModelConfig

QWEN3_8B = ModelConfig("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, qk_norm=True)
QWEN25_7B = ModelConfig("qwen2", 28, 3584, 28, 4, 128, 18944, 152064, attention_bias=True)
TINY = ModelConfig("qwen3", 2, 8, 2, 1, 4, 16, 32, tie_embeddings=True, qk_norm=True)


@pytest.mark.parametrize(
    ("config", "quantize", "per_step_gb"),
    [(QWEN25_7B, "none", 14.1), (QWEN3_8B, "none", 15.1), (QWEN3_8B, "w8a8", 8.2), (QWEN25_7B, "w8a8", 7.6)],
)
def test_bytes_read_per_step_match_the_known_sizes_of_real_models(config, quantize, per_step_gb):
    assert costs.weight_bytes(config, "bf16", quantize).per_step / 1e9 == pytest.approx(per_step_gb, abs=0.05)


@pytest.mark.parametrize(("config", "expected"), [(QWEN25_7B, 57344), (QWEN3_8B, 147456)])
def test_kv_bytes_per_token_match_the_known_sizes_of_real_models(config, expected):
    assert costs.kv_bytes_per_token(config, "bf16") == expected
    assert costs.kv_bytes_per_token(config, "fp32") == 2 * expected


def test_weight_bytes_equal_the_tensors_of_a_real_checkpoint(tiny_qwen3_dir, tiny_qwen2_dir):
    from safetensors import safe_open

    for folder in (tiny_qwen3_dir, tiny_qwen2_dir):
        config = ModelConfig.from_folder(folder)
        with safe_open(folder / "model.safetensors", "pt") as file:
            stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118

        assert costs.weight_bytes(config, "fp32").stored == stored


def test_tied_embedding_is_stored_once_and_still_read_by_the_head():
    untied = ModelConfig(**{**vars(TINY), "tie_embeddings": False})
    table = 32 * 8 * 2

    assert costs.weight_bytes(TINY).per_step == costs.weight_bytes(untied).per_step
    assert costs.weight_bytes(untied).stored - costs.weight_bytes(TINY).stored == table
    assert costs.weight_bytes(TINY).stored == costs.weight_bytes(TINY).per_step


def test_int8_costs_a_byte_per_weight_and_a_float_scale_per_output_channel():
    # one layer: q 8x8, k and v 4x8, o 8x8, gate and up 16x8, down 8x16
    weights = 8 * 8 + 2 * 4 * 8 + 8 * 8 + 2 * 16 * 8 + 8 * 16
    channels = 8 + 4 + 4 + 8 + 16 + 16 + 8
    rest = (32 * 8 + costs.small_parameters(TINY)) * 2

    assert costs.weight_bytes(TINY, quantize="w8a8").per_step == 2 * (weights + 4 * channels) + rest


def test_linears_named_in_keep_stay_wide():
    all_int8 = costs.weight_bytes(TINY, quantize="w8a16", keep=("lm_head",)).per_step
    kept = costs.weight_bytes(TINY, quantize="w8a16", keep=("lm_head", "down_proj")).per_step

    assert costs.weight_bytes(TINY, quantize="w8a16", keep=("lm_head", r"re:.*\.down_proj")).per_step == kept
    assert kept - all_int8 == 2 * (8 * 16 * 2 - (8 * 16 + 8 * 4))


def test_reported_bytes_lose_the_table_only_where_untied():
    assert costs.step_weight_bytes(TINY, 1000, "bf16") == 1000
    assert costs.step_weight_bytes(QWEN3_8B, 16381470720, "bf16") == costs.weight_bytes(QWEN3_8B).per_step


def test_prefill_flops_are_the_sum_over_tokens_and_cached_tokens_are_free():
    per_token = 2 * 2 * (8 * 8 + 2 * 4 * 8 + 8 * 8 + 3 * 16 * 8)
    scores = 4 * 2 * 2 * 4 * (1 + 2 + 3)  # three tokens see 1, 2 and 3

    assert costs.prefill_flops(TINY, 3) == 3 * per_token + scores + 2 * 32 * 8
    assert costs.prefill_flops(TINY, 3, cached_len=2) == per_token + 4 * 2 * 2 * 4 * 3 + 2 * 32 * 8


def test_request_work_counts_the_prompt_pass_and_every_decode_step():
    record = RequestRecord(0, 5, 3, 0.0, (1.0, 2.0, 3.0), "length")
    steps = costs.decode_flops(TINY, 1, 6) + costs.decode_flops(TINY, 1, 7)  # KV lengths of tokens 2 and 3

    assert costs.request_work(TINY, [record]) == pytest.approx(costs.prefill_flops(TINY, 5) + steps)


def test_floor_is_the_slower_of_compute_and_memory_and_unknown_without_a_ceiling():
    assert Limit(1e12, 1e9).floor_s(flops=5e11, num_bytes=1e9) == 1.0
    assert Limit(1e12, 1e9).floor_s(flops=5e12, num_bytes=1e9) == 5.0
    assert Limit(None, 1e9).floor_s(1, 1) is None


def test_decode_floor_of_one_request_is_the_weights_over_the_bandwidth():
    weights = costs.weight_bytes(QWEN3_8B).per_step

    floor = costs.decode_floor_s(QWEN3_8B, Limit(353.9e12, 1.6e12), weights, 147456, batch=1, context_len=0)

    assert floor * 1e3 == pytest.approx(9.5, abs=0.05)  # published arithmetic for this model


def test_throughput_ceiling_grows_with_concurrency_until_compute_binds():
    def ceiling(concurrency):
        return costs.throughput_ceiling(
            QWEN3_8B, Limit(353.9e12, 1.6e12), step_weights=15_136_811_008, kv_token_bytes=147456,
            concurrency=concurrency, prompt_len=256, output_len=128,
        )  # fmt: skip

    one, four, many, more = ceiling(1), ceiling(4), ceiling(4096), ceiling(8192)
    assert one == pytest.approx(1.6e12 / 15.14e9, rel=0.01)
    assert four == pytest.approx(4 * one, rel=0.02)
    assert many == more  # FLOPs do not care how many share the weights
    assert many * costs.prefill_flops(QWEN3_8B, 256) / 128 < 353.9e12


def test_throughput_ceiling_is_above_what_any_step_by_step_schedule_reaches():
    limit = Limit(1e9, 1e7)
    weights, kv = costs.weight_bytes(TINY).per_step, costs.kv_bytes_per_token(TINY)
    prefill = costs.prefill_floor_s(TINY, limit, weights, 16)
    decode = sum(costs.decode_floor_s(TINY, limit, weights, kv, 4, 16 + i) for i in range(1, 8))

    bound = costs.throughput_ceiling(
        TINY, limit, step_weights=weights, kv_token_bytes=kv, concurrency=4, prompt_len=16, output_len=8
    )

    assert 4 * 8 / (4 * prefill + decode) < bound


@pytest.mark.parametrize(("precision", "quantize", "word"), [("int4", "none", "bf16"), ("bf16", "auto", "w8a16")])
def test_unknown_precision_or_scheme_is_refused_with_what_is_allowed(precision, quantize, word):
    with pytest.raises(ValueError, match=word):
        costs.weight_bytes(TINY, precision, quantize)
