"""A converted folder against its source, and an engine against plain operators, with real engines on both sides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from ascend_kit.checkpoint.convert import convert
from ascend_kit.checkpoint.huggingface import open_checkpoint
from ascend_kit.checkpoint.parity import ParityError
from ascend_kit.engine.engine import AscendInferEngine
from ascend_kit.measure.agreement import ParityCheck, Reference, WrongAnswerError, check_against, reference_answers
from ascend_kit.params import Experiment, build_experiment


@pytest.fixture
def experiment(tiny_qwen3_dir: Path, tmp_path: Path) -> Experiment:
    prompts = tmp_path / "prompts.jsonl"
    texts = ["The first prompt of three.", "Another one, a little longer than that.", "Short."]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return build_experiment(
        {
            "input_model": str(tiny_qwen3_dir),
            "output_model": str(tmp_path / "result"),
            "prompts_file": str(prompts),
            "precision": "fp32",
            "device": "cpu",
            "max_seq_length": 256,
            "max_new_tokens": 16,
        }
    )


def test_equal_weights_pass_and_the_folder_is_published(experiment: Experiment):
    check = ParityCheck(experiment, max_new_tokens=8)

    result = convert(experiment, before_publish=check)

    assert result.folder == experiment.converted_folder and check.report.passed
    assert check.report.summary["greedy_share"] == 1 and check.report.summary["length_ratio"] == 1
    assert check.report.summary["kl"] == 0
    assert len(check.describe()["rows"]) == 3


def test_a_missed_limit_given_as_a_parameter_keeps_the_destination_absent_and_the_figures_at_hand(
    experiment: Experiment,
):
    strict = experiment.with_changes(quantize="w8a8", parity_max_kl=1e-12)
    check = ParityCheck(strict, max_new_tokens=8)

    with pytest.raises(ParityError, match=r"kl is .* allowed is at most 1e-12"):
        convert(strict, before_publish=check)

    assert not strict.converted_folder.exists()
    assert any(row["figure"] == "kl" and not row["ok"] for row in check.describe()["figures"])


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_engine_and_transformers_write_the_same_greedy_text_from_an_int8_result(
    tiny_model_dir: Path, tmp_path: Path, scheme: str
):
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM

    from ascend_kit.engine.engine import AscendInferEngine
    from ascend_kit.engine.sequence import SamplingParams

    folder = convert(tiny_model_dir, tmp_path / "m", precision="fp32", quantize=scheme).folder
    prompt = list(range(60, 90))
    with AscendInferEngine(folder, precision="fp32", device="cpu", max_seq_length=128, batch_size=1) as engine:
        ours = engine.generate([prompt], SamplingParams(max_new_tokens=16, ignore_eos=True))[0].token_ids
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None)
        logits = model(torch.tensor([prompt + ours])).logits[0, len(prompt) - 1 : -1]

    # compressed-tensors spreads a token over 255 steps, kernels and our engine over 254. Where the two
    # differ, the choice must have been as close as that rounding.
    assert open_checkpoint(folder).quantization.summary == scheme
    margins = logits.max(-1).values - logits.gather(1, torch.tensor(ours)[:, None])[:, 0]
    assert margins.max() <= (0.0 if scheme == "w8a16" else 0.05) * logits.std()
    if scheme == "w8a16":
        assert theirs[0, len(prompt) :].tolist() == ours


@pytest.fixture
def checked(tiny_qwen3_dir: Path) -> Experiment:
    """The tiny model in float32, as an engine runs it."""
    return build_experiment(
        {
            "input_model": str(tiny_qwen3_dir),
            "use_model": "source",
            "precision": "fp32",
            "device": "cpu",
            "max_seq_length": 64,
            "max_new_tokens": 8,
            "sweep_prompt_len": [8],
            "sweep_output_len": [4],
            "graph_mode": False,
        }
    )


def test_engine_writes_what_plain_operators_write(checked):
    with AscendInferEngine.from_experiment(checked) as engine:
        table = check_against(reference_answers(checked), engine)

    assert set(table["note"]) == {"equal"}
    assert (table["equal_tokens"] == 8).all()


def test_wrong_token_stops_unless_the_plain_operators_were_unsure(checked):
    found = reference_answers(checked)
    engine = AscendInferEngine.from_experiment(checked)  # not loaded: the check does that
    wrong = tuple((ids[0] + 1, *ids[1:]) for ids in found.token_ids)
    unsure = tuple((found.tolerance / 2,) * len(ids) for ids in wrong)
    sure = tuple((found.tolerance * 2,) * len(ids) for ids in wrong)

    close = check_against(Reference(wrong, unsure, found.tolerance), engine)
    with pytest.raises(WrongAnswerError, match=r"token 0 .* operator_fusion: false"):
        check_against(Reference(wrong, sure, found.tolerance), engine)

    assert close["note"].str.startswith("close call at token 0").all()


def test_int8_activations_allow_closer_calls_than_weights_alone(checked, tiny_qwen3_dir, tmp_path):
    allowed = {}
    for scheme in ("w8a8", "w8a16"):
        convert(tiny_qwen3_dir, tmp_path / scheme, quantize=scheme, precision="fp32")
        allowed[scheme] = reference_answers(checked.with_changes(input_model=str(tmp_path / scheme))).tolerance

    assert allowed == {"w8a8": 1.5, "w8a16": 0.001}


def test_model_without_numbers_is_refused_although_both_sides_write_the_same(checked, tiny_qwen3_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "nan"
    shutil.copytree(tiny_qwen3_dir, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(WrongAnswerError, match=r"not finite|refused"):
        reference_answers(checked.with_changes(input_model=str(folder)))
