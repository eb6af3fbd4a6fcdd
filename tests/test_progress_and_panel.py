"""Progress as lines headless and as a widget in the browser; the parameter form and its table."""

import pytest
import yaml

from ascend_kit.params import Experiment, load_experiment, notebook
from ascend_kit.show.panel import ParameterPanel, grouped
from ascend_kit.show.progress import Progress, in_browser


def test_headless_progress_is_plain_lines_and_always_ends_with_the_last(capsys):
    with Progress("work", browser=False) as progress:
        for done in range(1, 101):
            progress(done, 100, f"point {done}")

    lines = capsys.readouterr().out.splitlines()
    assert 1 <= len(lines) < 20, "a hundred quick steps must not fill the executed copy"
    assert lines[-1].startswith("work: 100/100 (100%)") and lines[-1].endswith("point 100")


def test_bytes_are_shown_in_megabytes(capsys):
    Progress("copy", browser=False)(5_000_000, 5_000_000, "bytes written")

    assert "5.0 MB/5.0 MB (100%)" in capsys.readouterr().out


def test_callback_without_text_and_with_zero_total_is_fine(capsys):
    Progress("none", browser=False)(0, 0)

    assert "none: 0/0 (100%)" in capsys.readouterr().out


def test_browser_progress_moves_a_bar_and_turns_red_on_failure():
    with pytest.raises(RuntimeError), Progress("work", browser=True) as progress:
        progress(1, 4, "<b>text</b>")
        raise RuntimeError("stop")

    assert progress._bar.bar.value == 0.25 and progress._bar.bar.bar_style == "danger"
    assert "<b>text</b>" in progress._bar.text.value


class TwoReplicas:
    """An engine whose replicas have done more at every look."""

    core, looks = object(), 0

    def stats(self):
        self.looks += 1
        row = {"state": "ready", "restarts": 0, "in_flight": 3, "finished": 5 * self.looks, "busy_s": 1.0 * self.looks}
        rows = [
            {**row, "replica": n, "card_names": [f"10.0.0.1 npu {n}"], "output_tokens": 100 * self.looks,
             "peak_memory_bytes": 2**30}
            for n in range(2)
        ]  # fmt: skip
        rows[1].update(state="starting", restarts=1)
        return {"replicas": rows}


def test_headless_progress_tells_of_all_replicas_in_one_line(capsys):
    progress = Progress("work", TwoReplicas(), browser=False)

    progress(10, 10, "point 10")

    assert capsys.readouterr().out.splitlines()[1] == (
        "  replicas  0: 5 done, 0 tokens/s; 1: starting, 1 restarts, 5 done, 0 tokens/s"
    )


def test_browser_progress_has_a_bar_per_replica(monkeypatch):
    monkeypatch.setattr("ascend_kit.show.progress.DRAW_EVERY_S", 0.0)
    progress = Progress("work", TwoReplicas(), browser=True)

    for done in range(3):
        progress(done, 10, "point")
    first, second = progress._replicas.bars

    assert first.bar.value == 1.0 and first.bar.bar_style == "" and second.bar.bar_style == "danger"
    assert first.text.value.startswith("10.0.0.1 npu 0: 3 in flight, 15 done, ") and first.text.value.endswith(
        "1.0 GiB at most"
    )
    assert second.text.value.startswith("10.0.0.1 npu 1: starting, 1 restarts, ")


def test_one_card_and_a_closed_engine_show_no_replicas(capsys):
    engine = TwoReplicas()
    engine.core = None

    Progress("work", engine, browser=False)(1, 1)

    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_kernel_without_a_session_name_is_headless(monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)

    assert not in_browser()


def test_every_parameter_has_one_place_in_the_form():
    keys = [key for group in grouped().values() for key in group]

    assert keys == list(Experiment.model_fields)


@pytest.fixture
def panel():
    """A function: the form of an Experiment; what was applied is forgotten afterwards."""

    def make(experiment, **options):
        shown = ParameterPanel(experiment, browser=True, **options)
        shown.widget()
        return shown

    yield make
    notebook.applied.clear()


def test_form_reads_yaml_and_names_the_fault_and_the_closest_word(panel):
    form = panel(Experiment())
    form.fields["eval_datasets"].value = "[mmlu, cevil]"

    message = form.check()
    form.fields["eval_datasets"].value = "mmlu,ceval"
    form.fields["graph_mode"].value = False
    form.fields["quantize"].value = "w8a8"

    assert message.startswith("not valid") and "did you mean ceval?" in message
    assert form.check().startswith("fine")
    assert form.experiment == Experiment(eval_datasets=["mmlu", "ceval"], graph_mode=False, quantize="w8a8")


def test_check_says_what_lies_behind_the_values(panel):
    def look(experiment):
        raise ValueError(f"nothing at {experiment.input_model}")

    form = panel(Experiment(), check=look)
    form.fields["input_model"].value = "/models/Qwen3-8B"

    assert form.check() == "not ready: nothing at /models/Qwen3-8B"
    assert form.experiment.model_name == "Qwen3-8B"


def test_a_name_that_was_typed_stays_when_the_model_comes_in_later(panel):
    form = panel(Experiment())
    form.fields["model_name"].value = "mine"
    form.fields["input_model"].value = "/models/Qwen3-8B"

    assert form.check().startswith("fine") and form.experiment.model_name == "mine"


def test_another_model_brings_its_name_and_its_experiment_along_until_one_is_typed(panel):
    form = panel(Experiment())
    form.fields["input_model"].value = "/models/Qwen3-8B"
    followed = [form.fields[name].value for name in ("model_name", "experiment")]
    form.fields["model_name"].value = "mine"
    named = form.fields["experiment"].value
    form.fields["experiment"].value = "trial"
    form.fields["model_name"].value = "other"

    assert followed == ["Qwen3-8B", "Qwen3-8B"] and named == "mine"
    assert form.fields["experiment"].value == "trial"


def test_applied_fields_are_the_notebooks_parameters_until_they_are_changed_back(panel):
    form = panel(Experiment(experiment="mine", concurrency=4))
    form.fields["concurrency"].value = "6"
    form.fields["top_k"].value = "5"

    message = form.apply()
    first = notebook.experiment_from_notebook({"experiment": "mine", "concurrency": 4})
    form.fields["concurrency"].value = "4"
    form.fields["top_k"].value = ""
    form.apply()
    second = notebook.experiment_from_notebook({"experiment": "mine", "concurrency": 4})

    assert "concurrency=6" in message and "top_k=5" in message
    assert (first.concurrency, first.top_k) == (6, 5)
    assert (second.concurrency, second.top_k) == (4, None)


@pytest.mark.parametrize("path", ["", "params", "/proc/mine.yaml"])
def test_a_file_that_cannot_be_written_is_one_line_and_nothing_is_left(panel, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params").mkdir()

    assert panel(Experiment()).save(path).startswith("not written: ")
    assert list(tmp_path.rglob("*.yaml*")) == []


def test_names_and_paths_are_taken_as_they_stand_and_an_empty_one_is_named(panel):
    form = panel(Experiment())
    form.fields["tokenizer_path"].value = "a: [b"
    form.fields["compare_runs"].value = "[1"
    assert form.check().startswith("not valid: the form: compare_runs: ")
    form.fields["compare_runs"].value = "[]"
    form.fields["device"].value = " "

    assert form.check() == "not valid: the form: device: must not be empty, got None"
    form.fields["device"].value = "cpu"
    form.check()
    assert form.experiment.tokenizer_path == "a: [b"


def test_wrong_fields_are_not_applied(panel):
    form = panel(Experiment())
    form.fields["concurrency"].value = "0"

    assert form.apply().startswith("not valid: the form: concurrency")
    assert not notebook.applied


def test_load_fills_the_fields_and_apply_gives_the_experiment_of_the_file(panel, tmp_path):
    (tmp_path / "mine.yaml").write_text("input_model: /models/a\nmodel_name: other\nsmooth: null\nthinking: false\n")
    form = panel(Experiment(seed=3))

    form.load(tmp_path / "mine.yaml")
    unused = not notebook.applied
    form.apply()

    assert unused and form.experiment == load_experiment(tmp_path / "mine.yaml")


def test_choices_are_drop_downs_and_none_is_an_empty_field(panel):
    fields = panel(Experiment()).fields

    assert fields["precision"].options == ("bf16", "fp16", "fp32")
    assert fields["thinking"].options == ("", "true", "false") and fields["thinking"].value == ""
    assert fields["top_k"].value == "" and fields["top_k"].placeholder == "none"


@pytest.mark.parametrize(
    "values",
    [
        {"experiment": "demo"},
        {"max_seq_length": 1500, "max_new_tokens": 1024},
        {"quantize": "auto", "max_kl": 0.1, "calibration_file": "texts.txt"},
        {"input_model": "/models/a", "model_name": "demo"},
    ],
)
def test_saved_form_gives_exactly_this_experiment(tmp_path, values):
    form = ParameterPanel(Experiment(**values), browser=False)

    form.save(tmp_path / "other.yaml")

    assert load_experiment(tmp_path / "other.yaml") == form.experiment == Experiment(**values)


def test_saved_form_holds_what_differs_and_loads_again(tmp_path):
    panel = ParameterPanel(Experiment(experiment="mine", seed=3), browser=False)

    message = panel.save(tmp_path / "mine.yaml")

    assert yaml.safe_load((tmp_path / "mine.yaml").read_text()) == {"experiment": "mine", "seed": 3}
    assert load_experiment(tmp_path / "mine.yaml") == panel.experiment
    assert "python -m ascend_kit run" in message


def test_headless_form_is_a_table_of_what_is_not_default():
    table = ParameterPanel(Experiment(seed=3, top_k=5), browser=False).table()

    assert dict(zip(table["parameter"], table["value"], strict=True)) == {"seed": "3", "top_k": "5"}


class Shown:
    """Stands for IPython's display handle: keeps what an output holds in the end."""

    def __init__(self):
        self.data = None

    def update(self, data, raw=False):
        self.data = data


def test_a_bar_that_has_ended_leaves_text_in_place_of_the_widget(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *_, display_id=False: shown.append(Shown()) or shown[-1])

    with Progress("work", TwoReplicas(), browser=True) as progress:
        progress(4, 4, "point 4")

    assert shown[0].data["text/plain"].startswith("work: 4/4 (100%)") and "point 4" in shown[0].data["text/plain"]
    assert "replica 0: 10.0.0.1 npu 0" in shown[1].data["text/plain"]


def test_the_form_in_a_saved_copy_is_a_table_for_who_has_no_kernel(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))

    ParameterPanel(Experiment(seed=3), browser=True)._ipython_display_()

    (data,) = shown
    assert "application/vnd.jupyter.widget-view+json" in data
    assert ">seed</td>" in data["text/html"] and "HBox(" not in data["text/plain"]
