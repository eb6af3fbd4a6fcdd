"""Which driver, CANN, Python, torch and torch_npu belong together (stack.yaml), and what to do where they do not."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import yaml

from ascend_kit.doctor.findings import Section
from ascend_kit.doctor.host import Host

# Imports each module and prints the ones that fail; run in a process of its own, as CANN's compiler is.
_IMPORT = """
import importlib, sys
for name in sys.argv[1:]:
    try: importlib.import_module(name)
    except Exception as error: print(f"{name}: {error}")
"""


@functools.cache
def stack() -> dict[str, Any]:
    """The table of versions."""
    return yaml.safe_load(Path(__file__).with_name("stack.yaml").read_text(encoding="utf-8"))


def numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version, for comparing: "8.3.RC1" -> (8, 3), "25.5.1" -> (25, 5, 1)."""
    match = re.match(r"\d+(\.\d+)*", str(version).strip())
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def recommended() -> str:
    """The triple to install, in words."""
    wanted = stack()["recommended"]
    pair = f"torch {wanted['torch']}+cpu + torch_npu {wanted['torch_npu']}"
    return f"{pair} + CANN {wanted['cann']}.x + HDK {wanted['driver']}"


# PyPI's torch is a CUDA build on x86 and, from 2.12 on, on aarch64 as well.
CPU_INDEX = "--index-url <PyTorch's CPU index, as in README and environment.yml>"


def install(torch: str, torch_npu: str) -> str:
    """The commands that install a pair; PyPI's torch would be the CUDA build."""
    return f"pip install torch=={torch}+cpu {CPU_INDEX}, then pip install torch-npu=={torch_npu}"


def check_versions(host: Host, cann: str | None, driver: str | None) -> Section:
    """Python, torch, torch_npu, CANN, driver and CANN's Python packages; one finding for each pairing."""
    section = Section("Versions")
    torch, torch_npu = host.import_version("torch"), host.import_version("torch_npu")
    if torch is None or torch_npu is None:
        missing = "torch" if torch is None else "torch_npu"
        section.fail(missing, "not installed", f"install a published triple: {recommended()}")
    else:
        _check_python(section, host.python_version, torch_npu)
        _check_torch(section, torch, torch_npu)
        check_cann_pair(section, torch_npu, cann)
    if cann is not None:
        _check_driver_pair(section, cann, driver)
        section.ok("pair for this CANN", f"CANN {cann}: {_pair_of(cann)}")
        _check_numpy(section, host, cann)
    check_cann_packages(section, host)
    return section


def check_torch_build(section: Section, torch: str) -> None:
    """A finding when torch is built for CUDA."""
    if "+cu" in torch:
        section.warn("torch build", torch, f"a CUDA build: pip install torch=={torch.split('+')[0]}+cpu {CPU_INDEX}")


def _check_python(section: Section, python: str, torch_npu: str) -> None:
    fitting = [prefix for prefix in stack()["newest_python"] if torch_npu.startswith(prefix)]
    newest = stack()["newest_python"][max(fitting, key=len)] if fitting else None
    found = numbers(python)[:2]
    fits = found >= (3, 10) and (newest is None or found <= numbers(newest))
    remedy = "" if fits else f"its wheels are for Python 3.10 to {newest}"
    section.judge("python", python if fits else f"{python} with torch_npu {torch_npu}", fail=remedy)


def _check_torch(section: Section, torch: str, torch_npu: str) -> None:
    pair = f"torch {torch}, torch_npu {torch_npu}"
    wanted = ".".join(torch_npu.split("+")[0].split(".")[:3])
    other = "" if numbers(torch) == numbers(wanted) else f"torch_npu needs torch {wanted} exactly: "
    cuda = "" if "+cpu" in torch else "PyPI's torch is a CUDA build: "
    commands = install(wanted, torch_npu)
    section.judge("torch and torch_npu", pair, fail=other and other + commands, warn=cuda and cuda + commands)


def check_cann_pair(section: Section, torch_npu: str, cann: str | None) -> None:
    """One finding on torch_npu with a CANN version; None when no file tells the version."""
    check, pair = "torch_npu and CANN", f"torch_npu {torch_npu}, CANN {cann}"
    rows = stack()["releases"]
    release = next((row for row in rows if torch_npu.split("+")[0] in row["torch_npu"]), None)
    if cann is None:
        section.na(check, "no file tells CANN's version; torch_npu is asked when it is imported")
        return
    if release is None:
        known = ", ".join(name for row in rows for name in row["torch_npu"])
        section.warn(check, pair, f"this torch_npu is not in the table (known: {known})")
        return
    row = f"TorchNPU {release['product']}, CANN {release['cann']}"
    wanted, found = numbers(release["cann"]), numbers(cann)
    if found[: len(wanted)] == wanted and release.get("published", True):
        section.ok(check, f"{pair}: row {row}")
    elif found[: len(wanted)] == wanted:
        remedy = f"not in the published table: run doctor --self-test; the published triple is {recommended()}"
        section.warn(check, f"{pair}: {row}", remedy)
    elif found > wanted:
        remedy = "described as compatible within a few versions; if operators fail, use the row's CANN"
        section.warn(check, f"{pair}, newer than row {row}", remedy)
    else:
        section.fail(check, f"{pair}, older than row {row}", f"update CANN to {release['cann']}, or {_pair_of(cann)}")


def _pair_of(cann: str) -> str:
    """The commands for the newest published torch and torch_npu of a CANN version."""
    for row in stack()["releases"]:
        wanted = numbers(row["cann"])
        if numbers(cann)[: len(wanted)] == wanted and row.get("published", True):
            newest = row["torch_npu"][0]
            return install(".".join(newest.split(".")[:3]), newest)
    return f"take a CANN of the table: {', '.join(dict.fromkeys(str(row['cann']) for row in stack()['releases']))}"


def _check_driver_pair(section: Section, cann: str, driver: str | None) -> None:
    wanted = stack()["drivers"].get(".".join(cann.split(".")[:2]))
    if wanted is None or driver is None:
        return
    remedy = f"CANN {cann} pairs with HDK {wanted}; {stack()['graph_driver']} is the least for graphs. "
    remedy = remedy + "Or take the pair of an older CANN" if numbers(driver) < numbers(wanted) else ""
    section.judge("CANN and driver", f"CANN {cann}, driver {driver}", warn=remedy)


def _check_numpy(section: Section, host: Host, cann: str) -> None:
    version = host.import_version("numpy")
    old_python = numbers(host.python_version)[:2] < (3, 13)
    if version and numbers(cann) < (9,) and old_python and numbers(version) >= (2,):
        remedy = 'CANN below 9 needs numpy below 2: pip install "numpy<2"'
        section.fail("numpy", f"numpy {version} with CANN {cann}", remedy)


def check_cann_packages(section: Section, host: Host) -> None:
    """Whether each Python package that CANN imports can be imported; one missing ends in 500001 at the first call."""
    wanted = stack()["cann_packages"]
    result = host.run([host.python, "-c", _IMPORT, *wanted], timeout_s=120)
    failed = [line for line in result.stdout.splitlines() if line.partition(":")[0] in wanted]
    if failed:
        names = " ".join(f"'{wanted[line.partition(':')[0]]}'" for line in failed)
        remedy = f"pip install {names}: the first device call fails with 500001"
        section.fail("packages of CANN", "; ".join(failed), remedy)
    elif not result.is_ok:
        section.warn("packages of CANN", result.last_line()[:200], "the imports could not be tried")
    else:
        section.ok("packages of CANN", f"{len(wanted)} of {len(wanted)} import")
