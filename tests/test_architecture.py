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


def test_parameters_and_results_do_not_import_torch():
    code = "import sys, ascend_kit.params, ascend_kit.results; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


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
