"""Which weights a folder holds, and whether a converted folder belongs to `input_model`."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from conftest import make_model
from megatron_writer import save_megatron
from safetensors.torch import load_file, save_file
from test_adapter import make_adapter
from transformers import AutoModelForCausalLM

from ascend_kit import convert
from ascend_kit.checkpoint.manifest import check_converted, model_identity
from ascend_kit.checkpoint.tensor_file import CheckpointError
from ascend_kit.files import known_hash
from ascend_kit.params import Experiment


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_KIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def experiment(tmp_path):
    source = make_model(tmp_path / "source", "qwen2")
    made = Experiment(input_model=str(source), output_root=str(tmp_path / "out"), model_name="tiny", device="cpu")
    convert(made)
    return made


def shuffle_head(folder):
    """Other weights of the same sizes under the same header, and the same time stamp."""
    path = folder / "model.safetensors"
    times = path.stat()
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_folder_made_from_the_source_passes_and_its_files_were_hashed_while_converting(experiment, tmp_path):
    check_converted(experiment)

    assert known_hash(tmp_path / "source" / "model.safetensors")
    assert known_hash(experiment.converted_folder / "model.safetensors")


def test_other_weights_under_the_same_header_are_refused_and_both_folders_named(experiment, tmp_path):
    shuffle_head(tmp_path / "source")

    with pytest.raises(CheckpointError) as refusal:
        check_converted(experiment)

    assert str(experiment.converted_folder) in str(refusal.value) and str(tmp_path / "source") in str(refusal.value)
    check_converted(experiment, content=False)  # headers and stat cannot tell


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_another_config_or_tokenizer_in_the_source_is_refused(experiment, tmp_path, name):
    path = tmp_path / "source" / name
    path.write_text(json.dumps({**json.loads(path.read_text()), "note": 1}))

    with pytest.raises(CheckpointError, match=name):
        check_converted(experiment)


def test_a_moved_source_of_equal_content_is_the_same_source(experiment, tmp_path):
    shutil.copytree(tmp_path / "source", tmp_path / "copy")
    shutil.rmtree(tmp_path / "source")

    check_converted(experiment.with_changes(input_model=str(tmp_path / "copy")))


def test_a_source_that_is_gone_is_refused_with_the_way_to_run_the_converted_folder_itself(experiment, tmp_path):
    shutil.rmtree(tmp_path / "source")

    with pytest.raises(CheckpointError, match="use_model: source") as refusal:
        check_converted(experiment)

    assert str(experiment.converted_folder) in str(refusal.value) and str(tmp_path / "source") in str(refusal.value)


def test_another_model_is_refused(experiment, tmp_path):
    other = make_model(tmp_path / "other", "qwen2", seed=1)

    with pytest.raises(CheckpointError, match="was made from"):
        check_converted(experiment.with_changes(input_model=str(other)))


def test_a_folder_made_with_another_adapter_is_refused_and_both_adapters_named(experiment, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    for name in ("lora", "other"):
        torch.manual_seed(len(name))
        make_adapter(tmp_path / name, base, {"model.layers.0.self_attn.q_proj": 4})
    adapted = experiment.with_changes(model_name="adapted", adapter_path=str(tmp_path / "lora"))
    convert(adapted)
    shutil.copytree(tmp_path / "lora", tmp_path / "moved")

    check_converted(adapted)
    check_converted(adapted.with_changes(adapter_path=str(tmp_path / "moved")))
    for given, complaint in ((str(tmp_path / "other"), "other"), (None, "not set")):
        with pytest.raises(
            CheckpointError, match=rf"made with adapter {tmp_path}/lora, and adapter_path is .*{complaint}"
        ):
            check_converted(adapted.with_changes(adapter_path=given), content=False)
    with pytest.raises(CheckpointError, match=f"made with adapter none, and adapter_path is {tmp_path}/lora"):
        check_converted(experiment.with_changes(adapter_path=str(tmp_path / "lora")))


def test_each_part_of_the_identity_changes_with_its_files_alone(tmp_path):
    folder = make_model(tmp_path / "model", "qwen2")
    before = model_identity(folder)

    shuffle_head(folder)
    weights = model_identity(folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": "{{ messages }}"}))
    template = model_identity(folder)
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "add_bos_token": True}))
    tokenizer = model_identity(folder)

    assert [p for p in ("weights", "tokenizer", "chat_template") if getattr(before, p) != getattr(weights, p)] == [
        "weights"
    ]
    assert weights.differences(template, "resume") and weights.tokenizer == template.tokenizer
    assert template.tokenizer != tokenizer.tokenizer and template.chat_template == tokenizer.chat_template
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rope_theta": 5e5}))
    assert model_identity(folder).weights != tokenizer.weights


def test_the_hashes_of_a_manifest_are_those_of_the_files(experiment):
    recorded = model_identity(experiment.converted_folder)
    (experiment.converted_folder / "ascend_manifest.json").unlink()

    assert model_identity(experiment.converted_folder) == recorded


def test_a_converted_shard_changed_afterwards_is_refused(experiment):
    path = experiment.converted_folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.zeros_like(tensors["model.norm.weight"])
    save_file(tensors, path, metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        model_identity(experiment.converted_folder)


def test_a_tokenizer_from_another_folder_and_a_megatron_source_are_recognised_again(tmp_path):
    source = make_model(tmp_path / "source", "qwen3")
    texts = make_model(tmp_path / "texts", "qwen3", seed=1)
    weights, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    mcore = save_megatron(tmp_path / "mcore", weights, config, tp=2)
    shared = {"output_root": str(tmp_path / "out"), "device": "cpu"}
    plain = Experiment(input_model=str(source), tokenizer_path=str(texts), model_name="plain", **shared)
    merged = Experiment(input_model=str(mcore), tokenizer_path=str(source), model_name="merged", **shared)

    for made in (plain, merged):
        convert(made)
        check_converted(made)
    (texts / "generation_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="generation_config"):
        check_converted(plain)
