"""Programs that a model wrote, run against their tests: what lm-eval's code tasks fetch from the hub, without the hub.

Only where `allow_code_execution` is set. Each program runs in a process of its own, in an empty folder, without our
environment, with limits of time, memory and file size; that keeps slips from doing harm, not an attacker.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import fmean
from typing import Any

from ascend_kit.evaluation.scores import pass_at_k

TIMEOUT_S = 3.0  # of the hub's code_eval
MEMORY_BYTES = 4 << 30
FILE_BYTES = 1 << 20


def passes(program: str) -> bool:
    """Whether a Python program ends by itself within the limits and without an error."""
    with tempfile.TemporaryDirectory(prefix="ascend-code-") as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", program],
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=TIMEOUT_S,
                preexec_fn=_limit,
                start_new_session=True,
            )
        except (subprocess.TimeoutExpired, ValueError, OSError):  # too slow; a zero byte; longer than a command may be
            return False
    return done.returncode == 0


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    seconds = int(TIMEOUT_S) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


class CodeEval:
    """The interface of the hub's metric `code_eval`."""

    def compute(
        self,
        *,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
        **_: Any,
    ) -> tuple[dict[str, float], dict[int, list[bool]]]:
        """`pass@k` for each k that there are answers for, and which answers passed, by the number of the question."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = {
                number: list(pool.map(passes, [f"{answer}\n{tests}" for answer in answers]))
                for number, (answers, tests) in enumerate(zip(predictions, references, strict=True))
            }
        counts = [(len(each), sum(each)) for each in found.values()]
        kept = [each for each in k if all(total >= each for total, _ in counts)]
        return {f"pass@{each}": fmean(pass_at_k(*count, each) for count in counts) for each in kept}, found


def replace_code_eval() -> None:
    """From now on lm-eval's tasks that load `code_eval` get `CodeEval`: they load it from the hub, without a switch."""
    import evaluate

    whole = evaluate.load

    def load(path: str, *args: Any, **options: Any) -> Any:
        return CodeEval() if path == "code_eval" else whole(path, *args, **options)

    if not getattr(whole, "is_ours", False):
        load.is_ours = True  # pyright: ignore[reportFunctionMemberAccess]
        evaluate.load = load
