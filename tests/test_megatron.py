"""Megatron checkpoints: every parallel layout gives back the weights it was cut from, and no code is run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import make_model
from megatron_writer import save_megatron
from safetensors.torch import load_file

from ascend_kit.checkpoint.convert import convert
from ascend_kit.checkpoint.huggingface import open_checkpoint
from ascend_kit.checkpoint.megatron import open_megatron
from ascend_kit.checkpoint.tensor_file import CheckpointError

SHAPE = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 304}


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # qwen2 tied, qwen3 not, as with the small and large models of both families.
    folder = tmp_path_factory.mktemp("megatron") / request.param
    return make_model(folder, request.param, tie_word_embeddings=request.param == "qwen2", **SHAPE)


def weights_and_config(source: Path) -> tuple[dict[str, torch.Tensor], dict]:
    config = json.loads((source / "config.json").read_text())
    config.setdefault("head_dim", SHAPE["head_dim"])
    return load_file(source / "model.safetensors"), config


def assert_converts_back(root: Path, source: Path, destination: Path) -> None:
    expected = load_file(source / "model.safetensors")
    result = convert(root, destination, precision="fp32", tokenizer_path=source)
    checkpoint = open_checkpoint(result.folder)
    assert set(checkpoint.tensor_names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor), name
    assert result.manifest["source"]["framework"] == "megatron"
    assert (result.folder / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("te_norms", [False, True])
@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_parallel_layout_converts_to_the_source(source: Path, tmp_path: Path, tp: int, pp: int, te_norms: bool):
    weights, config = weights_and_config(source)
    root = save_megatron(tmp_path / "mcore", weights, config, tp=tp, pp=pp, te_norms=te_norms)

    assert_converts_back(root, source, tmp_path / "result")


@pytest.mark.parametrize(
    ("pp", "stages"),
    [
        (2, [[[0, 1, 2]], [[3]]]),
        (2, [[[0], [2]], [[1], [3]]]),
        (2, [[[0, 1]], [[2, 3, None]]]),
        (3, [[[0, None]], [[None, 1]], [[2, 3]]]),
    ],
    ids=["uneven stages", "virtual pipeline", "no-op layer at the end", "no-op layers inside"],
)
def test_uneven_virtual_and_noop_pipelines_convert_to_the_source(source: Path, tmp_path: Path, pp: int, stages: list):
    weights, config = weights_and_config(source)
    root = save_megatron(tmp_path / "mcore", weights, config, tp=2, pp=pp, stages=stages)

    assert_converts_back(root, source, tmp_path / "result")


def test_padded_vocabulary_is_cut_across_shard_borders(source: Path, tmp_path: Path):
    weights, config = weights_and_config(source)
    # 304 rows in 4 shards of 120: the third shard is half padding, the fourth nothing else.
    root = save_megatron(tmp_path / "mcore", weights, config, tp=4, padded_vocab=480)

    assert_converts_back(root, source, tmp_path / "result")


def test_release_folder_and_iteration_folder_are_accepted(source: Path, tmp_path: Path):
    weights, config = weights_and_config(source)
    root = save_megatron(tmp_path / "mcore", weights, config)

    assert_converts_back(root / "iter_0000001", source, tmp_path / "direct")
    (root / "iter_0000001").rename(root / "release")
    (root / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert_converts_back(root, source, tmp_path / "result")


def test_slices_of_merged_tensors_equal_slices_of_the_whole(source: Path, tmp_path: Path):
    weights, config = weights_and_config(source)
    checkpoint = open_megatron(save_megatron(tmp_path / "mcore", weights, config, tp=4, pp=2), source)

    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        full = weights[f"model.layers.3.self_attn.{name}.weight"]
        for dim in (0, 1):
            part = checkpoint.read_slice(f"model.layers.3.self_attn.{name}.weight", dim, 5, 50)
            assert torch.equal(part, full.narrow(dim, 5, 45))


@pytest.mark.parametrize("function", [subprocess.check_call, eval])
def test_code_in_a_shard_is_replaced_by_inert_classes_and_the_conversion_says_so(
    source: Path, tmp_path: Path, function
):
    weights, config = weights_and_config(source)
    witness = tmp_path / "witness"

    class Evil:
        def __reduce__(self):
            return function, (f"touch {witness}",)

    root = save_megatron(tmp_path / "mcore", weights, config, args_changes={"hook": Evil()})

    result = convert(root, tmp_path / "result", tokenizer_path=source, precision="fp32")

    assert function.__name__ in str(result) and "replaced" in str(result)
    assert_converts_back(root, source, tmp_path / "again")
    assert not witness.exists()


def test_commands_and_claims_of_memory_in_a_shard_are_refused_by_name(source: Path, tmp_path: Path):
    weights, config = weights_and_config(source)
    witness = tmp_path / "witness"

    class Evil:
        def __init__(self, function, *arguments):
            self.call = function, arguments

        def __reduce__(self):
            return self.call

    for hook, named in ((Evil(os.system, f"touch {witness}"), "system"), (Evil(bytearray, 600_000_000), "bytearray")):
        root = save_megatron(tmp_path / named, weights, config, args_changes={"hook": hook})

        with pytest.raises(CheckpointError, match=named):
            open_megatron(root, source)
    assert not witness.exists()


def test_a_flipped_byte_in_a_shard_is_found(source: Path, tmp_path: Path):
    weights, config = weights_and_config(source)
    root = save_megatron(tmp_path / "mcore", weights, config, tp=2)
    path = root / "iter_0000001" / "mp_rank_01" / "model_optim_rng.pt"
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + 500] ^= 1
    path.write_bytes(data)

    with pytest.raises(CheckpointError, match=r"mp_rank_01/model_optim_rng\.pt is damaged"):
        convert(root, tmp_path / "result", tokenizer_path=source)
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("norm_epsilon", 1e-5),
        ("rotary_percent", 0.5),
        ("rope_scaling_type", "yarn"),
        ("normalization", "LayerNorm"),
        ("swiglu", False),
        ("num_experts", 8),
    ],
)
def test_training_arguments_that_change_the_arithmetic_are_refused_by_name(
    source: Path, tmp_path: Path, argument: str, value: object
):
    weights, config = weights_and_config(source)
    root = save_megatron(tmp_path / "mcore", weights, config, args_changes={argument: value})

    with pytest.raises(CheckpointError, match=f"{argument}={value}"):
        open_megatron(root, source)


@pytest.mark.parametrize("marker", ["torch_dist", "fsdp2"])
def test_distributed_formats_are_refused_with_the_way_out(source: Path, tmp_path: Path, marker: str):
    iteration = tmp_path / "mcore" / "iter_0000007"
    iteration.mkdir(parents=True)
    (tmp_path / "mcore" / "latest_checkpointed_iteration.txt").write_text("7")
    if marker == "torch_dist":
        (iteration / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    else:
        (iteration / "__0_0.distcp").write_bytes(b"x")
        (iteration / ".metadata").write_bytes(b"x")

    with pytest.raises(CheckpointError, match="--ckpt-format torch"):
        convert(tmp_path / "mcore", tmp_path / "result", tokenizer_path=source)
    with pytest.raises(CheckpointError, match="--ckpt-format torch"):
        convert(iteration, tmp_path / "result", tokenizer_path=source)


def test_missing_tokenizer_path_says_what_it_is_for(source: Path, tmp_path: Path):
    weights, config = weights_and_config(source)
    root = save_megatron(tmp_path / "mcore", weights, config)

    with pytest.raises(CheckpointError, match="set tokenizer_path to the folder of the Hugging Face model"):
        convert(root, tmp_path / "result")


def test_missing_rank_is_named(source: Path, tmp_path: Path):
    weights, config = weights_and_config(source)
    root = save_megatron(tmp_path / "mcore", weights, config, tp=2, pp=2)
    shutil.rmtree(root / "iter_0000001" / "mp_rank_01_000")

    with pytest.raises(CheckpointError, match="tensor rank 1, pipeline stage 0 is missing; found 3 of 4"):
        convert(root, tmp_path / "result", tokenizer_path=source)


def test_last_stage_missing_shows_as_missing_layers(source: Path, tmp_path: Path):
    weights, config = weights_and_config(source)
    root = save_megatron(
        tmp_path / "mcore", weights, config, tp=1, pp=2, args_changes={"pipeline_model_parallel_size": None}
    )
    shutil.rmtree(root / "iter_0000001" / "mp_rank_00_001")

    with pytest.raises(CheckpointError, match=r"hold 2 layers, config.json says 4"):
        convert(root, tmp_path / "result", tokenizer_path=source)


def test_other_model_as_tokenizer_path_is_noticed(source: Path, tmp_path: Path):
    weights, config = weights_and_config(source)
    root = save_megatron(tmp_path / "mcore", weights, config)
    other = shutil.copytree(source, tmp_path / "other")
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))

    with pytest.raises(CheckpointError, match=r"ffn_hidden_size=128, config\.json or the folder says 96"):
        convert(root, tmp_path / "result", tokenizer_path=other)


def change_shard(path: Path, change) -> None:
    content = torch.load(path, weights_only=False, pickle_module=_plain_pickle())
    change(content["model"])
    content.pop("args")
    torch.save(content, path)


def _plain_pickle():
    """A pickle module for the test's own rewriting that replaces classes it cannot import."""
    import pickle
    import types

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            return super().find_class(module, name) if not module.startswith("megatron_for_test") else (lambda *_: None)

    return types.SimpleNamespace(__name__="pickle", Unpickler=Unpickler, load=pickle.load, loads=pickle.loads)


def test_norms_that_differ_between_ranks_are_named(source: Path, tmp_path: Path):
    weights, config = weights_and_config(source)
    root = save_megatron(tmp_path / "mcore", weights, config, tp=2)
    change_shard(
        root / "iter_0000001" / "mp_rank_01" / "model_optim_rng.pt",
        lambda state: state["decoder.final_layernorm.weight"].add_(1),
    )

    with pytest.raises(CheckpointError, match=r"mp_rank_01.*final_layernorm.weight differs"):
        convert(root, tmp_path / "result", tokenizer_path=source)
    assert not (tmp_path / "result").exists()


def test_tensor_missing_on_one_rank_is_named(source: Path, tmp_path: Path):
    weights, config = weights_and_config(source)
    root = save_megatron(tmp_path / "mcore", weights, config, tp=2)
    change_shard(
        root / "iter_0000001" / "mp_rank_01" / "model_optim_rng.pt",
        lambda state: state.pop("decoder.layers.2.mlp.linear_fc2.weight"),
    )

    with pytest.raises(CheckpointError, match=r"decoder\.layers\.2\.mlp\.linear_fc2\.weight is missing on some"):
        convert(root, tmp_path / "result", tokenizer_path=source)


def test_truncated_shard_is_named(source: Path, tmp_path: Path):
    weights, config = weights_and_config(source)
    root = save_megatron(tmp_path / "mcore", weights, config, tp=2)
    path = root / "iter_0000001" / "mp_rank_01" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:-1000])

    with pytest.raises(CheckpointError, match=r"mp_rank_01/model_optim_rng\.pt .*truncated"):
        convert(root, tmp_path / "result", tokenizer_path=source)


def test_legacy_megatron_layout_is_refused(source: Path, tmp_path: Path):
    weights, config = weights_and_config(source)
    root = save_megatron(tmp_path / "mcore", weights, config)
    path = root / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    torch.save({"model": {"language_model": {"encoder": {}}}, "checkpoint_version": 3.0}, path)

    with pytest.raises(CheckpointError, match="--use-mcore-models"):
        convert(root, tmp_path / "result", tokenizer_path=source)


def test_framework_named_wrongly_is_refused(source: Path, tmp_path: Path):
    weights, config = weights_and_config(source)
    root = save_megatron(tmp_path / "mcore", weights, config)

    with pytest.raises(CheckpointError, match=r"holds a megatron checkpoint.*framework is huggingface"):
        convert(root, tmp_path / "result", framework="huggingface", tokenizer_path=source)
    with pytest.raises(CheckpointError, match=r"holds a huggingface checkpoint.*framework is megatron"):
        convert(source, tmp_path / "result", framework="megatron")
