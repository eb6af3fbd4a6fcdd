"""Identities of results: which parts must agree for which use, and content hashes remembered by stat."""

from __future__ import annotations

import os

import pytest

from ascend_kit import files
from ascend_kit.files import file_hash, hash_files, known_hash
from ascend_kit.identity import MUST_AGREE, Identity
from ascend_kit.results import RunFolder

WHOLE = Identity(
    weights="w" * 32,
    tokenizer="t" * 32,
    chat_template="c" * 32,
    data="d" * 32,
    prompts="p" * 32,
    task={"version": 1, "num_fewshot": 5},
    engine={"kind": "ascend_kit", "precision": "bf16"},
    versions={"torch": "2.13.0"},
    device={"name": "Ascend910B3", "cann": "9.1"},
)
CHANGED = {
    "weights": "x" * 32,
    "tokenizer": "x" * 32,
    "chat_template": "x" * 32,
    "data": "x" * 32,
    "prompts": "x" * 32,
    "task": {"version": 1, "num_fewshot": 0},
    "engine": {"kind": "ascend_kit", "precision": "fp16"},
    "versions": {"torch": "2.14.0"},
    "device": {"name": "Ascend910B3", "cann": "9.2"},
}


@pytest.mark.parametrize("part", CHANGED)
@pytest.mark.parametrize("use", ["resume", "pair", "line", "history"])
def test_a_changed_part_matters_exactly_where_the_table_says(part, use):
    other = WHOLE.with_parts(**{part: CHANGED[part]})

    assert WHOLE.agrees(other, use) == (part not in MUST_AGREE[use])
    assert WHOLE.id != other.id


def test_a_difference_is_named_down_to_the_key():
    other = WHOLE.with_parts(versions={"torch": "2.14.0"})

    assert WHOLE.differences(other, "resume") == ["versions.torch: '2.13.0' -> '2.14.0'"]


def test_an_identity_survives_being_written_to_a_row():
    assert Identity.from_row(WHOLE.to_row()) == WHOLE
    assert Identity.from_row({**WHOLE.to_row(), "a later part": 1}).id == WHOLE.id


def test_a_hash_follows_the_content_and_not_the_name(tmp_path):
    first, second = tmp_path / "a.bin", tmp_path / "b.bin"
    first.write_bytes(b"weights")
    second.write_bytes(b"weights")

    assert file_hash(first) == file_hash(second)

    second.write_bytes(b"Weights")
    assert file_hash(first) != file_hash(second)


def test_a_file_replaced_with_its_size_and_time_kept_is_read_again(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old weights")
    before, times = file_hash(path), os.stat(path)

    replacement = tmp_path / "new"
    replacement.write_bytes(b"new weights")
    os.replace(replacement, path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    assert known_hash(path) is None
    assert file_hash(path) != before


def test_an_unchanged_file_is_not_read_again(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    value = file_hash(path)
    monkeypatch.setattr(files, "hash_file", lambda *_: pytest.fail("read again"))

    assert file_hash(path) == value


def test_several_files_are_one_hash_whatever_their_order(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")

    assert hash_files([tmp_path / "a", tmp_path / "b"], tmp_path) == hash_files(
        [tmp_path / "b", tmp_path / "a"], tmp_path
    )


def test_rows_of_another_identity_stay_in_the_file_and_take_part_in_nothing(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append("rows", {"value": 1}, WHOLE)
    folder.append("rows", {"value": 2}, WHOLE.with_parts(weights="x" * 32))
    folder.append("rows", {"value": 3})

    assert [row["value"] for row in folder.rows_of("rows", WHOLE)] == [1]
    assert [row["value"] for row in folder.rows_of("rows", WHOLE, "pair")] == [1, 2]
    assert [row["value"] for row in folder.rows("rows")] == [1, 2, 3]
    assert len(folder.identities()) == 2
