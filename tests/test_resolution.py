"""What pip would install for the newest supported Python: a dry run against the package index, wheels only."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE_ONLY = ("sqlitedict", "rouge-score", "word2number")  # of lm-eval; pip builds them for its own Python only

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
