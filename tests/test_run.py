"""Runs of small stand-in notebooks: checks beforehand, how each ending is told, what --resume repeats."""

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from ascend_kit.params import ParameterError
from ascend_kit.results import RunFolderError
from ascend_kit.run.checks import parameter_defaults
from ascend_kit.run.experiment import RunError, _room_for_the_end, run_experiment
from ascend_kit.stages import RunRecord, Stage, StageLock, changing

PARAMETERS = 'experiment: str = "fake"\nrun: str = "default"\noutput_root: str = "outputs"\nseed: int = 0  # seed'
FINISH = (
    "import json, pathlib\nfolder = pathlib.Path(output_root, experiment, run)\n"
    "(folder / '{name}.json').write_text(json.dumps({{'seed': seed, 'findings': ['seed is %d' % seed]}}))"
)


def write_notebook(
    folder: Path, name: str, *cells: str, parameters: str = PARAMETERS, tag: bool = True, finish: bool = True
) -> Path:
    """A notebook with a parameters cell, the given code cells and a last cell that writes its result."""
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]} if tag else {})
    sources = [*cells, FINISH.format(name=name)] if finish else list(cells)
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell(f"# {name}"), first, *map(nbformat.v4.new_code_cell, sources)],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project folder with one parameter file, as the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake.yaml").write_text("experiment: fake\nseed: 7\n")
    return tmp_path


def run_folder(project: Path) -> Path:
    return project / "outputs" / "fake" / "default"


def test_run_executes_in_order_and_leaves_copies_results_states_and_report(project):
    write_notebook(project / "notebooks", "02_second", "print('later')")
    write_notebook(project / "notebooks", "01_first", "import sys; print(sys.executable)")
    lines = []

    report = run_experiment("fake.yaml", notebooks="notebooks", echo=lines.append)

    assert report.ok and [state.name for state in report.notebooks] == ["01_first", "02_second"]
    assert json.loads((run_folder(project) / "01_first.json").read_text())["seed"] == 7
    copy = nbformat.read(run_folder(project) / "01_first.ipynb", as_version=4)
    assert all(cell.execution_count for cell in copy.cells if cell.cell_type == "code")
    assert f"      {sys.executable}" in lines, "the kernel must be this interpreter, and its output must be heard"
    assert "seed is 7" in report.report.read_text()
    assert not list(run_folder(project).glob(".*.partial*"))


def test_misspelt_key_in_the_file_is_named_before_anything_runs(project):
    write_notebook(project / "notebooks", "01_first")
    (project / "fake.yaml").write_text("max_new_token: 3\n")

    with pytest.raises(ParameterError, match=r"'max_new_token'.*did you mean 'max_new_tokens'"):
        run_experiment("fake.yaml", notebooks="notebooks")

    assert not (project / "outputs").exists()


def test_missing_file_is_named_before_anything_runs(project):
    write_notebook(project / "notebooks", "01_first", parameters=PARAMETERS + '\nprompts_file: str = "demo"')
    (project / "prompts.jsonl").write_text("")
    (project / "fake.yaml").write_text("prompts_file: prompt.jsonl\n")

    with pytest.raises(ParameterError, match=r"prompts_file.*did you mean .*prompts\.jsonl"):
        run_experiment("fake.yaml", notebooks="notebooks")


def test_lost_parameters_tag_is_refused(project):
    write_notebook(project / "notebooks", "01_first", tag=False)

    with pytest.raises(RunError, match=r"01_first\.ipynb: 0 cells carry the tag `parameters`"):
        run_experiment("fake.yaml", notebooks="notebooks")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("sed: int = 0", "did you mean 'seed'"),
        ("seed: int = len('abc')", "seed must be a plain literal"),
        ("for seed in [1]: pass", "may hold only"),
        ("seed: int =", "not Python"),
    ],
)
def test_parameters_cell_holds_known_names_and_literals_only(tmp_path, source, message):
    path = write_notebook(tmp_path, "01_first", parameters=source)

    with pytest.raises(RunError, match=message):
        parameter_defaults(path)


def test_line_with_two_equals_signs_is_read(tmp_path):
    path = write_notebook(tmp_path, "01_first", parameters='model_name: str = "a=b"  # x = y\nseed: int = 3')

    assert parameter_defaults(path) == {"model_name": "a=b", "seed": 3}


def test_failing_cell_keeps_its_evidence_and_later_notebooks_go_on(project):
    write_notebook(project / "notebooks", "01_first", "print('before')", "raise ValueError('no such thing')")
    write_notebook(project / "notebooks", "06_compare")
    lines = []

    report = run_experiment("fake.yaml", notebooks="notebooks", echo=lines.append)

    first, last = report.notebooks
    assert (first.state, last.state, report.ok) == ("failed", "ok", False)
    assert first.error == "ValueError: no such thing" and "no such thing" in first.traceback
    copy = nbformat.read(run_folder(project) / "01_first.ipynb", as_version=4)
    assert copy.cells[first.cell].source == "raise ValueError('no such thing')"
    assert copy.cells[-1].execution_count is None and copy.cells[-1].metadata.papermill.status == "pending"
    assert any("FAILED" in line and "no such thing" in line for line in lines)
    assert "no such thing" in report.report.read_text()


def test_notebook_whose_input_failed_is_skipped(project):
    write_notebook(project / "notebooks", "02_convert", "1 / 0")
    write_notebook(project / "notebooks", "04_throughput")
    write_notebook(project / "notebooks", "06_compare")

    report = run_experiment("fake.yaml", notebooks="notebooks", echo=lambda line: None)

    assert [state.state for state in report.notebooks] == ["failed", "skipped", "ok"]
    assert "02_convert" in report.notebooks[1].error


def test_comparison_is_skipped_where_nothing_was_measured_and_no_other_run_is_there(project):
    for name, *cells in (("02_convert", "1 / 0"), ("04_throughput",), ("05_evaluate",), ("06_compare",)):
        write_notebook(project / "notebooks", name, *cells)
    lines = []

    report = run_experiment("fake.yaml", notebooks="notebooks", echo=lines.append)
    other = run_experiment("fake.yaml", overrides={"run": "other"}, notebooks="notebooks", echo=lambda line: None)

    assert [state.state for state in report.notebooks] == ["failed", "skipped", "skipped", "skipped"]
    assert report.notebooks[-1].error == "needs 04_throughput or 05_evaluate, which has not succeeded"
    assert "FAILED: 02_convert, skipped 04_throughput, 05_evaluate, 06_compare; mend" in lines[-1]
    assert other.notebooks[-1].state == "ok"  # it may find something to compare in the first run


def test_killed_kernel_is_a_failure_that_names_the_cell(project):
    write_notebook(
        project / "notebooks",
        "01_first",
        "import os; os.write(2, b'last words'); os.kill(os.getpid(), 9)",
        "print('never')",
    )

    report = run_experiment("fake.yaml", notebooks="notebooks", echo=lambda line: None)

    state = report.notebooks[0]
    assert state.state == "failed" and "SIGKILL" in state.error and "memory" in state.error
    copy = nbformat.read(run_folder(project) / "01_first.ipynb", as_version=4)
    assert "os.kill" in copy.cells[state.cell].source
    assert copy.cells[state.cell].outputs[-1].output_type == "error"
    assert copy.cells[-1].metadata.papermill.status == "pending", "papermill alone would claim completed"


def test_sys_exit_is_no_success(project):
    write_notebook(project / "notebooks", "01_first", "import sys; sys.exit(0)", "print('never')")

    report = run_experiment("fake.yaml", notebooks="notebooks", echo=lambda line: None)

    assert report.notebooks[0].state == "failed" and "ended" in report.notebooks[0].error


def test_missing_result_file_is_no_success_even_when_an_old_one_lies_there(project):
    write_notebook(project / "notebooks", "01_first", "print('done')", finish=False)
    run_folder(project).mkdir(parents=True)
    (run_folder(project) / "01_first.json").write_text("{}")

    report = run_experiment("fake.yaml", notebooks="notebooks", resume=True, echo=lambda line: None)

    assert report.notebooks[0].state == "failed" and "01_first.json" in report.notebooks[0].error


def test_existing_run_is_refused_unless_resume_or_overwrite(project):
    write_notebook(project / "notebooks", "01_first")
    run_experiment("fake.yaml", notebooks="notebooks", echo=lambda line: None)
    (run_folder(project) / "rows.jsonl").write_text("{}\n")

    with pytest.raises(RunError, match=r"--resume.*--overwrite"):
        run_experiment("fake.yaml", notebooks="notebooks", echo=lambda line: None)
    report = run_experiment("fake.yaml", notebooks="notebooks", overwrite=True, echo=lambda line: None)

    assert report.ok and not (run_folder(project) / "rows.jsonl").exists()


def test_overwrite_does_not_delete_a_folder_that_is_no_run(project):
    write_notebook(project / "notebooks", "01_first")
    run_folder(project).mkdir(parents=True)
    (run_folder(project) / "thesis.txt").write_text("precious")

    with pytest.raises(RunError, match="not deleted"):
        run_experiment("fake.yaml", notebooks="notebooks", overwrite=True, echo=lambda line: None)

    assert (run_folder(project) / "thesis.txt").exists()


def test_resume_repeats_only_what_failed_or_lost_its_evidence(project):
    for name in ("01_first", "03_third"):
        write_notebook(project / "notebooks", name, f"open('log.txt', 'a').write('{name} ')")
    write_notebook(
        project / "notebooks",
        "02_second",
        "import pathlib; open('log.txt', 'a').write('02 ')",
        "assert pathlib.Path('mended').exists()",
    )
    assert not run_experiment("fake.yaml", notebooks="notebooks", echo=lambda line: None).ok
    (project / "mended").touch()
    (run_folder(project) / "03_third.json").unlink()

    report = run_experiment("fake.yaml", notebooks="notebooks", resume=True, echo=lambda line: None)

    assert report.ok
    assert (project / "log.txt").read_text() == "01_first 02 03_third 02 03_third "


def test_resume_with_other_parameters_of_a_finished_notebook_is_refused(project):
    write_notebook(project / "notebooks", "01_first", parameters=PARAMETERS + "\nbatch_size: int = 16")
    run_experiment("fake.yaml", notebooks="notebooks", echo=lambda line: None)

    with pytest.raises(RunFolderError, match=r"batch_size: 16 -> 8"):
        run_experiment(
            "fake.yaml", notebooks="notebooks", resume=True, overrides={"batch_size": 8}, echo=lambda line: None
        )


def test_an_alarm_is_told_counts_as_done_and_gives_no_success(project):
    raises = (
        "from ascend_kit import RunFolder\nfrom ascend_kit.params import build_experiment\n"
        "values = {'experiment': experiment, 'run': run, 'output_root': output_root, 'seed': seed}\n"
        "with RunFolder.open(build_experiment(values), '05_evaluate') as opened:\n"
        "    opened.alarm('chance', 'what guessing gives')"
    )
    write_notebook(project / "notebooks", "05_evaluate", raises)
    write_notebook(project / "notebooks", "06_compare")
    lines = []

    report = run_experiment("fake.yaml", notebooks="notebooks", echo=lines.append)
    again = run_experiment("fake.yaml", notebooks="notebooks", resume=True, echo=lines.append)

    assert [stage.state for stage in report.notebooks] == ["alarm", "ok"]
    assert report.state == again.state == "alarm" and not report.ok
    assert "      ALARM what guessing gives" in lines and "[1/2] 05_evaluate: done before" in lines


def test_only_takes_prefixes_and_names_the_closest_for_a_wrong_one(project):
    write_notebook(project / "notebooks", "01_first", "print('one')")
    write_notebook(project / "notebooks", "02_second", "print('two')")

    report = run_experiment("fake.yaml", notebooks="notebooks", only=["02"], echo=lambda line: None)
    with pytest.raises(RunError, match="did you mean '01_first'"):
        run_experiment("fake.yaml", notebooks="notebooks", only=["01_frist"], resume=True, echo=lambda line: None)

    assert [state.name for state in report.notebooks] == ["02_second"]


@pytest.mark.multiproc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ended_run_leaves_no_kernel_and_resumes_with_the_missing_part(project, number):
    write_notebook(project / "notebooks", "01_first", "open('log.txt', 'a').write('one ')")
    write_notebook(
        project / "notebooks",
        "02_second",
        "import os, pathlib, time",
        "pathlib.Path('pid.part').write_text(str(os.getpid())); os.replace('pid.part', 'pid')",
        "while not pathlib.Path('go').exists(): time.sleep(0.05)",
    )
    command = [sys.executable, "-m", "ascend_kit", "run", "fake.yaml", "--notebooks", "notebooks"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    kernel = int(_wait_for(lambda: (project / "pid").exists() and (project / "pid").read_text()))

    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    _wait_for(lambda: not _alive(kernel))
    (project / "go").touch()
    report = run_experiment("fake.yaml", notebooks="notebooks", resume=True, echo=lambda line: None)

    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number], output
    assert report.ok and (project / "log.txt").read_text() == "one "


@pytest.mark.multiproc
def test_interrupted_notebook_is_kept_and_marked(project):
    write_notebook(
        project / "notebooks",
        "01_first",
        "import os, time; print('begun')",
        "os.kill(os.getppid(), 15); time.sleep(60)",
    )

    with pytest.raises(KeyboardInterrupt):
        run_experiment("fake.yaml", notebooks="notebooks", echo=lambda line: None)

    assert RunRecord.read(run_folder(project)).stages["01_first"].state == "interrupted"
    copy = nbformat.read(run_folder(project) / "01_first.ipynb", as_version=4)
    assert copy.cells[3].outputs[0].text == "begun\n"
    assert copy.cells[4].outputs[-1].ename == "KeyboardInterrupt"


def test_two_runs_of_one_stage_exclude_each_other(project):
    import fcntl

    write_notebook(project / "notebooks", "01_first")
    run_folder(project).mkdir(parents=True)
    with open(run_folder(project) / ".01_first.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        with pytest.raises(RunFolderError, match="in use by another process"):
            run_experiment("fake.yaml", notebooks="notebooks", echo=lambda line: None)


def test_a_run_that_fills_the_disk_says_so_in_its_record(tmp_path):
    with changing(tmp_path) as record:
        record.stages = {"01_first": Stage("01_first", "running"), "02_second": Stage("02_second", "waiting")}
    locks = [StageLock(tmp_path, "01_first"), StageLock(tmp_path, "02_second")]

    with pytest.raises(OSError, match="No space left"), _room_for_the_end(tmp_path):
        assert (tmp_path / ".reserve").stat().st_blocks * 512 >= 1 << 20, "space that is only named is not there later"
        raise OSError(errno.ENOSPC, "No space left on device", "outputs/rows.jsonl")

    stages = RunRecord.read(tmp_path).stages
    assert (stages["01_first"].state, stages["02_second"].state) == ("failed", "interrupted")
    assert stages["01_first"].error.startswith("outputs/rows.jsonl: no space is left on the device")
    assert not (tmp_path / ".reserve").exists()
    for lock in locks:
        lock.close()


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _wait_for(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError("waited in vain")
