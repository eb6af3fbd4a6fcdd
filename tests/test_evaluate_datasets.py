"""Finding, checking and describing the local data sets, in the layouts of real downloads."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from evaluation_data import (
    AGIEVAL_SUBJECTS,
    CEVAL_SUBJECTS,
    MMLU_SUBJECTS,
    WIKITEXT_CONFIG,
    agieval_row,
    ceval_row,
    mmlu_row,
    page,
    write_sets,
    write_table,
)

from ascend_kit.evaluation.datasets import SETS, find_tasks, groups_of, write_task_folder
from ascend_kit.evaluation.files import DataError
from ascend_kit.evaluation.tasks import go_offline, packaged_groups, packaged_tasks

pytest.importorskip("lm_eval")
ALL = list(SETS)


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    return write_sets(tmp_path / "data")


def load_tasks(tasks, folder: Path, names: list[str]) -> dict:
    from lm_eval.tasks import TaskManager

    go_offline()
    manager = TaskManager(include_path=str(write_task_folder(tasks, folder)), include_defaults=False)
    return manager.load(names)


def test_the_packaged_tasks_are_the_ones_of_the_real_sets() -> None:
    sizes = {name: len(packaged_tasks(spec.task_folder)) for name, spec in SETS.items()}

    assert sizes == {"mmlu": 57, "ceval": 52, "agieval": 21, "wikitext": 1}
    groups = packaged_groups("mmlu/default")
    assert (
        len(groups["mmlu"][0]) == 57
        and sum(len(groups[f"mmlu_{part}"][0]) for part in ("stem", "other", "social_sciences", "humanities")) == 57
    )
    assert packaged_groups("ceval")["ceval-valid"][1] == ("acc", "acc_norm")
    assert len(packaged_groups("agieval")["agieval"][0]) == 21


def test_every_set_is_found_with_its_shots_and_metrics(sets: Path) -> None:
    tasks = {task.task: task for task in find_tasks(sets, ALL)}

    assert set(tasks) == {
        "mmlu_abstract_algebra",
        "mmlu_business_ethics",
        "ceval-valid_law",
        "ceval-valid_physician",
        "agieval_aqua_rat",
        "agieval_jec_qa_kd",
        "agieval_gaokao_mathcloze",
        "wikitext",
    }
    assert [
        tasks[name].num_fewshot for name in ("mmlu_business_ethics", "ceval-valid_law", "agieval_aqua_rat", "wikitext")
    ] == [5, 5, 0, 0]
    assert tasks["agieval_gaokao_mathcloze"].output_type == "generate_until"
    assert tasks["ceval-valid_law"].metrics == ("acc", "acc_norm")
    assert set(tasks["ceval-valid_law"].files) == {"val", "dev"}
    assert all(task.num_documents == 6 for task in tasks.values())


def test_the_number_of_shots_applies_where_lm_eval_can_use_it(sets: Path) -> None:
    shots = {task.set_name: task.num_fewshot for task in find_tasks(sets, ALL, num_fewshot=2)}

    assert shots == {"mmlu": 2, "ceval": 2, "agieval": 0, "wikitext": 0}


def test_groups_hold_the_tasks_that_are_present(sets: Path) -> None:
    groups = {group.group: group for group in groups_of(find_tasks(sets, ALL))}

    assert groups["mmlu"].tasks == ("mmlu_abstract_algebra", "mmlu_business_ethics")
    assert groups["mmlu_stem"].tasks == ("mmlu_abstract_algebra",) and "mmlu_humanities" not in groups
    assert (len(groups["mmlu"].tasks), groups["mmlu"].num_packaged) == (2, 57)
    assert set(groups["agieval"].tasks) - set(groups["agieval_multiple_choice"].tasks) == {"agieval_gaokao_mathcloze"}
    assert groups["agieval_multiple_choice"].num_packaged == 19
    assert groups["agieval_cn"].tasks == ("agieval_gaokao_mathcloze", "agieval_jec_qa_kd")


def test_lm_eval_loads_tasks_and_groups_from_the_generated_folder(sets: Path, tmp_path: Path) -> None:
    tasks = find_tasks(sets, ALL)

    loaded = load_tasks(tasks, tmp_path / "yaml", ["mmlu", "ceval-valid", "agieval", "wikitext"])

    assert set(loaded["tasks"]) == {task.task for task in tasks}
    assert set(loaded["groups"]["mmlu"].child_names) == {"mmlu_abstract_algebra", "mmlu_business_ethics"}
    algebra = loaded["tasks"]["mmlu_abstract_algebra"]
    assert "about abstract algebra" in algebra.config.description  # the packaged prompt, not a copy
    assert len(algebra.eval_docs) == 6 and len(loaded["tasks"]["wikitext"].eval_docs) == 6


def test_zero_shots_need_no_split_of_shots(sets: Path, tmp_path: Path) -> None:
    for path in sets.glob("*/*/dev.parquet"):
        path.unlink()

    tasks = find_tasks(sets, ["mmlu", "ceval"], num_fewshot=0)
    loaded = load_tasks(tasks, tmp_path / "yaml", [task.task for task in tasks])

    assert len(loaded["tasks"]) == 4
    with pytest.raises(DataError, match=r"mmlu_abstract_algebra: no dev split in .*abstract_algebra.*found: test"):
        find_tasks(sets, ["mmlu"])


def test_an_edited_file_is_read_again_and_changes_its_hash(sets: Path, tmp_path: Path) -> None:
    (before,) = find_tasks(sets, ["wikitext"])
    load_tasks([before], tmp_path / "first", ["wikitext"])
    file = sets / "wikitext" / WIKITEXT_CONFIG / "test.parquet"
    stat = file.stat()
    write_table(file, [{"page": "changed"}])
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a copy that keeps times would leave it

    (after,) = find_tasks(sets, ["wikitext"])
    loaded = load_tasks([after], tmp_path / "second", ["wikitext"])

    assert before.data_hash != after.data_hash
    assert loaded["tasks"]["wikitext"].eval_docs["page"][:] == ["changed"]


# --- layouts of real downloads ------------------------------------------------------------------------------


def hub_mmlu(root: Path) -> None:
    """`hf download cais/mmlu --local-dir .../cais___mmlu`: shards, further splits and configurations, a
    README.
    """
    rnd = random.Random(1)
    for subject in MMLU_SUBJECTS:
        for split, rows in (("test", 6), ("dev", 5), ("validation", 2)):
            write_table(root / subject / f"{split}-00000-of-00001.parquet", [mmlu_row(rnd, subject)] * rows)
    write_table(root / "all" / "test-00000-of-00001.parquet", [mmlu_row(rnd, "all")] * 3)
    write_table(root / "auxiliary_train" / "train-00000-of-00001.parquet", [mmlu_row(rnd, "x")])
    configs = "".join(
        f"- config_name: {s}\n  data_files:\n  - split: test\n    path: {s}/test-*\n"
        f"  - split: dev\n    path: {s}/dev-*\n"
        for s in MMLU_SUBJECTS
    )
    (root / "README.md").write_text(f"---\nlanguage: en\nconfigs:\n{configs}---\n# MMLU\n")


@pytest.mark.parametrize("name", ["mmlu", "MMLU", "cais___mmlu", "cais/mmlu", "cais--mmlu", "cais_mmlu"])
def test_mmlu_as_downloaded_from_the_hub(tmp_path: Path, name: str) -> None:
    hub_mmlu(tmp_path / name)

    tasks = find_tasks(tmp_path, ["mmlu"])

    assert [(task.task, task.num_documents) for task in tasks] == [
        ("mmlu_abstract_algebra", 6),
        ("mmlu_business_ethics", 6),
    ]
    assert set(tasks[0].files) == {"test", "dev"}


def test_mmlu_in_the_hub_cache_uses_the_main_snapshot(tmp_path: Path) -> None:
    folder = tmp_path / "datasets--cais--mmlu"
    hub_mmlu(folder / "snapshots" / "aaaa")
    hub_mmlu(folder / "snapshots" / "bbbb")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("aaaa")

    tasks = find_tasks(tmp_path, ["mmlu"])

    assert all("aaaa" in str(path) for task in tasks for paths in task.files.values() for path in paths)


def test_a_readme_may_name_files_of_any_name(tmp_path: Path) -> None:
    rnd = random.Random(0)
    write_table(tmp_path / "mmlu" / "tables" / "first.parquet", [mmlu_row(rnd, "law")] * 4)
    write_table(tmp_path / "mmlu" / "tables" / "second.parquet", [mmlu_row(rnd, "law")] * 5)
    (tmp_path / "mmlu" / "README.md").write_text(
        "---\nconfigs:\n- config_name: anatomy\n  data_files:\n"
        "  - split: test\n    path: [tables/first.parquet]\n"
        "  - split: dev\n    path: tables/second.parquet\n---\n"
    )

    (task,) = find_tasks(tmp_path, ["mmlu"])

    assert (task.task, task.num_documents) == ("mmlu_anatomy", 4)


def test_ceval_wikitext_and_agieval_as_downloaded_from_the_hub(tmp_path: Path) -> None:
    rnd = random.Random(2)
    for subject in CEVAL_SUBJECTS:
        for split in ("val", "dev", "test"):
            write_table(
                tmp_path / "ceval-exam" / subject / f"{split}-00000-of-00001.parquet",
                [ceval_row(rnd, n) for n in range(5)],
            )
    for subject in AGIEVAL_SUBJECTS:
        write_table(
            tmp_path / f"agieval-{subject}" / "data" / "test-00000-of-00001-1ba5fe2d4fbe4f1a.parquet",
            [agieval_row(rnd, subject)] * 3,
        )
    for config in (WIKITEXT_CONFIG, "wikitext-103-raw-v1"):
        write_table(
            tmp_path / "EleutherAI___wikitext_document_level" / config / f"{config}-test.parquet",
            [{"page": page(rnd)}] * 2,
        )

    tasks = {task.task: task for task in find_tasks(tmp_path, ["ceval", "agieval", "wikitext"])}

    assert set(tasks) == {
        "ceval-valid_law",
        "ceval-valid_physician",
        "agieval_aqua_rat",
        "agieval_jec_qa_kd",
        "agieval_gaokao_mathcloze",
        "wikitext",
    }
    assert [path.name for path in tasks["wikitext"].files["test"]] == [f"{WIKITEXT_CONFIG}-test.parquet"]


def test_shards_of_one_split_are_read_together(tmp_path: Path) -> None:
    rnd = random.Random(3)
    for shard in range(2):
        write_table(
            tmp_path / "wikitext" / WIKITEXT_CONFIG / f"test-0000{shard}-of-00002.parquet", [{"page": page(rnd)}] * 4
        )

    (task,) = find_tasks(tmp_path, ["wikitext"])

    assert task.num_documents == 8


def test_the_datasets_librarys_own_cache_folder_works(sets: Path, tmp_path: Path) -> None:
    import datasets

    go_offline()
    source = datasets.load_dataset(
        "parquet",
        data_files={split: str(sets / "mmlu" / "abstract_algebra" / f"{split}.parquet") for split in ("test", "dev")},
        cache_dir=str(tmp_path / "cache"),
    )
    folder = tmp_path / "hf" / "cais___mmlu" / "abstract_algebra" / "0.0.0" / "c30699e8356da336"
    folder.mkdir(parents=True)
    for split in ("test", "dev"):
        shutil.copy(source[split].cache_files[0]["filename"], folder / f"mmlu-{split}.arrow")

    tasks = find_tasks(tmp_path / "hf", ["mmlu"])
    loaded = load_tasks(tasks, tmp_path / "yaml", ["mmlu"])

    assert len(loaded["tasks"]["mmlu_abstract_algebra"].eval_docs) == 6


def test_dataset_path_may_be_the_sets_own_folder(sets: Path) -> None:
    assert len(find_tasks(sets / "mmlu", ["mmlu"])) == 2


# --- faults -------------------------------------------------------------------------------------------------


def test_a_missing_set_names_the_path_and_what_lies_there(sets: Path) -> None:
    shutil.rmtree(sets / "ceval")

    with pytest.raises(DataError) as caught:
        find_tasks(sets, ALL)

    text = str(caught.value)
    assert "no folder ceval/ (a copy of ceval/ceval-exam)" in text
    assert str(sets) in text and "agieval, mmlu, wikitext" in text


def test_a_dataset_path_that_is_no_folder_says_what_it_must_hold(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere' is not a folder; it must hold mmlu/ \(a copy of cais/mmlu\)"):
        find_tasks(tmp_path / "nowhere", ["mmlu"])


def test_an_empty_set_folder_names_expected_files(tmp_path: Path) -> None:
    (tmp_path / "mmlu").mkdir()

    with pytest.raises(
        DataError, match=r"expected <subject>/<split>.parquet, .* with subjects such as abstract-algebra"
    ):
        find_tasks(tmp_path, ["mmlu"])


def test_a_missing_column_lists_expected_and_found(sets: Path) -> None:
    write_table(sets / "ceval" / "law" / "val.parquet", [{"question": "q", "A": "a", "B": "b", "answer": "A"}])

    with pytest.raises(DataError) as caught:
        find_tasks(sets, ["ceval"])

    text = str(caught.value)
    assert "law/val.parquet lacks C (string), D (string)" in text
    assert "found question (string), A (string), B (string), answer (string)" in text


def test_a_column_of_another_kind_is_a_fault(sets: Path) -> None:
    row = mmlu_row(random.Random(0), "x")
    write_table(sets / "mmlu" / "business_ethics" / "test.parquet", [{**row, "answer": "B"}])

    with pytest.raises(DataError, match=r"lacks answer \(integer\); .*answer \(string\)"):
        find_tasks(sets, ["mmlu"])


def test_a_file_that_is_no_parquet_and_an_empty_one_are_faults(sets: Path) -> None:
    (sets / "mmlu" / "business_ethics" / "test.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    empty = pa.table({"page": pa.array([], pa.string())})
    pa.parquet.write_table(empty, sets / "wikitext" / WIKITEXT_CONFIG / "test.parquet")

    with pytest.raises(DataError) as caught:
        find_tasks(sets, ["mmlu", "wikitext"])

    assert "cannot be read as parquet" in str(caught.value) and "has no rows" in str(caught.value)


def test_too_few_shots_name_the_parameter(tmp_path: Path) -> None:
    write_sets(tmp_path, shots=3)

    with pytest.raises(DataError, match=r"5 shots asked, but .*dev.parquet has 3 rows; set eval_fewshot to 3 or less"):
        find_tasks(tmp_path, ["mmlu"])


def test_many_faults_are_shortened(tmp_path: Path) -> None:
    for task, (_, config) in packaged_tasks("mmlu/default").items():
        write_table(tmp_path / "mmlu" / config["dataset_name"] / "test.parquet", [{"text": task}])

    with pytest.raises(DataError, match="and 49 more"):
        find_tasks(tmp_path, ["mmlu"])
