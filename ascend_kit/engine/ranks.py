"""The place of this process among others that torchrun or mpirun started, read from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

# (rank, size, rank on this machine), by launcher
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}


class Ranks(NamedTuple):
    """One of `size` processes; `local_rank` counts on this machine."""

    rank: int
    size: int
    local_rank: int
    launcher: str


def environment_ranks(env: Mapping[str, str] | None = None) -> Ranks | None:
    """The ranks this process was started with, or None when it runs alone.

    ValueError when the variables of a launcher are there but make no sense: guessing would run a part of the work.
    """
    env = os.environ if env is None else env
    for launcher, names in LAUNCHERS.items():
        if names[1] not in env or names[0] not in env:
            continue
        shown = ", ".join(f"{name}={env.get(name)!r}" for name in names)
        try:
            rank, size = int(env[names[0]]), int(env[names[1]])
            local = int(env.get(names[2], rank))
        except ValueError:
            raise ValueError(
                f"the ranks of {launcher} are not whole numbers: {shown}; unset them to run alone"
            ) from None
        if not (0 <= rank < size and 0 <= local < size):
            raise ValueError(f"the ranks of {launcher} do not fit together: {shown}; unset them to run alone")
        if size > 1:
            return Ranks(rank, size, local, launcher)
    return None


def without_ranks(env: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child process that shall run alone."""
    names = {name for group in LAUNCHERS.values() for name in group}
    return {name: value for name, value in env.items() if name not in names}
