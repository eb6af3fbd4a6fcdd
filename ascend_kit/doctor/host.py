"""Everything the doctor asks of the machine, behind one small object that tests replace by data.

Knows nothing about Ascend: it runs commands, reads files and looks up package versions, and never raises for
something that is merely absent.
"""

from __future__ import annotations

import contextlib
import glob
import grp
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement


@dataclass(frozen=True)
class CommandResult:
    """Outcome of a command; `code` is None when it did not start or was stopped, and `problem` says why."""

    code: int | None
    stdout: str = ""
    stderr: str = ""
    problem: str = ""

    @property
    def is_ok(self) -> bool:
        return self.code == 0

    @property
    def text(self) -> str:
        """Both streams and the problem, for matching against known errors."""
        return "\n".join(part for part in (self.stdout, self.stderr, self.problem) if part)

    def last_line(self) -> str:
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self.code}, no output"


class Host:
    """The machine this process runs on."""

    def __init__(self) -> None:
        self.env: Mapping[str, str] = os.environ
        self.python: str = sys.executable
        self.python_version: str = platform.python_version()
        self.machine: str = platform.machine()
        self.system: str = f"{platform.system()} {platform.release()}"

    def run(
        self, command: Sequence[str], timeout_s: float = 20.0, on_line: Callable[[str], None] | None = None
    ) -> CommandResult:
        """Run without a shell; `on_line` receives stdout lines as they come.

        A command still running after `timeout_s` seconds is killed and what it printed is kept.
        """
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            try:
                process = subprocess.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    errors="replace",
                    start_new_session=True,
                    env=self.env,
                )
            except OSError as error:
                return CommandResult(None, problem=f"{command[0]}: {error.strerror or error}")
            code, stdout, problem = _collect(process, timeout_s, on_line)
            errors.seek(0)
            return CommandResult(code, stdout, errors.read(), problem)

    def which(self, program: str) -> str | None:
        return shutil.which(program)

    def read(self, path: str) -> str | None:
        """Text of a file, or None when it is absent or unreadable."""
        try:
            return Path(path).read_text(errors="replace")
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def glob(self, pattern: str) -> list[str]:
        return sorted(glob.glob(pattern))

    def can_read_write(self, path: str) -> bool:
        return os.access(path, os.R_OK | os.W_OK)

    def import_version(self, package: str) -> str | None:
        """Installed version from the package's metadata, without importing it; None when not installed."""
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def requirements(self, package: str) -> list[Requirement] | None:
        """What an installed package requires here, without its extras; None when it is not installed."""
        try:
            texts = importlib.metadata.requires(package) or []
        except importlib.metadata.PackageNotFoundError:
            return None
        wanted = [Requirement(text) for text in texts]
        return [item for item in wanted if item.marker is None or item.marker.evaluate({"extra": ""})]

    def python_include(self) -> str:
        """Folder that should hold Python.h."""
        return sysconfig.get_paths()["include"]

    def groups(self) -> list[str]:
        names = []
        for gid in os.getgroups():
            try:
                names.append(grp.getgrgid(gid).gr_name)
            except KeyError:
                names.append(str(gid))
        return names

    def cpu_count(self) -> int:
        """CPUs this process may run on (an affinity mask counts)."""
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1

    def total_memory_bytes(self) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def free_disk_bytes(self, path: str) -> int | None:
        try:
            return shutil.disk_usage(path).free
        except OSError:
            return None

    def can_create_in(self, folder: str) -> bool:
        """Whether a file can be created in the folder, or the folder in its nearest existing parent."""
        place = Path(folder).expanduser()
        while not place.exists() and place != place.parent:
            place = place.parent
        return place.is_dir() and os.access(place, os.W_OK | os.X_OK)

    def home(self) -> str:
        return str(Path.home())

    def resolve(self, name: str) -> str | None:
        try:
            return socket.gethostbyname(name)
        except OSError:
            return None

    def hostname(self) -> str:
        return socket.gethostname()


def _collect(
    process: subprocess.Popen[str], timeout_s: float, on_line: Callable[[str], None] | None
) -> tuple[int | None, str, str]:
    """Exit code, output and problem; the pipe is drained on a thread, so that a silent child can be stopped in time."""
    out: list[str] = []

    def drain() -> None:
        for line in process.stdout or ():
            out.append(line)
            if on_line:
                on_line(line.rstrip("\n"))

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    problem = ""
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        _kill_group(process)
        problem = f"no end after {timeout_s:.0f} s, stopped"
    except BaseException:  # Ctrl-C: its process group is its own, so the terminal does not end it
        _kill_group(process)
        raise
    reader.join(2.0)
    code = None if problem else process.returncode
    if code is not None and code < 0:
        problem = f"ended by signal {-code}"
    return code, "".join(out), problem


def _kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)  # the child leads its own session, so its ranks and helpers end with it
    process.wait()
