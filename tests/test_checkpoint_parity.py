"""Parity: figures worked out by hand, limits that turn red, and files against transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_model

from ascend_kit.checkpoint.convert import convert
from ascend_kit.checkpoint.huggingface import open_checkpoint
from ascend_kit.checkpoint.parity import (
    ParityError,
    ParityLimits,
    ParityModel,
    ParityReport,
    check_reading,
    compare,
    files_model,
    limits_for,
)
from ascend_kit.model.config import ModelConfig

PROMPTS = [list(range(40, 60)), [7, 3, 200, 11], list(range(100, 130))]
OFF = ParityLimits(None, None, None, None, None, None)


def table_model(name: str, probabilities: list[list[float]], texts: dict[bool, list[list[int]]] | None = None):
    """A model that answers every position with the same rows, and with fixed texts (greedy or sampled)."""

    def logits(prompts: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        for prompt in prompts:
            yield torch.tensor(probabilities)[: len(prompt)].log()

    def generate(prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int | None) -> list[list[int]]:
        return texts[seed is None] * (len(prompts) // len(texts[seed is None]))

    return ParityModel(name, logits, generate if texts else None)


def test_figures_of_a_hand_made_case():
    source = table_model("source", [[0.5, 0.25, 0.25], [0.6, 0.2, 0.2], [0.1, 0.1, 0.8]])
    result = table_model("result", [[0.25, 0.5, 0.25], [0.6, 0.2, 0.2], [0.1, 0.1, 0.8]])

    report = compare(source, result, [[0, 1, 0]], limits=OFF)

    # Two predicted positions: token 1 after the first, token 0 after the second.
    kl = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert report.summary["kl"] == pytest.approx(kl / 2, rel=1e-5)
    assert report.summary["worst_kl"] == pytest.approx(kl, rel=1e-5)
    assert report.summary["top1_agreement"] == 0.5
    assert report.summary["source_perplexity"] == pytest.approx((0.25 * 0.6) ** -0.5, rel=1e-5)
    assert report.summary["result_perplexity"] == pytest.approx((0.5 * 0.6) ** -0.5, rel=1e-5)
    assert report.summary["perplexity_increase"] == pytest.approx(2**-0.5 - 1, rel=1e-5)
    spread = torch.tensor([[0.5, 0.25, 0.25], [0.6, 0.2, 0.2]]).log().std().item()
    assert report.summary["logit_error"] == pytest.approx(math.log(2) / spread, rel=1e-5)


def test_texts_count_equal_tokens_and_a_model_that_stops_early_turns_red():
    rows = [[0.6, 0.4], [0.6, 0.4]]
    source = table_model("s", rows, {True: [[1, 2, 3, 4], [5, 6]], False: [[1] * 10] * 8})
    result = table_model("r", rows, {True: [[1, 2, 9, 4], [5, 6]], False: [[1] * 10] * 4 + [[1] * 6] * 4})

    report = compare(source, result, [[0, 1], [1, 0]], limits=ParityLimits())

    assert report.summary["greedy_equal_tokens"] == 4 and report.summary["greedy_tokens"] == 6
    assert report.summary["length_ratio"] == 0.8
    assert [row["greedy_equal_tokens"] for row in report.rows] == [2, 2]
    assert report.failures == ["length_ratio is 0.8, allowed is at least 0.9"]
    with pytest.raises(ParityError, match=r"length_ratio is 0\.8"):
        report.check()


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("max_kl", 1e-3),
        ("min_top1_agreement", 0.99),
        ("max_logit_error", 0.01),
        ("max_perplexity_increase", -0.6),
        ("min_greedy_share", 0.9),
        ("min_length_ratio", 1.5),
    ],
)
def test_each_limit_alone_turns_the_report_red(limit: str, value: float):
    source = table_model("s", [[0.5, 0.25, 0.25]] * 2, {True: [[1, 2]], False: [[1, 2]]})
    result = table_model("r", [[0.25, 0.5, 0.25]] * 2, {True: [[1, 3]], False: [[1, 2]]})

    report = compare(source, result, [[0, 1]] * 4, limits=ParityLimits(**{**vars(OFF), limit: value}))

    assert len(report.failures) == 1 and report.failures[0].startswith(limit.partition("_")[2])
    assert [row["figure"] for row in report.table() if not row["ok"]] == [limit.partition("_")[2]]


def test_few_short_texts_may_part_by_chance_and_many_may_not():
    texts = {True: [list(range(32))], False: [[1] * 10]}
    early = {True: [[*range(2), *[99] * 30]], False: [[1] * 10]}
    source, result = (table_model(name, [[0.6, 0.4]] * 2, written) for name, written in (("s", texts), ("r", early)))
    limits = ParityLimits(**{**vars(OFF), "min_greedy_share": 0.2})

    def measured(count: int) -> ParityReport:
        both = [
            replace(
                model, generate=lambda prompts, *_, model=model: [model.generate(prompts, 0, None)[0]] * len(prompts)
            )
            for model in (source, result)
        ]
        return compare(*both, [[0, 1]] * count, limits=limits)

    # A text of 32 tokens that keeps a fifth of them differs at p = 0.134 a token. P(a difference within 3) = 0.35, and
    # with n texts P(Binomial(3 n, p) >= n): 0.066 for four, 0.025 for six.
    assert measured(1).failures == measured(4).failures == []
    assert {
        "figure": "greedy_share",
        "value": 0.0625,
        "limit": ">= 0.2, too few texts to tell",
        "ok": True,
    } in measured(4).table()
    assert measured(6).failures == ["greedy_share is 0.0625, allowed is at least 0.2"]


def test_prompt_without_a_next_token_and_other_vocabulary_are_refused():
    source, other = table_model("s", [[0.5, 0.5]] * 2), table_model("o", [[0.2, 0.3, 0.5]] * 2)

    with pytest.raises(ValueError, match="at least two tokens"):
        compare(source, source, [[1]])
    with pytest.raises(ValueError, match="share a vocabulary"):
        compare(source, other, [[0, 1]])


@pytest.mark.parametrize("scheme", ["none", "w8a16", "w8a8"])
def test_files_answer_like_transformers_on_the_same_files(tiny_model_dir: Path, tmp_path: Path, scheme: str):
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM

    folder = convert(tiny_model_dir, tmp_path / "m", precision="fp32", quantize=scheme).folder
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = [model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]

    found = list(files_model(open_checkpoint(folder)).logits(PROMPTS))

    # w8a8: compressed-tensors scales a token by max / 127.5, we by max / 127: rounding noise of int8.
    tolerance = 0.05 if scheme == "w8a8" else 1e-4
    for left, right in zip(found, expected, strict=True):
        assert torch.allclose(left, right, atol=tolerance * right.std().item() * 3)


def test_converted_files_pass_the_limits_of_their_precision(tiny_qwen3_dir: Path, tmp_path: Path):
    source = files_model(open_checkpoint(tiny_qwen3_dir), "source")
    for number, (precision, scheme) in enumerate([("bf16", "none"), ("fp32", "none"), ("bf16", "w8a16")]):
        folder = convert(tiny_qwen3_dir, tmp_path / str(number), precision=precision, quantize=scheme).folder

        report = compare(
            source,
            files_model(open_checkpoint(folder), "result"),
            PROMPTS,
            limits=limits_for(precision, scheme, min_top1_agreement=0.85),
        )

        # A random model's distributions are flat, so its best token changes easily; the other limits stand.
        assert report.check().passed


def test_damaged_result_turns_red(tiny_qwen3_dir: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = convert(tiny_qwen3_dir, tmp_path / "m").folder
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    weights[name] = weights[name].roll(1, 0)  # the rows of one projection in the wrong order
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

    report = compare(
        files_model(open_checkpoint(tiny_qwen3_dir)),
        files_model(open_checkpoint(folder)),
        PROMPTS,
        limits=limits_for("bf16", "none"),
    )

    assert not report.passed


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_the_referee_agrees_with_our_reading(family, tmp_path):
    folder = make_model(tmp_path / "m", family, tie_word_embeddings=family == "qwen3")

    report = check_reading(open_checkpoint(folder), [[1, 2, 3, 4, 5, 6], [200, 7, 9]])

    assert report.summary["kl"] < 1e-9 and report.summary["tokens"] == 7


def test_the_referee_finds_a_key_that_we_read_in_another_way(tmp_path, monkeypatch):
    folder = make_model(tmp_path / "m", "qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    read = ModelConfig.from_dict
    monkeypatch.setattr(ModelConfig, "from_dict", lambda raw, **names: replace(read(raw, **names), rope_theta=1e4))

    with pytest.raises(ParityError, match="transformers on the same files"):
        check_reading(open_checkpoint(folder), [list(range(60))])


def test_logits_that_are_not_finite_are_refused(tiny_qwen2_dir):
    broken = ParityModel("b", lambda prompts: (torch.full((len(p), 320), float("nan")) for p in prompts))

    with pytest.raises(ValueError, match="NaN"):
        compare(broken, broken, [[1, 2, 3]])
