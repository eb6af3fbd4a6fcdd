"""Put together what the simulated NPU needs, in `.npu-sim/`: torch_npu's wheel and the stub runtime.

The wheel stays out of the main environment, because `import torch` fails where torch_npu is installed
without CANN. `python tests/npu_sim/install.py` does the whole installation and prints where it is.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
HOME = Path(os.environ.get("NPU_SIM_HOME", HERE.parent.parent / ".npu-sim"))
# 0.17.1 cannot start its own linker in some environments ("UnableToSpawnSelf"); drop the pin when a later
# one can.
ZIG = "ziglang==0.13.0"
# The libraries torch_npu is linked against or opens by name. The first holds every function.
LIBRARIES = ("ascendcl", "hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel", "opapi", "runtime")


class Unavailable(RuntimeError):
    """This machine cannot simulate an NPU; the message says why."""


def ensure() -> tuple[Path, Path]:
    """(folder with torch_npu, folder with the stub libraries), installed on first use. Raises Unavailable."""
    if platform.system() != "Linux":
        raise Unavailable("torch_npu exists for Linux only")
    HOME.mkdir(parents=True, exist_ok=True)
    with _locked(HOME / ".lock"):
        return _torch_npu(), _stub()


def _torch_npu() -> Path:
    import torch

    version = torch.__version__.split("+")[0]
    folder = HOME / f"torch_npu-{version}-py{sys.version_info.major}{sys.version_info.minor}"
    if not folder.is_dir():
        _pip_install(f"torch-npu=={version}", folder)
    return folder


def _stub() -> Path:
    compiler = _compiler()
    sources = [HERE / "cann_stub.c", HERE / "cann_noops.h"]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + " ".join(compiler).encode()).hexdigest()
    folder = HOME / f"stub-{platform.machine()}-{key[:12]}"
    if not folder.is_dir():
        with _new_folder(folder) as partial:
            _build(compiler, partial)
    return folder


def _build(compiler: list[str], folder: Path) -> None:
    first, *others = LIBRARIES
    empty = folder / "empty.c"
    empty.touch()
    shared = [*compiler, "-w", "-O1", "-shared", "-fPIC"]
    jobs = [[*shared, f"-Wl,-soname,lib{first}.so", "-o", f"lib{first}.so", str(HERE / "cann_stub.c")]]
    # A library opened by name must find the functions too: the others depend on the first and hold nothing.
    jobs += [
        [
            *shared,
            f"-Wl,-soname,lib{name}.so",
            "-Wl,-rpath,$ORIGIN",
            "-Wl,--no-as-needed",
            "-o",
            f"lib{name}.so",
            "empty.c",
            f"./lib{first}.so",
        ]
        for name in others
    ]
    for job in jobs:
        done = subprocess.run(job, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"the stub runtime does not compile: {' '.join(job)}\n{done.stderr[-2000:]}")


def _compiler() -> list[str]:
    """The system's C compiler, else the one in the `ziglang` package."""
    named = os.environ.get("CC")
    found = next((path for name in (named, "cc", "gcc", "clang") if name and (path := shutil.which(name))), None)
    if found:
        return [found]
    folder = HOME / "ziglang"
    if not folder.is_dir():
        try:
            _pip_install(ZIG, folder)
        except Unavailable as error:
            raise Unavailable(f"there is no C compiler (cc, gcc, clang), and {error}") from error
    return [str(folder / "ziglang" / "zig"), "cc"]


def _pip_install(requirement: str, folder: Path) -> None:
    with _new_folder(folder) as partial:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--target",
            str(partial),
            requirement,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"pip cannot install {requirement}: {done.stderr.strip()[-500:]}")


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all."""
    partial = Path(tempfile.mkdtemp(dir=HOME, prefix="partial-"))
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    print(*ensure(), sep="\n")
