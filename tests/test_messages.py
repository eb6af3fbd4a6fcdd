"""The catalogue: every text that the code asks for is there, in every language, with the same values."""

import ast
import string
from pathlib import Path

import pytest
from babel.messages.pofile import read_po
from IPython.core.interactiveshell import InteractiveShell

from ascend_kit.messages import LANGUAGES, Finding, keys, say, show_errors_in_one_line, translate

PACKAGE = Path(__file__).parents[1] / "ascend_kit"


def asked_for():
    """Keys written as a plain string in calls of say and translate."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("say", "translate") and node.args:
                yield from (n.value for n in ast.walk(node.args[0]) if isinstance(n, ast.Constant) and "." in n.value)


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
            "evaluation.", "explore.")  # fmt: skip


def test_no_key_is_missing_and_no_text_is_asked_for_by_nobody():
    asked = set(asked_for())

    assert {key for key in asked - keys() if not key.endswith((".", "_"))} == set()
    assert {key for key in keys() - asked if not key.startswith(FAMILIES)} <= {"text"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_has_every_key_with_the_same_values(language):
    assert dict(fields(language)) == dict(fields("en"))


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
