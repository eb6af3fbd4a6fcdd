"""The catalogue: every text that the code asks for is there, in every language, with the same values."""

import ast
import json
import re
import string
from pathlib import Path

import pytest
from babel.messages.pofile import read_po
from IPython.core.interactiveshell import InteractiveShell

from ascend_kit.messages import LANGUAGES, Finding, keys, phrase, say, show_errors_in_one_line, translate, use_language
from ascend_kit.params import Experiment
from ascend_kit.show.explore import AXES
from ascend_kit.show.panel import GROUPS

PACKAGE = Path(__file__).parents[1] / "ascend_kit"


def asked_for():
    """Keys written as a plain string in calls of say and translate."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("say", "translate") and node.args:
                yield from (n.value for n in ast.walk(node.args[0]) if isinstance(n, ast.Constant) and "." in n.value)


def catalogue(name):
    """Key -> its texts."""
    with open(PACKAGE / "locale" / f"{name}.po", "rb") as file:
        return {message.id: message.string for message in read_po(file) if message.id}


def fields(language):
    with open(PACKAGE / "locale" / f"{language}.po", "rb") as file:
        for message in read_po(file):
            texts = message.string if isinstance(message.string, (list, tuple)) else [message.string]
            key = message.id if isinstance(message.id, str) else message.id[0]
            yield (
                key,
                {name.split("[")[0] for text in texts for _, name, _, _ in string.Formatter().parse(text) if name},
            )


# The last words of these keys come from data or stand in the report's template.
FAMILIES = ("parity.", "sweep.shared_", "scores.", "state.", "number.", "about.", "index.", "report.", "verdict.only_",
            "evaluation.", "explore.", "facts.", "panel.", "level.")  # fmt: skip


def test_no_key_is_missing_and_no_text_is_asked_for_by_nobody():
    asked = set(asked_for())

    assert {key for key in asked - keys() if not key.endswith((".", "_"))} == set()
    assert {key for key in keys() - asked if not key.startswith(FAMILIES)} <= {"text"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_has_every_key_with_the_same_values(language):
    assert dict(fields(language)) == dict(fields("en"))


def chart_texts():
    """Titles, axes, labels and captions that stand in the code as a plain string."""
    for path in [*(PACKAGE / "show").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            place = {"finish": 1, "value_axis": 1, "set_xlabel": 0, "set_ylabel": 0, "keep": 2, "_keep": 2}.get(name)
            texts = [node.args[place]] if place is not None and len(node.args) > place else []
            texts += [keyword.value for keyword in node.keywords if keyword.arg == "label"]
            yield from (text.value for text in texts if isinstance(text, ast.Constant) and text.value)


def phrases_asked_for():
    notebooks = [json.loads(path.read_text()) for path in (PACKAGE.parent / "notebooks").glob("*.ipynb")]
    for cell in (cell for notebook in notebooks for cell in notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield source
        yield from re.findall(r'charts\.keep\(.*"(.*)"\s*\)', source, re.DOTALL)
    yield from (field.description for field in Experiment.model_fields.values())
    yield from chart_texts()
    yield from (*AXES, *GROUPS)


@pytest.mark.parametrize("language", [name for name in LANGUAGES if name != "en"])
def test_every_language_has_the_prose_of_the_notebooks_the_charts_and_the_meaning_of_every_parameter(language):
    known = catalogue(f"phrases.{language}")

    assert [text for text in phrases_asked_for() if not known.get(text) and re.search("[a-z]{3}", text)] == []


def test_a_text_with_numbers_is_found_by_its_pattern_and_an_unknown_one_stays():
    assert phrase("prompt 1,024, output 32 tokens", "zh") == "提示 1,024、输出 32 个 token"
    assert phrase("prompt 1 of 2", "zh") == "prompt 1 of 2" and phrase("", "zh") == ""


def test_the_language_in_use_is_that_of_findings_but_their_file_keeps_english():
    use_language("zh")
    try:
        finding = say("doctor.fine", count=2)
        assert str(finding) == "2 项检查，无需处理。" and finding.to_row()["text"] == "2 checks, nothing to mend."
    finally:
        use_language("en")
    with pytest.raises(ValueError, match="allowed: en, zh"):
        use_language("fr")


def test_a_finding_survives_the_file_and_an_unknown_key_keeps_its_text():
    finding = say("doctor.fine", count=26)

    assert Finding.from_row(finding.to_row()) == finding
    assert str(finding) == "26 checks, nothing to mend." and translate("doctor.fine", count=1).startswith("1 check,")
    assert str(Finding.from_row({**finding.to_row(), "key": "gone.since"})) == str(finding)
    with pytest.raises(KeyError, match=r"nobody\.knows"):
        say("nobody.knows")


def test_values_with_braces_are_text():
    assert str(say("batch.failed", "failed", index=1, error="{evil} {0}")) == "Prompt 1 failed: {evil} {0}"


@pytest.fixture
def shell():
    """An IPython shell that `get_ipython` gives, as in a kernel."""
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


def test_what_a_user_can_mend_is_one_line_without_frames_and_other_errors_keep_theirs(shell, capsys):
    show_errors_in_one_line()

    shell.run_cell("from ascend_kit.params import load_experiment; load_experiment('nowhere.yaml')")
    mendable = capsys.readouterr().out.strip()
    result = shell.run_cell("def inner():\n    return 1 / 0\ninner()")
    other = capsys.readouterr().out

    assert len(mendable.splitlines()) == 1 and "ParameterError" in mendable and "nowhere.yaml" in mendable
    assert len(other.splitlines()) > 5 and isinstance(result.error_in_exec, ZeroDivisionError)
