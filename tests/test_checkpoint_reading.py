"""Reading checkpoints: lazily, in slices, and with a clear error for every kind of damage."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import folder_with
from safetensors.torch import load_file, save_file

from ascend_kit.checkpoint.huggingface import open_checkpoint
from ascend_kit.checkpoint.tensor_file import CheckpointError, open_safetensors
from ascend_kit.checkpoint.torch_file import TorchFile

TENSORS = {
    "a": torch.arange(48, dtype=torch.float32).reshape(6, 8).bfloat16(),
    "b": torch.arange(60, dtype=torch.float32).reshape(5, 4, 3),
    "c": torch.arange(21, dtype=torch.int8).reshape(7, 3),
    "d": torch.tensor([1.5, -2.0]).half(),
}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(TENSORS, folder_with(tmp_path / "single") / "model.safetensors")
    return tmp_path / "single"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder, names = folder_with(tmp_path / "sharded"), list(TENSORS)
    weight_map = {}
    for number, part in enumerate((names[:2], names[2:]), start=1):
        file_name = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: TENSORS[name] for name in part}, folder / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def assert_reads_everything(folder: Path, tensors: dict[str, torch.Tensor] = TENSORS) -> None:
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.tensor_names()) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.shape(name) == tuple(tensor.shape) and checkpoint.source(name).dtype == tensor.dtype
        assert torch.equal(checkpoint.read(name), tensor)
        for dim, size in enumerate(tensor.shape):
            part = checkpoint.read_slice(name, dim, 1, size)
            assert torch.equal(part, tensor.narrow(dim, 1, size - 1)) and part.is_contiguous()


def test_single_safetensors_file_reads_whole_and_in_slices(single: Path):
    assert_reads_everything(single)


def test_sharded_safetensors_read_whole_and_in_slices(sharded: Path):
    assert_reads_everything(sharded)


@pytest.mark.parametrize("zip_format", [True, False])
def test_bin_file_reads_views_and_parameters(tmp_path: Path, zip_format: bool):
    base = torch.arange(24, dtype=torch.float32)
    tensors = {
        **TENSORS,
        "turned": base.reshape(4, 6).t(),
        "tail": base[20:],
        "parameter": torch.nn.Parameter(torch.ones(3)),
    }
    folder = folder_with(tmp_path / "bin")
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zip_format)

    assert_reads_everything(folder, tensors)


def test_bin_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path):
    folder, witness = folder_with(tmp_path / "evil"), tmp_path / "witness"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {witness}",)

    torch.save({"weight": torch.ones(2), "evil": Evil()}, folder / "pytorch_model.bin")

    with pytest.raises(CheckpointError, match=r"asks for (posix|os)\.system"):
        open_checkpoint(folder)
    assert not witness.exists()


@pytest.mark.parametrize("zip_format", [True, False])
def test_pickle_that_claims_memory_is_refused_before_it_is_loaded(tmp_path: Path, zip_format: bool):
    folder = folder_with(tmp_path / "hungry")

    class Hungry:
        def __reduce__(self):
            return bytearray, (600_000_000,)

    contents = {"weight": torch.ones(2), "hungry": Hungry()}
    torch.save(contents, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zip_format)

    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin asks for .*bytearray"):
        open_checkpoint(folder)


def test_flipped_byte_of_a_torch_file_is_found(tmp_path: Path):
    folder = folder_with(tmp_path / "bin")
    torch.save(TENSORS, folder / "pytorch_model.bin")
    open_checkpoint(folder).check_data()
    data = bytearray((folder / "pytorch_model.bin").read_bytes())
    position = data.find(TENSORS["b"].numpy().tobytes())
    data[position + 7] ^= 16
    (folder / "pytorch_model.bin").write_bytes(data)

    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is damaged"):
        open_checkpoint(folder).check_data()


def test_pickle_that_reaches_outside_its_storage_is_refused(tmp_path: Path):
    path, changed = tmp_path / "file.pt", tmp_path / "changed.pt"
    torch.save({"weight": torch.ones(200)}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(changed, "w") as target:
        for info in source.infolist():
            data = source.read(info)
            if info.filename.endswith("data.pkl"):
                # The size tuple (200,) is the pickled byte 200; the storage keeps its 200 elements.
                assert data.count(b"K\xc8\x85") == 1
                data = data.replace(b"K\xc8\x85", b"K\xff\x85")
            target.writestr(info, data)

    with pytest.raises(CheckpointError, match="outside its storage"):
        TorchFile(changed).tensors(TorchFile(changed).content)


def test_bin_file_with_a_sparse_tensor_is_refused_by_name(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    torch.save({"b": torch.eye(4).to_sparse()}, tmp_path / "pytorch_model.bin")

    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: tensor b is sparse"):
        open_checkpoint(tmp_path)


def test_truncated_bin_file_is_refused_with_its_name(tmp_path: Path):
    folder = folder_with(tmp_path / "bin")
    torch.save(TENSORS, folder / "pytorch_model.bin")
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[: len(data) // 2])

    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        open_checkpoint(folder)


def test_pickle_without_tensors_is_not_loaded(tmp_path: Path):
    folder = folder_with(tmp_path / "bin")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(print))

    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        open_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 4, 40, 0.5, -1])
def test_truncated_safetensors_file_is_refused_at_opening(single: Path, keep: float):
    path = single / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])

    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        open_checkpoint(single)


def test_file_that_grew_is_refused(single: Path):
    with open(single / "model.safetensors", "ab") as file:
        file.write(b"more")

    with pytest.raises(CheckpointError, match="longer than its header"):
        open_checkpoint(single)


def rewrite_header(path: Path, change) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_header_whose_shape_does_not_fit_its_bytes_names_the_tensor(single: Path):
    rewrite_header(single / "model.safetensors", lambda header: header["b"].update(shape=[5, 4, 4]))

    with pytest.raises(CheckpointError, match=r"wrong header: tensor b "):
        open_checkpoint(single)


def test_header_with_overlapping_tensors_is_refused(single: Path):
    def overlap(header: dict) -> None:
        header["c"]["data_offsets"] = [0, 21]

    rewrite_header(single / "model.safetensors", overlap)

    with pytest.raises(CheckpointError, match="wrong header"):
        open_checkpoint(single)


def test_negative_shape_in_a_header_is_refused(single: Path):
    rewrite_header(single / "model.safetensors", lambda header: header["c"].update(shape=[-7, -3]))

    with pytest.raises(CheckpointError, match="header"):
        open_checkpoint(single)


@pytest.mark.parametrize("garbage", [b"\xff" * 8 + b"x" * 50, (20).to_bytes(8, "little") + b"not json at all....."])
def test_file_that_is_not_safetensors_is_refused(single: Path, garbage: bytes):
    (single / "model.safetensors").write_bytes(garbage)

    with pytest.raises(CheckpointError, match=r"model\.safetensors (is not|has a damaged|is truncated)"):
        open_checkpoint(single)


def test_flipped_bytes_never_crash_the_header_parser(single: Path):
    original = (single / "model.safetensors").read_bytes()
    generator = torch.Generator().manual_seed(0)
    header_end = 8 + int.from_bytes(original[:8], "little")
    for _ in range(300):
        position = int(torch.randint(header_end, (1,), generator=generator))
        value = int(torch.randint(256, (1,), generator=generator))
        damaged = original[:position] + bytes([value]) + original[position + 1 :]
        (single / "model.safetensors").write_bytes(damaged)
        try:
            open_safetensors(single / "model.safetensors")
        except CheckpointError as error:
            assert "model.safetensors" in str(error)


def test_shard_named_by_the_index_but_absent_is_named(sharded: Path):
    (sharded / "model-00002-of-00002.safetensors").unlink()

    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        open_checkpoint(sharded)


def change_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_tensor_that_the_index_promises_and_no_shard_holds_is_named(sharded: Path):
    change_index(sharded, lambda index: index.update(ghost="model-00001-of-00002.safetensors"))

    with pytest.raises(CheckpointError, match="does not hold tensor ghost"):
        open_checkpoint(sharded)


def test_tensor_that_the_index_does_not_know_is_named(sharded: Path):
    change_index(sharded, lambda index: index.pop("d"))

    with pytest.raises(CheckpointError, match="holds tensor d, which the index does not know"):
        open_checkpoint(sharded)


def test_index_cannot_lead_out_of_the_folder(sharded: Path):
    change_index(sharded, lambda index: index.update(a="../single/model.safetensors"))

    with pytest.raises(CheckpointError, match="only plain file names"):
        open_checkpoint(sharded)


def test_unreadable_shard_is_named(sharded: Path):
    path = sharded / "model-00001-of-00002.safetensors"
    path.unlink()
    path.symlink_to("/proc/self/mem")  # opens, but reading at offset 0 fails with an I/O error

    with pytest.raises(CheckpointError, match="model-00001-of-00002"):
        open_checkpoint(sharded)


def test_unknown_tensor_name_gets_the_closest_one(single: Path):
    with pytest.raises(CheckpointError, match=r"holds no tensor A\.weight"):
        open_checkpoint(single).read("A.weight")


def test_slice_outside_the_tensor_is_refused(single: Path):
    with pytest.raises(ValueError, match="outside tensor a"):
        open_checkpoint(single).read_slice("a", 1, 4, 9)


def test_reading_a_slice_of_a_large_file_reads_only_that_slice(tmp_path: Path):
    # A sparse 8 GB file: reading all of it would take seconds and the memory of the whole machine.
    folder, rows = folder_with(tmp_path / "sparse"), 1 << 20
    header = json.dumps({"w": {"dtype": "BF16", "shape": [rows, 4096], "data_offsets": [0, rows * 8192]}}).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + rows * 8192)

    part = open_checkpoint(folder).read_slice("w", 0, rows - 2, rows)

    assert part.shape == (2, 4096) and part.eq(0).all()


def test_tiny_model_reads_like_safetensors(tiny_model_dir: Path):
    expected = load_file(tiny_model_dir / "model.safetensors")
    checkpoint = open_checkpoint(tiny_model_dir)

    assert set(checkpoint.tensor_names()) == set(expected)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())
