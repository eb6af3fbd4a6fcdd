"""The Chinese README says what the English one says: the same commands and numbers, the package's own defaults."""

import re
from pathlib import Path

from ascend_kit.messages import phrase
from ascend_kit.params import Experiment
from ascend_kit.run.checks import find_notebooks

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
LANGUAGE = re.compile(r" --run zh --set language=zh| --set language=zh")  # what only the Chinese page asks for


def commands(text):
    """The lines of its shell blocks without comments, and the commands in its prose."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    lines = [re.sub(r"\s+#.*", "", LANGUAGE.sub("", line)).strip() for line in blocks.splitlines()]
    prose = re.findall(r"`((?:python|make|source) [^`]+)`", LANGUAGE.sub("", text))
    return {" ".join(line.split()) for line in [*lines, *prose] if line}


def numbers(text):
    """Numbers of the prose: neither of commands nor of the tables of parameters and exit states."""
    text = re.sub(r"```.*?```|`[^`]*`|^\|.*$", "", text, flags=re.DOTALL | re.MULTILINE)
    return set(re.findall(r"\d[\d.,]*\d|\d", text))


def test_every_command_of_the_chinese_page_stands_in_the_english_one():
    assert commands(CHINESE) - commands(ENGLISH) == set()
    assert {"make demo", "make test", "make lab"} <= commands(CHINESE)


def test_every_number_of_the_chinese_prose_stands_in_the_english_one():
    assert numbers(CHINESE) - numbers(ENGLISH) == set()
    assert ENGLISH.split("```sh")[1].split("```")[0].count("3.13") == CHINESE.split("```sh")[1].split("```")[0].count(
        "3.13"
    )


def test_exit_states_notebooks_and_parameters_are_those_of_the_package():
    states = [re.findall(r"^\| ((?:\d+(?:, )?)+) \|", text, re.MULTILINE) for text in (ENGLISH, CHINESE)]
    table = re.findall(r"^\| `(\w+)` \| `(.*)` \| (.*) \|$", CHINESE, re.MULTILINE)

    assert states[1] == states[0]
    assert re.findall(r"^\| `(0\d_\w+)`", CHINESE, re.MULTILINE) == [notebook.name for notebook in find_notebooks()]
    for name, default, meaning in table:
        field = Experiment.model_fields[name]
        assert (default, meaning) == (str(field.default), phrase(field.description, "zh")), name
    assert len(table) >= 20
