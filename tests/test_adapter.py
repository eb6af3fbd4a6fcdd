"""LoRA adapters merged at conversion compute what the base model with the adapter beside it computes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from ascend_kit.checkpoint.convert import convert
from ascend_kit.checkpoint.tensor_file import CheckpointError

IDS = torch.tensor([[5, 17, 99, 250, 3, 44, 101, 7]])
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def make_adapter(folder: Path, model: torch.nn.Module, modules: dict[str, int], **config: object) -> dict:
    """An adapter folder as PEFT writes it, with random tensors; returns these."""
    folder.mkdir()
    tensors = {}
    for name, rank in modules.items():
        rows, columns = model.get_submodule(name).weight.shape
        if name.endswith("embed_tokens"):
            tensors[f"{name}.lora_embedding_A"] = torch.randn(rank, rows) * 0.1
            tensors[f"{name}.lora_embedding_B"] = torch.randn(columns, rank) * 0.1
        else:
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, columns) * 0.1
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank) * 0.1
        if config.get("use_dora"):
            tensors[f"{name}.lora_magnitude_vector"] = torch.rand(rows) + 0.5
    save_adapter(folder, tensors)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "lora_dropout": 0.1, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return tensors


def save_adapter(folder: Path, tensors: dict) -> None:
    save_file({f"base_model.model.{name}": t for name, t in tensors.items()}, folder / "adapter_model.safetensors")


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def add_beside(model: torch.nn.Module, tensors: dict, name: str, scaling: float) -> None:
    """The adapter's path beside a linear, unmerged: y + s * (x A^T) B^T."""
    down, up = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
    model.get_submodule(name).register_forward_hook(lambda _, x, y: y + scaling * (x[0] @ down.T) @ up.T)


@pytest.mark.parametrize(
    "config,scales",
    [
        ({}, {Q: 8 / 4, DOWN: 8 / 4}),
        ({"use_rslora": True}, {Q: 8 / math.sqrt(4), DOWN: 8 / math.sqrt(4)}),
        ({"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 12}}, {Q: 3.0, DOWN: 4.0}),
    ],
)
def test_merged_adapter_equals_the_adapter_beside_the_base_model(
    tiny_model_dir: Path, tmp_path: Path, config: dict, scales: dict
):
    torch.manual_seed(3)
    base = load(tiny_model_dir)
    ranks = {Q: 4, DOWN: 2 if "rank_pattern" in config else 4}
    tensors = make_adapter(tmp_path / "lora", base, ranks, **config)
    without = logits(base)
    for name, scaling in scales.items():
        add_beside(base, tensors, name, scaling)

    result = convert(tiny_model_dir, tmp_path / "out", precision="fp32", adapter_path=tmp_path / "lora")

    merged = logits(load(result.folder))
    assert (merged - without).abs().max() > 0.05
    torch.testing.assert_close(merged, logits(base), rtol=1e-4, atol=1e-5)
    assert len(result.manifest["settings"]["adapter_sha256"]) == 64


def test_dora_embedding_and_saved_modules_follow_pefts_definition(tiny_qwen3_dir: Path, tmp_path: Path):
    torch.manual_seed(4)
    base = load(tiny_qwen3_dir)
    tensors = make_adapter(tmp_path / "dora", base, {Q: 4}, use_dora=True)
    embedding = make_adapter(tmp_path / "embed", base, {"model.embed_tokens": 2}, r=2, modules_to_save=["norm"])
    embedding["model.norm.weight"] = torch.rand(base.model.norm.weight.shape)
    save_adapter(tmp_path / "embed", embedding)

    dora = load(convert(tiny_qwen3_dir, tmp_path / "a", precision="fp32", adapter_path=tmp_path / "dora").folder)
    other = load(convert(tiny_qwen3_dir, tmp_path / "b", precision="fp32", adapter_path=tmp_path / "embed").folder)

    direction = base.get_submodule(Q).weight + 2.0 * tensors[f"{Q}.lora_B.weight"] @ tensors[f"{Q}.lora_A.weight"]
    unit = direction / direction.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(
        dora.get_submodule(Q).weight, unit * tensors[f"{Q}.lora_magnitude_vector"][:, None], rtol=1e-5, atol=1e-6
    )
    down, up = embedding["model.embed_tokens.lora_embedding_A"], embedding["model.embed_tokens.lora_embedding_B"]
    token = torch.tensor([7])
    beside = base.model.embed_tokens(token) + 4.0 * (torch.nn.functional.embedding(token, down.T) @ up.T)
    torch.testing.assert_close(other.model.embed_tokens(token), beside)
    assert torch.equal(other.model.norm.weight, embedding["model.norm.weight"])


@pytest.mark.parametrize(
    "config,change,complaint",
    [
        ({"peft_type": "IA3"}, None, r"peft_type='IA3'"),
        ({"layer_replication": [[0, 1]]}, None, r"layer_replication=.*merge_and_unload"),
        ({"target_parameters": ["x"]}, None, r"target_parameters="),
        ({"trainable_token_indices": [1]}, None, r"trainable_token_indices="),
        ({"use_qalora": True}, None, r"use_qalora=True"),
        ({"use_dora": True}, "no magnitude", r"use_dora=True, but .*q_proj says otherwise"),
        ({"r": 8}, None, r"q_proj has rank 4, adapter_config\.json says 8"),
        ({"rank_pattern": {"(q": 4}}, None, r"adapter_config\.json: '.*' is no regular expression"),
        ({"alpha_pattern": [4]}, None, r"adapter_config\.json: alpha_pattern=\[4\]; allowed are patterns"),
        ({}, "other model", r"q_proj\.weight of shape .* fits no tensor"),
        ({}, "no B", r"lacks lora_A or lora_B"),
        ({}, "truncated", r"adapter_model\.safetensors is"),
        ({}, "not peft", r"does not begin with base_model\.model\."),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(
    tiny_qwen3_dir: Path, tmp_path: Path, config: dict, change: str | None, complaint: str
):
    folder = tmp_path / "lora"
    tensors = make_adapter(folder, load(tiny_qwen3_dir), {Q: 4}, **config)
    if change == "no magnitude":
        tensors.pop(f"{Q}.lora_magnitude_vector")
    if change == "other model":
        tensors[f"{Q}.lora_B.weight"] = torch.zeros(8, 4)
    if change == "no B":
        tensors.pop(f"{Q}.lora_B.weight")
    save_adapter(folder, tensors)
    weights = folder / "adapter_model.safetensors"
    if change == "truncated":
        weights.write_bytes(weights.read_bytes()[:-5])
    if change == "not peft":
        save_file(tensors, weights)

    with pytest.raises(CheckpointError, match=complaint):
        convert(tiny_qwen3_dir, tmp_path / "out", adapter_path=folder)
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_not_merged_into_int8_weights_or_a_shared_matrix(tiny_int8_dir: Path, tmp_path: Path):
    tied = make_model(tmp_path / "tied", "qwen2", tie_word_embeddings=True)
    make_adapter(tmp_path / "lora", load(tied), {"model.embed_tokens": 4})

    with pytest.raises(CheckpointError, match="is quantised"):
        convert(tiny_int8_dir, tmp_path / "out", adapter_path=tmp_path / "lora")
    with pytest.raises(CheckpointError, match=r"embedding and head alike"):
        convert(tied, tmp_path / "out", adapter_path=tmp_path / "lora")
