"""Damaged files of every kind, seeded: each is refused in one line that names the file, or read rightly."""

from __future__ import annotations

import pytest
from fuzz_targets import TARGETS, run_case

# As many as half a second takes; else 40.
CASES = {"report": 6, "data": 12, "run": 60, "manifest": 30, "gptq": 20, "awq": 20, "msmodelslim": 20}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_damaged_file_is_refused_by_name_or_read_within_bounds(target, tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_KIT_CACHE", str(tmp_path / "cache"))
    pristine = tmp_path / "pristine"
    pristine.mkdir()
    target.build(pristine)
    target.read(pristine)

    cases = [run_case(target, pristine, tmp_path / "work", seed) for seed in range(CASES.get(target.name, 40))]

    assert [case for case in cases if case.fault] == []
    if len(cases) >= 12:  # the damage is neither harmless nor always fatal
        harmless = set() if target.name == "bin" else {"ok"}  # a changed byte there fails its archive's own check
        assert {"refused"} | harmless <= {case.outcome for case in cases}
