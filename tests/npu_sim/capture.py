"""Graph capture as the device does it: recorded between begin and end, executed at replay and only then.

A recording is a list of nodes: kernels, and the waits and writes of 64-bit words through which
`NPUGraph.update` hands new attention lengths to a running graph. Kernels keep raw addresses, not tensors,
so a graph whose inputs were freed or rebound is as wrong here as on hardware; freed inputs are noticed and
raise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from npu_sim import runtime

_GREATER_EQUAL, _EQUAL, _AND, _NOR = range(4)  # aclrtValueWait's flag


class CaptureError(RuntimeError):
    """Something was done during capture that the device refuses."""


class Hang(RuntimeError):
    """On hardware the program would wait here for ever."""


@dataclass
class Kernel:
    """One recorded launch; `run` executes it over the recorded addresses."""

    name: str
    run: Callable[[], None]
    inputs: list[tuple[str, StorageWeakRef]] = field(default_factory=list)  # storages older than the capture
    group: int | None = None


@dataclass
class Wait:
    address: int
    value: int
    flag: int

    def is_met(self) -> bool:
        word = runtime.read_word(self.address)
        return {
            _GREATER_EQUAL: word >= self.value,
            _EQUAL: word == self.value,
            _AND: bool(word & self.value),
            _NOR: bool(~(word | self.value)),
        }[self.flag]


@dataclass
class Write:
    address: int
    value: int


class Recording:
    """The nodes of one graph."""

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self.nodes: list[Kernel | Wait | Write] = []
        self.own_storages: set[int] = set()  # addresses allocated while recording
        self.open_group: list[Kernel] | None = None
        self.groups: dict[int, Kernel] = {}

    def add(self, kernel: Kernel) -> None:
        """Append a launch, to the open task group if there is one."""
        if self.open_group is not None:
            self.open_group.append(kernel)
        self.nodes.append(kernel)

    def close_group(self, handle: int) -> None:
        """End a task group. It must hold one launch: an update re-issues exactly one."""
        members, self.open_group = self.open_group or [], None
        if len(members) != 1:
            raise CaptureError(f"a task group holds {len(members)} launches, an update can replace exactly one")
        members[0].group = handle
        self.groups[handle] = members[0]

    def outside(self, tensors: list[Tensor]) -> list[tuple[str, StorageWeakRef]]:
        """Storages that existed before the capture: the caller has to keep them alive."""
        return [
            (f"{tuple(t.shape)} {t.dtype}", StorageWeakRef(t.untyped_storage()))
            for t in tensors
            if t.untyped_storage().data_ptr() not in self.own_storages
        ]


class Replay:
    """One execution of a recording, which stops at a wait that is not met yet."""

    def __init__(self, recording: Recording) -> None:
        self.recording, self.position = recording, 0

    def advance(self) -> bool:
        """Run as far as possible; True when the end was reached."""
        nodes = self.recording.nodes
        while self.position < len(nodes):
            node = nodes[self.position]
            if isinstance(node, Wait):
                if not node.is_met():
                    return False
            elif isinstance(node, Write):
                runtime.write_word(node.address, node.value)
            else:
                self._launch(node)
            self.position += 1
        return True

    def _launch(self, kernel: Kernel) -> None:
        for what, storage in kernel.inputs:
            if storage.expired():
                raise CaptureError(f"{kernel.name}: a tensor {what} that the graph reads was freed after capture")
        kernel.run()


@dataclass
class Later:
    """A copy to the device that was queued behind a replay: it reads the host's memory when its turn comes."""

    copy: Callable[[], object]

    def advance(self) -> bool:
        self.copy()
        return True


class Graphs:
    """All recordings of a process, and the replays that have not ended, with what is queued behind them."""

    def __init__(self) -> None:
        self.recordings: dict[int, Recording] = {}
        self.recording: Recording | None = None  # the capture under way
        self.updating: Kernel | None = None  # the launch being re-issued
        self.unfinished: list[Replay | Later] = []
        self.by_group: dict[int, Kernel] = {}

    def begin(self, model: int, stream: int) -> None:
        self.recording = self.recordings[model] = Recording(stream)

    def end(self) -> None:
        recording, self.recording = self.recording, None
        if recording.open_group is not None:
            raise CaptureError("capture ended inside a task group")
        self.by_group |= recording.groups

    def replay(self, model: int) -> None:
        """Start a replay behind those under way."""
        if model not in self.recordings:
            raise CaptureError("this graph was never captured")
        self.unfinished.append(Replay(self.recordings[model]))
        self.pump()

    def pump(self) -> None:
        """Let the replays go on; called whenever a word was written."""
        while self.unfinished:
            replay = self.unfinished[0]
            try:
                if not replay.advance():
                    return
            except Exception:
                self.unfinished.clear()
                raise
            self.unfinished.pop(0)

    def destroy(self, model: int) -> None:
        recording = self.recordings.pop(model, None)
        for handle in recording.groups if recording else ():
            self.by_group.pop(handle, None)

    def wait_word(self, address: int, value: int, flag: int) -> None:
        """A wait in a stream: recorded during capture, otherwise it must be met, since nobody else writes."""
        wait = Wait(address, value, flag)
        if self.recording is not None:
            self.recording.nodes.append(wait)
        elif not wait.is_met():
            raise Hang("a stream waits for an event that nothing will record")

    def write_word(self, address: int, value: int, stream: int) -> None:
        """A write in a stream; another stream than the captured one is not part of the recording."""
        if self.recording is not None and stream == self.recording.stream:
            self.recording.nodes.append(Write(address, value))
            return
        runtime.write_word(address, value)
        self.pump()

    def check_finished(self, what: str) -> None:
        """Raise Hang when a replay still waits for its update."""
        if self.unfinished:
            count = len(self.unfinished)
            self.unfinished.clear()
            raise Hang(
                f"{what} would wait for ever: {count} graph replay(s) wait for NPUGraph.update, which has to "
                "follow every replay of a graph with updatable operators"
            )


def describe(value: Any) -> str:
    """A short form for messages."""
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)
