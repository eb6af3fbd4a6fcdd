"""Files, notebooks, commands and modules that a text of the project names are there: no remedy leads nowhere."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from ascend_kit.__main__ import main
from ascend_kit.run.checks import find_notebooks

ROOT = Path(__file__).parents[1]
KINDS = (".py", ".md", ".yaml", ".yml", ".po", ".ipynb", ".sh", ".toml", ".txt")
WRITTEN_WHERE_NAMED = {"params/tiny.yaml"}
FOLDERS = "ascend_kit|benchmarks|notebooks|params|tests"


def named(pattern: str) -> dict[str, str]:
    """What matches in the texts that users read or run -> the first file that says it."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    found: dict[str, str] = {}
    for name in tracked:
        if name == "Makefile" or (name.endswith(KINDS) and not name.startswith("tests/")):
            for match in re.findall(pattern, (ROOT / name).read_text(encoding="utf-8")):
                found.setdefault(match, name)
    return found


def test_every_file_that_a_text_names_exists():
    files = named(rf"(?<![\w./<-])((?:{FOLDERS})/[\w./-]+\.(?:py|ya?ml|ipynb|md|sh|csv|po)|environment\.yml)\b")

    missing = {
        path: where for path, where in files.items() if not (ROOT / path).exists() and path not in WRITTEN_WHERE_NAMED
    }

    assert len(files) > 20
    assert missing == {}


def test_every_notebook_that_a_text_names_exists():
    notebooks = {notebook.name for notebook in find_notebooks()}

    assert {name: where for name, where in named(r"(?<![\w-])(0\d_[a-z]+)\b").items() if name not in notebooks} == {}


def test_every_command_and_module_that_a_text_names_exists():
    commands = named(r"python -m ascend_kit ([a-z]+)\b")
    for command in commands:
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0, commands[command]
    for module, where in named(r"python -m (ascend_kit(?:\.\w+)+)").items():
        assert importlib.util.find_spec(module), where
