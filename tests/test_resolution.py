"""What pip would install for each supported Python on x86 and aarch64: dry runs against the package index, wheels only.

torch is left out for another machine than this one: its CPU build lies on an index of its own.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE_ONLY = ("sqlitedict", "rouge-score", "word2number", "langdetect")  # of lm-eval; pip builds them for its Python

BUILT = (*SOURCE_ONLY, "torch")
GLIBC = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_26", "manylinux_2_17", "manylinux2014", "manylinux_2_12",
         "manylinux_2_5", "manylinux1")  # fmt: skip

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def pip(*words):
    return subprocess.run([sys.executable, "-m", "pip", *words], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheels of what has none on the index."""
    folder = tmp_path_factory.mktemp("wheels")
    done = pip("wheel", "--quiet", "--no-deps", f"--wheel-dir={folder}", *SOURCE_ONLY)
    if done.returncode:
        pytest.skip(f"no package index: {done.stderr.strip().splitlines()[-1]}")
    return folder


def test_python_3_13_finds_a_wheel_of_everything_a_server_needs(built, tmp_path):
    done = pip(
        "install", "--quiet", "--dry-run", "--ignore-installed", f"--target={tmp_path}", "--only-binary=:all:",
        f"--find-links={built}", "--python-version=3.13", ".[cluster,npu]",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", ["3.11.5", "3.12", "3.13"])
def test_every_pinned_package_has_a_wheel(python, machine, tmp_path):
    pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["npu"]
    names = [line for line in (*pinned, *extra) if re.split("[=<>]", line)[0].replace("_", "-") not in BUILT]
    done = pip(
        "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps", f"--target={tmp_path}",
        "--only-binary=:all:", f"--python-version={python}", *(f"--platform={tag}_{machine}" for tag in GLIBC), *names,
    )  # fmt: skip
    if "No matching distribution" not in done.stderr and done.returncode:
        pytest.skip(f"no package index: {done.stderr.strip().splitlines()[-1]}")

    assert done.returncode == 0, done.stderr[-2000:]
