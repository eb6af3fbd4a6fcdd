"""The engine on an NPU in bf16 and int8: every head size, quantised checkpoints, a conversion's parity."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model

from ascend_kit import AscendInferEngine, SamplingParams, convert
from ascend_kit.checkpoint.huggingface import open_checkpoint
from ascend_kit.checkpoint.parity import compare, files_model, limits_for
from ascend_kit.engine import runner

pytestmark = pytest.mark.npu

PROMPTS = [[7] * 5, list(range(140)), [1, 2, 3]]
PAIRS = [([5, 6, 7], [8, 9]), ([10] * 130, [11]), ([12], [13, 14, 15])]
# bf16 keeps 8 bits of mantissa: two layers and logits of size ten leave a few tenths on a log-probability.
BF16_LOGPROB = 0.35


def engine_on(device, folder, **changes):
    settings = dict(max_seq_length=512, batch_size=4, kv_cache_gib=0.05, precision="bf16")
    return AscendInferEngine(folder, device=device, **{**settings, **changes})


def answers(engine):
    """Tokens and their log-probabilities, and scores of pairs."""
    sampling = SamplingParams(max_new_tokens=5, logprobs=1, ignore_eos=True)
    outputs = engine.generate(PROMPTS, sampling)
    return (
        [output.token_ids for output in outputs],
        [[entry.logprob for entry in output.logprobs] for output in outputs],
        [score.logprob for score in engine.score(PAIRS)],
    )


def assert_near(got, expected):
    """Log-probabilities agree while the tokens do; bf16 may choose another of nearly equal probability."""
    for tokens, wanted, logprobs, wanted_logprobs in zip(got[0], expected[0], got[1], expected[1], strict=True):
        pairs = list(zip(tokens, wanted, strict=True))
        same = next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
        assert logprobs[:same] == pytest.approx(wanted_logprobs[:same], abs=BF16_LOGPROB)
        if same < len(pairs):
            assert logprobs[same] == pytest.approx(wanted_logprobs[same], abs=BF16_LOGPROB)
    assert got[2] == pytest.approx(expected[2], abs=BF16_LOGPROB * 2)  # sums of up to three tokens


@pytest.fixture(scope="module")
def wide_model_dir(tmp_path_factory):
    """Head size 128, as the real models have."""
    folder = tmp_path_factory.mktemp("wide") / "qwen2"
    return make_model(folder, "qwen2", hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=128)


@pytest.mark.parametrize("graph_mode", [False, True])
@pytest.mark.parametrize("size,heads", [(128, 4), (64, 14), (16, 4)])
def test_bf16_answers_stay_near_float32_on_the_cpu(size, heads, graph_mode, tmp_path, device):
    folder = make_model(
        tmp_path / "m", "qwen3", hidden_size=128, num_attention_heads=heads, num_key_value_heads=2, head_dim=size
    )

    with engine_on("cpu", folder, precision="fp32", operator_fusion=False) as engine:
        expected = answers(engine)
    with engine_on(device, folder, graph_mode=graph_mode) as engine:
        got = answers(engine)

    assert_near(got, expected)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_int8_checkpoints_answer_as_on_the_cpu(scheme, wide_model_dir, tmp_path, device):
    folder = convert(wide_model_dir, tmp_path / scheme, quantize=scheme).folder

    with engine_on("cpu", folder, precision="fp32", operator_fusion=False) as engine:
        expected = answers(engine)
    with engine_on(device, folder, graph_mode=True) as engine:
        got = answers(engine)

    assert_near(got, expected)


@pytest.mark.parametrize("graph_mode", [False, True])
def test_int8_in_float32_gives_the_tokens_of_the_cpu(graph_mode, tiny_qwen3_dir, tmp_path, device):
    """The kernels take 16 bits only: float32 goes through plain torch, which a captured step must hold, too."""
    folder = convert(tiny_qwen3_dir, tmp_path / "w8a8", quantize="w8a8").folder
    tokens = []
    for where, options in ((device, dict(graph_mode=graph_mode)), ("cpu", dict(operator_fusion=False))):
        with engine_on(where, folder, precision="fp32", **options) as engine:
            tokens.append([out.token_ids for out in engine.generate(PROMPTS, SamplingParams(max_new_tokens=8))])

    assert tokens[0] == tokens[1]


CHUNKED = dict(max_tokens_per_step=150, graph_mode=True)  # the prompt of 140 tokens comes in two steps beside decodes


def test_steps_with_prompts_in_graphs_give_the_tokens_of_plain_float32(tiny_qwen3_dir, device):
    """A float32 step reads its lengths from tensors alone, and prompts beside decodes, shared prefixes and scores."""
    pairs, prompts = [([5, 6, 7], [8, 9]), ([10] * 130, [11])], [*PROMPTS, *PROMPTS[1:], [9] * 70]
    sampling = [SamplingParams(max_new_tokens=length, ignore_eos=True) for length in (9, 3, 6, 8, 4, 5)]
    found = []
    for where, options in (("cpu", dict(graph_mode=False, operator_fusion=False)), (device, CHUNKED)):
        with engine_on(where, tiny_qwen3_dir, precision="fp32", batch_size=3, **options) as engine:
            tokens = [out.token_ids for out in engine.generate(prompts, sampling)]
            found.append((tokens, [score.logprob for score in engine.score(pairs)]))
            graphs = engine.stats()["graphs"]

    assert found[1][0] == found[0][0] and found[1][1] == pytest.approx(found[0][1], abs=1e-4)
    assert graphs["prompt_sizes"] == [128, 150] and graphs["prompt_replays"] >= 4  # three beside decodes, the scores
    assert 0 < graphs["padded_tokens"] < graphs["prompt_tokens"]


@pytest.mark.parametrize("scheme", ["none", "w8a8"])
def test_steps_with_prompts_in_graphs_give_the_tokens_of_eager_ones(scheme, wide_model_dir, tmp_path, device):
    """Through the kernels, whose lengths are updated at every replay."""
    folder = wide_model_dir if scheme == "none" else convert(wide_model_dir, tmp_path / "m", quantize=scheme).folder
    found = []
    for prompt_tokens in (0, 256):
        with engine_on(device, folder, graph_prompt_tokens=prompt_tokens, **CHUNKED) as engine:
            found.append((answers(engine), engine.stats()["graphs"]["prompt_replays"]))

    assert found[0][1] == 0 < found[1][1]
    assert_near(found[1][0], found[0][0])


def test_heads_that_are_attended_one_sequence_at_a_time_keep_eager_prompts(tiny_qwen3_dir, device):
    with engine_on(device, tiny_qwen3_dir, graph_mode=True) as engine:  # heads of 16
        engine.generate(PROMPTS[:1], SamplingParams(max_new_tokens=2))
        graphs = engine.stats()["graphs"]

    assert graphs["prompt_sizes"] == [] and graphs["replays"] > 0


def test_plain_attention_is_captured_with_prompts_only_as_far_as_it_may_gather_contexts(
    tiny_qwen3_dir, device, monkeypatch
):
    monkeypatch.setattr(runner, "MAX_GATHERED_BYTES", 2 << 20)
    # Keys and values of 512 tokens, 2 heads of 16 in float32, are 128 KiB for each token of the step.
    with engine_on(device, tiny_qwen3_dir, graph_mode=True, precision="fp32", batch_size=1) as engine:
        assert engine.stats()["graphs"]["prompt_sizes"] == [16]


def test_a_head_size_the_kernels_lack_is_refused_at_load_with_a_way_out(tmp_path, device):
    folder = make_model(tmp_path / "m", "qwen3", head_dim=24)

    with pytest.raises(ValueError, match=r"head size 24.*operator_fusion: false"):
        engine_on(device, folder).load_model()
    with engine_on(device, folder, operator_fusion=False) as engine:
        assert engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=2, ignore_eos=True))[0].token_ids


def test_sampling_on_the_device_gives_the_tokens_of_the_cpu(tiny_qwen3_dir, device):
    sampling = SamplingParams(max_new_tokens=8, temperature=0.9, top_k=40, top_p=0.95, seed=3, ignore_eos=True)
    results = []

    for where in ("cpu", device):
        with engine_on(where, tiny_qwen3_dir, precision="fp32") as engine:
            results.append([output.token_ids for output in engine.generate(PROMPTS, sampling)])

    assert results[0] == results[1]


def test_parity_of_a_conversion_holds_when_computed_on_the_device(tiny_qwen2_dir, tmp_path, device):
    folder = convert(tiny_qwen2_dir, tmp_path / "m", precision="bf16").folder
    source = files_model(open_checkpoint(tiny_qwen2_dir), "source", device=torch.device(device))
    result = files_model(open_checkpoint(folder), "result", device=torch.device(device))

    report = compare(source, result, PROMPTS, limits=limits_for("bf16", "none", min_top1_agreement=0.85))

    assert report.check().passed
