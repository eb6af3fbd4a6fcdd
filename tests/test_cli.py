"""The command line: exit status, one-line errors, and what each command does with a wrong request."""

import json
import subprocess
import sys
import time

import pytest
from test_run import run_folder, write_notebook

from ascend_kit.__main__ import main
from ascend_kit.params import Experiment


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake.yaml").write_text("experiment: fake\nseed: 7\n")
    return tmp_path


def test_run_returns_0_and_honours_set_run_and_only(project, capsys):
    write_notebook(project / "notebooks", "01_first")
    write_notebook(project / "notebooks", "02_second", "1 / 0")

    status = main(["run", "fake.yaml", "--notebooks", "notebooks", "--set", "seed=9", "--run", "other", "--only", "01"])

    assert status == 0
    result = json.loads((run_folder(project).parent / "other" / "01_first.json").read_text())
    assert result["seed"] == 9
    assert "report: outputs/fake/other/report.html" in capsys.readouterr().out


def test_failed_notebook_gives_1_and_says_where(project, capsys):
    write_notebook(project / "notebooks", "01_first", "1 / 0")

    status = main(["run", "fake.yaml", "--notebooks", "notebooks"])

    out = capsys.readouterr().out
    assert status == 1
    assert "FAILED in cell" in out and "ZeroDivisionError: division by zero" in out and "evidence:" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "fake.yaml", "--set", "max_new_token=3"], "did you mean 'max_new_tokens'"),
        (["run", "fake.yaml", "--set", "seed=abc"], "seed: Input should be a valid integer"),
        (["run", "fake.yaml", "--set", "seed"], "--set takes key=value, got 'seed'"),
        (["run", "fake.yaml", "--set", "precision=bf61"], "did you mean bf16?"),
        (["run", "fake.yml"], "did you mean fake.yaml?"),
        (["run", "fake.yaml", "--resume", "--overwrite"], "exclude each other"),
        (["run", "fake.yaml", "--only", "01_frist"], "did you mean '01_first'"),
        (["run", "fake.yaml", "--set", "run=a/b"], "it names a folder"),
        (["run", "fake.yaml", "--set", "prompts_file=none.txt"], "prompts_file: nothing at none.txt"),
        (["check", "fake.yaml", "--set", "tensor_parallel=3"], "does not divide cards=1"),
        (["check", "fake.yaml", "--set", "eval_datasets=['text:none.txt']"], "text:none.txt: cannot be read as UTF-8"),
        (["check", "fake.yaml", "--set", "eval_datasets=[mmlu, gsm8kk]"], "no task 'gsm8kk'; did you mean 'gsm8k'?"),
        (["check"], "name a parameter file"),
        (["convert", "fake.yaml", "--set", "framwork=megatron"], "did you mean 'framework'"),
        (["report", "nowhere"], "is no run folder"),
    ],
)
def test_wrong_request_gives_2_and_one_line(project, capsys, words, message):
    write_notebook(project / "notebooks", "01_first", parameters='prompts_file: str = "demo"\nexperiment: str = "fake"')
    notebooks = ["--notebooks", "notebooks"] if words[0] == "run" else []

    status = main([*words, *notebooks])

    captured = capsys.readouterr()
    assert status == 2
    assert message in captured.err and captured.err.count("\n") == 1
    assert not (project / "outputs").exists()


def test_check_lists_every_parameter(capsys):
    status = main(["check", "--list"])

    out = capsys.readouterr().out
    assert status == 0
    assert all(f"{name} = " in out for name in Experiment.model_fields)


def test_report_is_written_again(project, capsys):
    write_notebook(project / "notebooks", "01_first")
    main(["run", "fake.yaml", "--notebooks", "notebooks"])
    (run_folder(project) / "report.html").unlink()

    status = main(["report", str(run_folder(project))])

    assert status == 0 and (run_folder(project) / "report.html").is_file()


def test_a_wrong_key_is_reported_within_seconds_and_without_torch(project):
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "ascend_kit", "run", "fake.yaml", "--set", "sed=1"],
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 2 and "did you mean 'seed'" in done.stderr
    assert "| torch\n" not in done.stderr and "papermill" not in done.stderr
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["convert", "--help"], ["doctor", "--help"]])
def test_help_exits_with_0(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)

    assert ended.value.code == 0 and "usage" in capsys.readouterr().out


MODEL = ["--set", "input_model=model", "--set", "prompts_file=demo", "--set", "eval_datasets=[mmlu]"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "output_root=taken"], "a file"),
        (["--set", "prompts_file=wrong.jsonl"], "wrong.jsonl"),
        ([*MODEL, "--set", "dataset_path=data"], "config.json"),
        ([*MODEL, "--set", "dataset_path=data"], "mmlu"),
    ],
)
def test_check_and_run_look_into_files_and_folders_before_work(project, capsys, words, message):
    declared = "".join(f'\n{name}: str = "demo"' for name in ("prompts_file", "input_model", "dataset_path"))
    write_notebook(project / "notebooks", "01_first", parameters='experiment: str = "fake"' + declared)
    (project / "taken").write_text("")
    (project / "wrong.jsonl").write_text('{"question": "no prompt field"}\n')
    (project / "model").mkdir()
    (project / "data" / "mmlu" / "test").mkdir(parents=True)
    (project / "data" / "mmlu" / "test" / "anatomy_test.csv").write_text("q,a,b,c,d,A\n")

    status = main(["run", "fake.yaml", "--notebooks", "notebooks", *words])

    assert status == 2 and message in capsys.readouterr().err
    assert not (project / "outputs").exists()


@pytest.mark.parametrize("quantize", ["w8a8", "none"])
@pytest.mark.parametrize(
    ("model", "words"), [("demo", ["check"]), ("demo", ["run", "--only", "02"]), ("own", ["run", "--only", "02"])]
)
def test_quantize_keep_that_names_nothing_is_refused_before_work(
    project, tiny_qwen3_dir, capsys, model, words, quantize
):
    own = f"input_model: {tiny_qwen3_dir}\nmax_seq_length: 128\nprompts_file: prompts.txt\n"
    (project / "prompts.txt").write_text("Hello\n")
    (project / "x.yaml").write_text(
        f"experiment: x\nquantize: {quantize}\nquantize_keep: [down_projj]\n" + (own if model == "own" else "")
    )

    status = main([words[0], "x.yaml", *words[1:]])

    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and not (project / "outputs").exists()
    assert "quantize_keep: 'down_projj' names no linear of this model; did you mean 'down_proj'?" in error
