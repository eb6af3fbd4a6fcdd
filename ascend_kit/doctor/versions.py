"""Which torch, torch_npu and CANN belong together, and what to do about a triple that does not.

Source: Ascend/pytorch COMPATIBILITY.en.md and docs/zh/release_notes.md, read in August 2026. torch_npu
2.13.0 is the 26.2.0 line, whose row was not published then; its CANN is inferred from version gates inside
the wheel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ascend_kit.doctor.findings import Section

GRAPH_DRIVER = (25, 5, 1)  # HDK from which the old budget of streams is gone (vllm-ascend release notes)
SAFE_PAIR = "torch 2.12.0 + torch_npu 2.12.0.post2 + CANN 9.1.x"


@dataclass(frozen=True)
class Release:
    """A row of the compatibility table; `is_published` is False for a pairing that is only expected."""

    product: str
    torch_npu: tuple[str, ...]
    cann: str
    is_published: bool = True


RELEASES = (
    Release("26.2.0", ("2.13.0",), "9.2", is_published=False),
    Release("26.1.1", ("2.12.0.post2", "2.11.0.post2", "2.10.0.post6", "2.9.0.post8", "2.7.1.post10"), "9.1"),
    Release("26.1.0", ("2.12.0", "2.11.0", "2.10.0.post4", "2.9.0.post6", "2.7.1.post8"), "9.1.0"),
    Release("26.0.0", ("2.10.0", "2.9.0.post2", "2.8.0.post4", "2.7.1.post4"), "9.0.0"),
    Release("7.3.0", ("2.9.0", "2.8.0.post2", "2.7.1.post2", "2.6.0.post5"), "8.5.0"),
    Release("7.2.0", ("2.8.0", "2.7.1", "2.6.0.post3"), "8.3.RC1"),
    Release("7.1.0", ("2.6.0", "2.5.1.post1"), "8.2.RC1"),
    Release("7.0.0", ("2.5.1",), "8.1.RC1"),
)
PYTHONS_OF_2_13 = ((3, 10), (3, 14))


def numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version, for comparing: "8.3.RC1" -> (8, 3), "25.5.1" -> (25, 5, 1)."""
    match = re.match(r"\d+(\.\d+)*", version.strip())
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def release_of(torch_npu: str) -> Release | None:
    """The row of a torch_npu version, a local suffix such as +git123 ignored; None when not in the table."""
    plain = torch_npu.split("+")[0]
    return next((release for release in RELEASES if plain in release.torch_npu), None)


def check_versions(
    section: Section, python: str, machine: str, torch: str | None, torch_npu: str | None, cann: str | None
) -> None:
    """Python, torch, torch_npu and CANN against the table; adds one finding for each pairing."""
    if torch is None:
        section.fail("torch", "not installed", f"install a published triple: {SAFE_PAIR}")
        return
    if torch_npu is None:
        wanted = torch.split("+")[0]
        section.fail("torch_npu", f"not installed (torch {torch})", f"pip install torch-npu=={wanted}, or {SAFE_PAIR}")
        return
    _check_python(section, python, torch_npu)
    _check_torch(section, torch, torch_npu, machine)
    check_cann_pair(section, torch_npu, cann)


def _check_python(section: Section, python: str, torch_npu: str) -> None:
    low, high = PYTHONS_OF_2_13
    if numbers(torch_npu)[:2] == (2, 13) and not low <= numbers(python)[:2] <= high:
        section.fail(
            "python", f"{python} with torch_npu {torch_npu}", "torch_npu 2.13 has wheels for Python 3.10 to 3.14"
        )
    else:
        section.ok("python", python)


def _check_torch(section: Section, torch: str, torch_npu: str, machine: str) -> None:
    pair = f"torch {torch}, torch_npu {torch_npu}"
    wanted = ".".join(torch_npu.split("+")[0].split(".")[:3])
    if numbers(torch.split("+")[0])[:3] != numbers(wanted):
        section.fail(
            "torch and torch_npu",
            pair,
            f"torch_npu {torch_npu} needs torch {wanted} exactly: pip install torch=={wanted} torch-npu=={torch_npu}",
        )
    elif machine in ("x86_64", "AMD64") and "+cpu" not in torch:
        section.warn(
            "torch and torch_npu",
            f"{pair} on {machine}",
            f"on x86 use the CPU build, torch=={wanted}+cpu, from the CPU index of the PyTorch project",
        )
    else:
        section.ok("torch and torch_npu", pair)


def check_cann_pair(section: Section, torch_npu: str, cann: str | None) -> None:
    """One finding on torch_npu with a CANN version; None when no file tells the version."""
    if cann is None:
        section.na("torch_npu and CANN", "no file tells CANN's version; torch_npu is asked when it is imported")
        return
    release, pair = release_of(torch_npu), f"torch_npu {torch_npu}, CANN {cann}"
    if release is None:
        known = ", ".join(name for row in RELEASES for name in row.torch_npu)
        section.warn("torch_npu and CANN", pair, f"this torch_npu is not in the table (known: {known})")
        return
    _compare_cann(section, pair, release, cann)


def _compare_cann(section: Section, pair: str, release: Release, cann: str) -> None:
    check, row = "torch_npu and CANN", f"TorchNPU {release.product}, CANN {release.cann}"
    wanted, found = numbers(release.cann), numbers(cann)
    if found[: len(wanted)] == wanted:
        if release.is_published:
            section.ok(check, f"{pair}: row {row}")
        else:
            section.warn(
                check, f"{pair}: expected row {row}", f"pairing not yet published; the published one is {SAFE_PAIR}"
            )
    elif found > wanted:
        section.warn(
            check,
            f"{pair}, newer than row {row}",
            "described as compatible within a few versions; if operators fail, use the row's CANN",
        )
    elif not release.is_published and found[:2] == (9, 1):
        section.warn(
            check,
            f"{pair}, expected row {row}",
            f"plausible but unpublished: run doctor --self-test; the published pair is {SAFE_PAIR}",
        )
    else:
        section.fail(
            check,
            f"{pair}, older than row {row}",
            f"update CANN to {release.cann}, or take the torch and torch_npu of your CANN{_suggest(cann)}",
        )


def _suggest(cann: str) -> str:
    """Names the newest torch_npu packages of the installed CANN, when it has a row."""
    for release in RELEASES:
        wanted = numbers(release.cann)
        if numbers(cann)[: len(wanted)] == wanted:
            return f" ({release.torch_npu[0]})"
    return ""
