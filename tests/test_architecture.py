"""Who may import whom: a module imports from its own floor or below."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ascend_kit"
FLOORS = [
    {"files", "messages"},
    {"identity", "params", "prompts"},
    {"stages"},
    {"results"},
    {"device"},
    {"model"},
    {"checkpoint"},
    {"engine"},
    {"measure"},
    {"evaluation"},
    {"demo", "doctor", "serve", "show"},
    {"run", "__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        rooms |= {name.split(".")[1] for name in names if name.startswith("ascend_kit.")}
    return rooms & set(LEVEL)


def test_every_module_stands_on_a_known_floor():
    assert {room_of(path) for path in MODULES} - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_points_up(path):
    if room_of(path) == "__init__":
        return
    level = LEVEL[room_of(path)]

    upward = {room for room in imported_rooms(path) if LEVEL[room] > level}

    assert not upward, f"{path.name} on floor {level} imports {sorted(upward)}"


def test_what_needs_no_model_imports_no_torch():
    """The command line answers at once, and results are read and shown where torch may not even be installed."""
    code = """
import importlib, json, pathlib, sys
import ascend_kit.__main__, ascend_kit.params, ascend_kit.results, ascend_kit.run.experiment, ascend_kit.show.report
for name in ("03_generate", "04_throughput", "05_evaluate", "06_compare", "07_explore"):
    cells = json.loads(pathlib.Path("notebooks", name + ".ipynb").read_text())["cells"]
    last = [cell for cell in cells if any("import ascend_kit" in line for line in cell["source"])][-1]
    exec("".join(line for line in last["source"] if line.startswith(("from ascend_kit", "import ascend_kit"))))
    assert "torch" not in sys.modules, name
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_tokenizer_config_or_model_is_loaded_with_code_of_its_own():
    calls = [
        (path, node)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
        and ast.unparse(node.func.value).split(".")[-1].startswith("Auto")
    ]

    trusting = [
        f"{path.name}, line {node.lineno}"
        for path, node in calls
        if not any(word.arg == "trust_remote_code" and ast.unparse(word.value) == "False" for word in node.keywords)
    ]

    assert calls and not trusting


def test_torch_npu_is_named_only_by_device_and_doctor():
    outside = [
        path
        for path in MODULES
        if room_of(path) not in ("device", "doctor")
        and any(
            isinstance(node, (ast.Import, ast.ImportFrom)) and "torch_npu" in ast.dump(node)
            for node in ast.walk(ast.parse(path.read_text()))
        )
    ]

    assert not outside


def test_the_readme_lists_the_rooms_of_the_package_and_the_folders_of_the_project():
    block = (ROOT / "README.md").read_text().split("## Layout")[1].split("```")[1]
    listed = re.findall(r"^(\s*)((?:\w+/?, )*\w+/?)  ", block, re.MULTILINE)
    names = {name.strip("/") for _, names in listed for name in names.split(", ")}
    ours = {room_of(path) for path in MODULES} - {"__init__", "__main__"}

    assert ours <= names
    assert [name for name in sorted(names - ours) if not (ROOT / name).is_dir()] == []
