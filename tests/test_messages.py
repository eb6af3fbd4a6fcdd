"""The catalogue: every text that the code asks for is there, in every language, with the same values."""

import ast
import json
import re
import string
from pathlib import Path

import pytest
from babel.messages.pofile import read_po
from IPython.core.interactiveshell import InteractiveShell

import ascend_kit
from ascend_kit.doctor import network
from ascend_kit.messages import LANGUAGES, Finding, keys, phrase, say, show_errors_in_one_line, translate, use_language
from ascend_kit.params import Experiment
from ascend_kit.show import tables
from ascend_kit.show.explore import AXES
from ascend_kit.show.panel import GROUPS

PACKAGE = Path(__file__).parents[1] / "ascend_kit"
NAMES = ("mbu", "mfu")  # words that no language translates


def asked_for():
    """Keys written as a plain string in calls of say and translate."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("say", "translate") and node.args:
                words = (n.value for n in ast.walk(node.args[0]) if isinstance(n, ast.Constant))
                yield from (word for word in words if isinstance(word, str) and "." in word)


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
            "evaluation.", "explore.", "facts.", "panel.", "level.", "profile.")  # fmt: skip


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
            texts += [keyword.value for keyword in node.keywords if keyword.arg in ("label", "xlabel", "ylabel")]
            yield from (text.value for text in texts if isinstance(text, ast.Constant) and text.value)


def parts_of(text):
    """An f-string with {} in place of what varies, a plain string as it is; None for anything else."""
    if isinstance(text, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in text.values)
    return text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else None


def doctor_texts():
    """What the doctor's checks say in words: evidence, remedies and tips."""
    yield from (remedy for *_, remedy in network._CARD_CHECKS if not remedy.startswith("hccn_tool"))
    for path in (PACKAGE / "doctor").glob("*.py"):
        if path.stem in ("command", "first_run", "comparison"):  # for a terminal, which stays English
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            is_check = isinstance(node, ast.Call) and getattr(node.func, "attr", "") in (
                "ok",
                "warn",
                "fail",
                "na",
                "add",
                "judge",
            )
            found = node.args[1:] if is_check else []
            words = ("remedy", "evidence", "reason", "tip")
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in words:
                found = [node.value]
            for text in (
                text for one in found for text in ([one.body, one.orelse] if isinstance(one, ast.IfExp) else [one])
            ):
                if (said := parts_of(text)) and re.search("[a-z]{3,} [a-z]{2,}", said.replace("{}", "")):
                    yield said


def columns():
    yield from (*tables.SWEEP, *tables.EXPECTED, *tables.SCORES, *tables.PAIRED, *tables.VERDICT, *tables.ANSWERS)
    yield from (*tables.CHECKS, *tables.BEST, *tables.OPERATORS)


def phrases_asked_for():
    yield from doctor_texts()
    notebooks = [json.loads(path.read_text()) for path in (PACKAGE.parent / "notebooks").glob("*.ipynb")]
    for cell in (cell for notebook in notebooks for cell in notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield source
        yield from re.findall(r'charts\.keep\(.*"(.*)"(?:,\s*of_this_run=False,)?\s*\)', source, re.DOTALL)
    yield from (field.description for field in Experiment.model_fields.values())
    yield from chart_texts()
    yield from (*AXES, *GROUPS)
    yield from ("running", "interrupted", "failed", "alarm", "ok")  # states of a run


@pytest.mark.parametrize("language", [name for name in LANGUAGES if name != "en"])
def test_every_language_has_the_prose_of_the_notebooks_the_charts_and_the_meaning_of_every_parameter(language):
    known = catalogue(f"phrases.{language}")

    assert [text for text in phrases_asked_for() if not known.get(text) and re.search("[a-z]{3}", text)] == []
    assert [name for name in columns() if phrase(name, language) == name and name not in NAMES] == []


def test_in_chinese_no_line_ends_within_a_paragraph_where_it_would_be_shown_as_a_blank():
    texts = [text for key, text in catalogue("phrases.zh").items() if "(blue: " not in key]  # titles of two lines

    signs = "[\u3000-\u9fff\uff00-\uffef\u201c\u201d]"
    assert [text for text in texts if re.search(f"{signs}\n *{signs}", text)] == []


def test_an_alarm_that_a_run_record_keeps_in_english_is_told_in_chinese_alone_and_inside_a_verdict():
    judge = (PACKAGE / "evaluation/judge.py").read_text()
    alarms = re.findall(r'say\("(evaluation\.\w+)", (?:"alarm"|level)', judge)
    assert len(alarms) >= 9
    for key in alarms:
        parts = [part for part in string.Formatter().parse(translate_raw(key)) if part[1]]
        values = {name: 0.5 if spec else "mmlu" for _, name, spec, _ in parts}
        finding = Finding(key, values)
        english, chinese = finding.text("en"), finding.text("zh")

        assert "; " not in english and phrase(english, "zh") == chinese
        assert (
            phrase(f"baseline; alarm: {english}", "zh")
            == f"{phrase('baseline', 'zh')}; {phrase('alarm: x', 'zh')[:-1]}{chinese}"
        )


def translate_raw(key):
    return catalogue("en")[key]


def test_a_text_with_numbers_is_found_by_its_pattern_and_an_unknown_one_stays():
    assert phrase("prompt 1,024, output 32 tokens", "zh") == "提示 1,024、输出 32 个 token"
    assert phrase("prompt 1 of 2", "zh") == "prompt 1 of 2" and phrase("", "zh") == ""
    assert phrase("1,024 requests", "zh") == "1,024 个请求" and phrase("more requests", "zh") == "more requests"
    assert phrase("23 tokens for prompt 7", "zh") == "提示 7：23 个 token"


def test_parts_of_a_sentence_are_looked_up_themselves():
    said = "CANN 9.1, driver 25.5, newer than row TorchNPU 26; alarm: no document in common"

    assert phrase(said, "zh") == "CANN 9.1，驱动 25.5，比表中一行 TorchNPU 26 新; 警报：没有共同的题"
    empty = "alarm: 3 of 32 answers are empty (prompts 1, 2, 5)"
    assert phrase(empty, "zh") == "警报：32 个回答中有 3 个为空（提示 1, 2, 5）"
    lacking = "No verdict: the baseline a lacks something (no evaluation: run 05_evaluate; failed tasks: b)."
    assert phrase(lacking, "zh") == "没有裁决：基线 a 有所缺（无评测：请运行 05_evaluate; 失败的任务：b）。"
    found = say("doctor.check", "failed", check="numpy", evidence="not installed", remedy="name every card once")
    assert "未安装" in found.text("zh") and "每张卡只写一次" in found.text("zh")
    assert "not installed" in found.text("en")


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


def test_an_import_that_was_interrupted_is_not_tried_again_but_a_restart_asked_for(monkeypatch):
    def stop(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(ascend_kit, "_interrupted", [])
    monkeypatch.delitem(vars(ascend_kit), "run_sweep", raising=False)
    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(ascend_kit, "import_module", stop)
        _ = ascend_kit.run_sweep

    with pytest.raises(ImportError, match="import of run_sweep was interrupted and cannot go on: restart the kernel"):
        _ = ascend_kit.run_sweep
