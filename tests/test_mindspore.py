"""MindSpore checkpoints: every layout gives back the weights it was made from, and damage is refused by name."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import mindspore_writer as ms
import pytest
import torch
from conftest import make_model
from megatron_writer import save_megatron
from safetensors.torch import load_file

from ascend_kit.checkpoint.convert import convert, open_source
from ascend_kit.checkpoint.huggingface import open_checkpoint
from ascend_kit.checkpoint.mindspore import open_mindspore
from ascend_kit.checkpoint.mindspore_file import MindSporeFile, check_mindspore_file
from ascend_kit.checkpoint.pieces import same_on_all_ranks
from ascend_kit.checkpoint.tensor_file import CheckpointError

SHAPE = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 304}


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mindspore") / request.param
    return make_model(folder, request.param, tie_word_embeddings=request.param == "qwen2", **SHAPE)


def weights_of(source: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}


def assert_reads_back(folder: Path, source: Path) -> None:
    opened, expected = open_mindspore(folder, source), weights_of(source)
    assert set(opened.tensor_names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(opened.read(name), tensor), name
        rows = tensor.shape[0]
        assert torch.equal(opened.read_slice(name, 0, rows // 3, rows), tensor[rows // 3 :]), name
        if tensor.dim() == 2:
            assert torch.equal(opened.read_slice(name, 1, 3, 9), tensor[:, 3:9]), name


@pytest.mark.parametrize("names", [ms.LEGACY, ms.MCORE], ids=["legacy", "mcore"])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_both_name_families_convert_bit_for_bit_and_training_entries_are_counted(
    source: Path, tmp_path: Path, names: dict, suffix: str
):
    tensors = ms.renamed(weights_of(source), names)
    save = ms.save_ckpt if suffix == "ckpt" else ms.save_safetensors
    save(tmp_path / "ms" / f"model.{suffix}", tensors | ms.training_entries(tensors))

    result = convert(tmp_path / "ms", tmp_path / "result", tokenizer_path=source)

    written, expected = open_checkpoint(result.folder), weights_of(source)
    assert result.manifest["source"]["framework"] == "mindspore"
    assert all(torch.equal(written.read(name), tensor) for name, tensor in expected.items())
    assert f"{2 * len(tensors) + 2} entries of the optimizer and of training, not used" in str(result)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
def test_merged_tensors_are_taken_apart(source: Path, tmp_path: Path, legacy: bool, interleaved: bool):
    tensors = ms.merged(weights_of(source), 4, legacy=legacy, interleaved=interleaved, contiguous_qkv=not interleaved)
    texts = shutil.copytree(source, tmp_path / "texts")
    if not interleaved:
        config = json.loads((texts / "config.json").read_text())
        config |= {"use_interleaved_weight_layout_mlp": False, "use_contiguous_weight_layout_attention": True}
        (texts / "config.json").write_text(json.dumps(config))
    ms.save_safetensors(tmp_path / "ms" / "a.safetensors", tensors)
    (tmp_path / "ms" / "param_name_map.json").write_text(json.dumps(dict.fromkeys(tensors, "a.safetensors")))

    opened = open_mindspore(tmp_path / "ms", texts)

    for name, tensor in weights_of(source).items():
        assert torch.equal(opened.read(name), tensor), name
    assert "use_interleaved_weight_layout_mlp" not in opened.config


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("tp,pp", [(2, 1), (1, 2), (4, 2)])
def test_rank_folders_of_tensor_and_pipeline_parallelism_are_merged(
    source: Path, tmp_path: Path, tp: int, pp: int, merge: bool
):
    tensors = ms.merged(weights_of(source), 4) if merge else ms.renamed(weights_of(source), ms.LEGACY)
    for rank, state in enumerate(ms.rank_states(tensors, tp, pp, 1, 4)):
        ms.save_ckpt(tmp_path / f"rank_{rank}" / "qwen-1_5.ckpt", state)

    assert_reads_back(tmp_path, source)


class CountedRows:
    """A tensor that counts the rows read from it."""

    dtype, origin, num_read = torch.float32, "rank.safetensors", 0

    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.shape = values, tuple(values.shape)

    def read(self) -> torch.Tensor:
        return self.read_slice(0, 0, self.shape[0])

    def read_slice(self, dim: int, start: int, stop: int) -> torch.Tensor:
        self.num_read += stop - start if dim == 0 else self.shape[0]
        return self.values.narrow(dim, start, stop - start)


def test_a_tensor_that_every_rank_holds_is_read_once_however_many_blocks_it_is_read_in():
    values = torch.arange(300.0).reshape(100, 3)
    ranks = [CountedRows(values), CountedRows(values.clone())]
    whole = same_on_all_ranks("tok_embeddings", ranks)

    read = torch.cat([whole.read_slice(0, start, start + 10) for start in range(0, 100, 10)])

    assert torch.equal(read, values) and [rank.num_read for rank in ranks] == [100, 100]
    ranks[1].values[99, 2] = 0
    assert torch.equal(whole.read_slice(0, 0, 90), values[:90])
    with pytest.raises(CheckpointError, match="tok_embeddings differs from the copy in rank"):
        whole.read_slice(0, 90, 100)


@pytest.mark.parametrize("save,kind", [(ms.save_strategy, "ckpt"), (ms.save_strategy_json, "json")])
def test_data_parallel_ranks_are_merged_by_the_strategy_file_and_refused_without(
    source: Path, tmp_path: Path, save, kind: str
):
    path = tmp_path / "strategy" / f"ckpt_strategy_rank_0.{kind}"
    tensors = ms.merged(weights_of(source), 4)
    for rank, state in enumerate(ms.rank_states(tensors, 2, 2, 2, 4)):
        ms.save_safetensors(tmp_path / "checkpoint" / f"rank_{rank}" / "q.safetensors", state)

    with pytest.raises(CheckpointError, match=r"strategy file.*unified_safetensors"):
        open_mindspore(tmp_path / "checkpoint", source)
    save(path, tensors, tp=2, dp=2)
    assert_reads_back(tmp_path / "checkpoint", source)
    save(path, tensors, tp=2, dp=2, spread=2)
    with pytest.raises(CheckpointError, match=r"spread over data parallel ranks.*unified_safetensors"):
        open_mindspore(tmp_path / "checkpoint", source)
    save(path, tensors, tp=0, dp=2)
    with pytest.raises(CheckpointError, match=r"strategy file is damaged: it puts .* on devices \[2, 0\]"):
        open_mindspore(tmp_path / "checkpoint", source)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match=f"strategy_rank_0.{kind}"):
        open_mindspore(tmp_path / "checkpoint", source)


@pytest.mark.parametrize("stored", [[], {}, {"w": {"dev_matrix": 3}}, {"w": {"dev_matrix": [1.5], "tensor_map": []}}])
def test_json_that_is_no_strategy_is_refused_by_name(source: Path, tmp_path: Path, stored):
    for rank in (0, 1):
        ms.save_ckpt(tmp_path / f"rank_{rank}" / "q.ckpt", ms.merged(weights_of(source), 4))
    (tmp_path / "strategy.json").write_text(json.dumps({"parallel_layout_item": stored} if stored else {}))

    with pytest.raises(CheckpointError, match=r"strategy\.json is no strategy file"):
        open_mindspore(tmp_path, source)


def test_iteration_folder_is_merged_by_its_metadata(source: Path, tmp_path: Path):
    tensors = ms.merged(weights_of(source), 4)
    states = ms.rank_states(tensors, 2, 2, 1, 4)
    ms.save_iteration(tmp_path / "run", states, tensors)
    ms.save_safetensors(tmp_path / "run" / "iteration_00000007" / "opt-0000000-0000001.safetensors", states[0])

    assert open_source(tmp_path / "run", "auto", source).framework == "mindspore"
    assert_reads_back(tmp_path / "run", source)


@pytest.mark.parametrize("root", ["torch", "mindtorch"])
def test_megatron_files_written_by_msadapter_convert_like_torchs(source: Path, tmp_path: Path, root: str):
    config = json.loads((source / "config.json").read_text())
    config.setdefault("head_dim", 16)
    folder = save_megatron(tmp_path / "mcore", weights_of(source), config, tp=2, args_changes={"model_type": None})
    for path in folder.rglob("*.pt"):
        ms.resave_as_msadapter(path, root)

    result = convert(folder, tmp_path / "result", tokenizer_path=source)

    written = open_checkpoint(result.folder)
    assert all(torch.equal(written.read(name), tensor) for name, tensor in weights_of(source).items())


def test_large_tensors_in_slices_and_old_scalars_are_read(tmp_path: Path):
    tensor = torch.randn(7, 5).bfloat16()
    path = ms.save_ckpt(tmp_path / "a.ckpt", {"model.x.weight": tensor}, slice_bytes=9)
    path.write_bytes(path.read_bytes() + ms.entry("step", [0], "Int32", b"\x05\0\0\0"))

    tensors = MindSporeFile(path).tensors

    assert torch.equal(tensors["model.x.weight"].read(), tensor)
    assert torch.equal(tensors["model.x.weight"].read_slice(0, 2, 6), tensor[2:6])
    assert torch.equal(tensors["model.x.weight"].read_slice(1, 1, 4), tensor[:, 1:4])
    assert tensors["step"].read().item() == 5


def test_a_checksum_finds_a_flipped_byte(tmp_path: Path):
    path = ms.save_ckpt(tmp_path / "a.ckpt", {"model.x.weight": torch.randn(64, 64)}, checksum=True)
    check_mindspore_file(path)
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)

    with pytest.raises(CheckpointError, match=r"a\.ckpt is damaged: its checksum"):
        check_mindspore_file(path)


@pytest.mark.parametrize(
    "data,complaint",
    [
        (b"", "holds no tensor"),
        (b"PK\x03\x04 a zip archive", "not a readable|no readable"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "claims"),
        (b"\x0a" + b"\xff" * 12, "no number ends"),
        (ms.entry("w", [1 << 50, 1 << 50], "Float32", b"1234"), "dimensions"),
        (ms.entry("w", [1 << 39], "Float32", b"1234"), "has 4 bytes"),
        (ms.entry("w", [1] * 40, "Float32", b"1234"), "dimensions"),
        (ms.entry("w" * 5000, [1], "Float32", b"1234"), "a name of 5000 bytes"),
        (ms.entry("w", [1], "Float32", b"1234") + ms.entry("w", [2], "Float32", b"1234"), "unlike forms"),
    ],
)
def test_damaged_and_hostile_files_are_refused_by_name(tmp_path: Path, data: bytes, complaint: str):
    (tmp_path / "bad.ckpt").write_bytes(data)

    with pytest.raises(CheckpointError, match=rf"bad\.ckpt.*({complaint})"):
        MindSporeFile(tmp_path / "bad.ckpt")


def test_random_damage_never_crashes_the_reader(tmp_path: Path):
    path = ms.save_ckpt(tmp_path / "a.ckpt", {f"model.{n}.weight": torch.ones(3, 4) for n in range(6)}, slice_bytes=20)
    whole, chance = path.read_bytes(), random.Random(0)
    for _ in range(400):
        data = bytearray(whole[: chance.randint(0, len(whole))] if chance.random() < 0.5 else whole)
        for _ in range(chance.randint(0, 4)):
            if data:
                data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            tensors = MindSporeFile(path).tensors
        except CheckpointError as error:
            assert "a.ckpt" in str(error)
            continue
        for source in tensors.values():
            assert tuple(source.read().shape) == source.shape


def break_shape(folder: Path, tensors: dict) -> None:
    ms.save_ckpt(folder / "model.ckpt", tensors | {"model.norm_out.weight": torch.ones(3)})


def leave_one_out(folder: Path, tensors: dict) -> None:
    ms.save_ckpt(folder / "model.ckpt", {k: t for k, t in tensors.items() if "layers.3.attention.wk" not in k})


def mix_families(folder: Path, tensors: dict) -> None:
    mcore = ms.renamed({"model.norm.weight": tensors["model.norm_out.weight"]}, ms.MCORE)
    ms.save_ckpt(folder / "model.ckpt", tensors | mcore)


def put_two(folder: Path, tensors: dict) -> None:
    ms.save_ckpt(folder / "model-1_1.ckpt", tensors)
    ms.save_ckpt(folder / "model-1_2.ckpt", tensors)


def add_unknown(folder: Path, tensors: dict) -> None:
    ms.save_ckpt(folder / "model.ckpt", tensors | {"model.layers.0.experts.w": torch.ones(3, 4)})


def lose_a_rank(folder: Path, tensors: dict) -> None:
    for rank in (0, 2):
        ms.save_ckpt(folder / f"rank_{rank}" / "model.ckpt", tensors)


@pytest.mark.parametrize(
    "damage,complaint",
    [
        (break_shape, r"model\.norm_out\.weight has shape \[3\]"),
        (leave_one_out, r"model\.layers\.3\.self_attn\.k_proj\.weight"),
        (mix_families, r"model\.norm\.weight is stored twice"),
        (put_two, r"2 checkpoints \(model-1_1\.ckpt, model-1_2\.ckpt\)"),
        (add_unknown, r"unknown tensor model\.layers\.0\.experts\.w"),
        (lose_a_rank, r"rank_1 is missing"),
    ],
)
def test_mixed_up_checkpoints_are_refused_by_name(source: Path, tmp_path: Path, damage, complaint: str):
    damage(tmp_path / "ms", ms.renamed(weights_of(source), ms.LEGACY))

    with pytest.raises(CheckpointError, match=complaint):
        convert(tmp_path / "ms", tmp_path / "result", tokenizer_path=source)
    assert not (tmp_path / "result").exists()


def test_framework_is_checked_and_config_asked_for(source: Path, tmp_path: Path):
    ms.save_ckpt(tmp_path / "model.ckpt", ms.renamed(weights_of(source), ms.LEGACY))

    assert open_source(tmp_path, "mindspore", source).framework == "mindspore"
    with pytest.raises(CheckpointError, match="holds a mindspore checkpoint"):
        open_source(tmp_path, "huggingface", source)
    with pytest.raises(CheckpointError, match=r"carries no config\.json: set tokenizer_path"):
        open_source(tmp_path, "auto", None)
    with pytest.raises(CheckpointError, match="holds a huggingface checkpoint"):
        open_source(source, "mindspore", source)
