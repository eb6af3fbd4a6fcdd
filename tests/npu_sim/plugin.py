"""pytest side of the simulated NPU: `--device npu` runs the device tests on it, or skips them saying why.

With `--device npu` (or `cuda`) only tests that depend on the device are kept: those that take the `device`
fixture, and those marked with the device's name. Without it the marked ones are left out.
"""

from __future__ import annotations

import glob

import pytest

MARKERS = ("npu", "cuda")
DEVICES = 2  # enough for tensor parallelism over two cards

_reason: str | None = None


def pytest_configure(config: pytest.Config) -> None:
    """Start the simulation before anything imports transformers, which would import torch_npu on its own."""
    if _kind(config) == "npu" and not glob.glob("/dev/davinci[0-9]*"):
        _start(is_controller=bool(getattr(config.option, "numprocesses", 0)) and not hasattr(config, "workerinput"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what belongs to the device; skip all of it, with the reason, where it cannot be had."""
    kind = _kind(config)
    kept = [item for item in items if _belongs(item, kind)]
    config.hook.pytest_deselected(items=[item for item in items if not _belongs(item, kind)])
    # With --dist loadfile files start in this order: heavy ones first, so that no worker is left with one at the end.
    heavy = {item.path for item in kept if {mark.name for mark in item.iter_markers()} & {"slow", "multiproc"}}
    items[:] = sorted(kept, key=lambda item: item.path not in heavy)
    reason = _reason if kind == "npu" else _cuda_reason() if kind == "cuda" else None
    if reason:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def sim(request: pytest.FixtureRequest):
    """The running simulator, counters at zero; skips on a real NPU."""
    import npu_sim

    try:
        simulator = npu_sim.current()
    except RuntimeError:
        pytest.skip("needs the simulated NPU (pytest --device npu)")
    simulator.reset()
    yield simulator
    simulator.shapes_only = False
    simulator.graphs.unfinished.clear()
    simulator.graphs.updating = None


def _kind(config: pytest.Config) -> str:
    return config.getoption("--device").partition(":")[0]


def _belongs(item: pytest.Item, kind: str) -> bool:
    marked = {name for name in MARKERS if item.get_closest_marker(name)}
    if kind == "cpu":
        return not marked
    return kind in marked or (not marked and "device" in getattr(item, "fixturenames", ()))


def _start(is_controller: bool) -> None:
    """A controller of pytest-xdist only installs, so that its workers need not wait for one another."""
    global _reason
    import npu_sim

    try:
        npu_sim.ensure() if is_controller else npu_sim.start(DEVICES)
    except npu_sim.Unavailable as error:
        _reason = f"no simulated NPU: {error}"


def _cuda_reason() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"
