"""Which driver, CANN, Python, torch and torch_npu belong together, and that the project says so in one way."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
import yaml
from doctor_hosts import ROOT, ascend_server, find
from packaging.specifiers import SpecifierSet

from ascend_kit.doctor import run_checks
from ascend_kit.doctor.findings import Section
from ascend_kit.doctor.host import CommandResult, Host
from ascend_kit.doctor.versions import check_cann_packages, stack

# ------------------------------------------------------------------------------------- whole machines


# ---------------------------------------------------------------------------------------- version triples


@pytest.mark.parametrize(
    ("packages", "cann", "check", "status"),
    [
        ({"torch": "2.13.0"}, "9.1.0", "torch and torch_npu", "fail"),  # pip moved torch
        ({"torch": "2.12.0", "torch_npu": "2.12.0"}, "9.1.0", "torch_npu and CANN", "ok"),
        ({"torch": "2.12.0", "torch_npu": "2.12.0.post2"}, "9.1.1", "torch_npu and CANN", "ok"),
        ({"torch": "2.12.0", "torch_npu": "2.12.0.post2"}, "8.5.0", "torch_npu and CANN", "fail"),
        ({"torch": "2.9.0", "torch_npu": "2.9.0"}, "9.1.0", "torch_npu and CANN", "warn"),  # newer CANN
        ({"torch": "2.13.0", "torch_npu": "2.13.0"}, "9.1.0", "torch_npu and CANN", "warn"),  # plausible
        ({"torch": "2.13.0", "torch_npu": "2.13.0"}, "9.2.0", "torch_npu and CANN", "warn"),  # expected
        ({"torch": "2.13.0", "torch_npu": "2.13.0"}, "9.0.0", "torch_npu and CANN", "fail"),
        ({"torch": "2.8.0", "torch_npu": "2.8.0"}, "8.3.RC1", "torch_npu and CANN", "ok"),
        ({"torch": "2.4.0", "torch_npu": "2.4.0"}, "8.1.RC1", "torch_npu and CANN", "warn"),  # not in the table
    ],
)
def test_version_triple(packages, cann, check, status):
    name = f"{ROOT}/aarch64-linux/ascend_%s_install.info"
    files = {name % "toolkit": f"version={cann}\n", name % "ops": f"version={cann}\n"}

    found = find(run_checks(ascend_server(packages=packages, files=files)), "Versions", check)

    assert found.status == status
    assert found.remedy or status == "ok"


def test_too_old_cann_names_the_torch_npu_that_suits_it():
    files = {f"{ROOT}/aarch64-linux/ascend_toolkit_install.info": "version=8.5.0\n"}

    assert "torch-npu==2.9.0" in find(run_checks(ascend_server(files=files)), "Versions", "torch_npu and CANN").remedy


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize(("torch", "status"), [("2.12.0", "warn"), ("2.12.0+cu130", "warn"), ("2.12.0+cpu", "ok")])
def test_a_cuda_build_of_torch_is_a_warning_on_both_architectures(machine, torch, status):
    found = find(
        run_checks(ascend_server(machine=machine, packages={"torch": torch})), "Versions", "torch and torch_npu"
    )

    assert found.status == status
    assert status == "ok" or "+cpu --index-url" in found.remedy


def test_a_missing_package_of_cann_is_named_with_the_command_that_brings_it():
    host = ascend_server(commands={"python -c": CommandResult(0, "decorator: No module named 'decorator'\n")})

    found = find(run_checks(host), "Versions", "packages of CANN")

    assert found.status == "fail" and "decorator: No module named" in found.evidence
    assert "pip install 'decorator>=4.4'" in found.remedy and "500001" in found.remedy


def test_packages_of_cann_are_really_imported():
    section = Section("S")

    check_cann_packages(section, Host())

    (found,) = section
    assert found.status in ("ok", "fail") and "yaml:" not in found.evidence and "scipy:" not in found.evidence


@pytest.mark.parametrize(
    ("cann", "numpy", "fails"), [("8.5.0", "2.2.6", True), ("8.5.0", "1.26.4", False), ("9.1.0", "2.2.6", False)]
)
def test_numpy_2_does_not_go_with_cann_below_9(cann, numpy, fails):
    files = {f"{ROOT}/aarch64-linux/ascend_toolkit_install.info": f"version={cann}\n"}

    findings = run_checks(ascend_server(files=files, packages={"numpy": numpy}))

    assert any(item.check == "numpy" and item.status == "fail" for item in findings) == fails


@pytest.mark.parametrize(("driver", "status"), [("26.1.0", "ok"), ("25.5.1", "warn")])
def test_cann_91_pairs_with_hdk_26_1(driver, status):
    files = {"/usr/local/Ascend/driver/version.info": f"Version={driver}\n"}

    found = find(run_checks(ascend_server(files=files)), "Versions", "CANN and driver")

    assert found.status == status and (status == "ok" or "26.1.0" in found.remedy)


@pytest.mark.parametrize(
    ("cann", "torch", "torch_npu"),
    [
        ("9.1.0", "2.12.0", "2.12.0.post2"),
        ("9.0.0", "2.10.0", "2.10.0"),
        ("8.5.0", "2.9.0", "2.9.0"),
        ("8.3.RC1", "2.8.0", "2.8.0"),
    ],
)
def test_the_pair_of_the_cann_found_is_printed(cann, torch, torch_npu):
    files = {f"{ROOT}/aarch64-linux/ascend_toolkit_install.info": f"version={cann}\n"}

    found = find(run_checks(ascend_server(files=files)), "Versions", "pair for this CANN")

    assert f"torch=={torch}+cpu" in found.evidence and found.evidence.endswith(f"torch-npu=={torch_npu}")


@pytest.mark.parametrize(
    ("python", "torch_npu", "status"),
    [
        ("3.14.0", "2.12.0.post2", "fail"),
        ("3.14.0", "2.12.0.post3", "ok"),
        ("3.13.1", "2.12.0", "ok"),
        ("3.14.0", "2.14.0", "ok"),
    ],
)
def test_pythons_without_a_wheel_are_known(python, torch_npu, status):
    host = ascend_server(python_version=python, packages={"torch_npu": torch_npu})

    assert find(run_checks(host), "Versions", "python").status == status


def test_one_version_story_in_environment_project_readme_and_doctor():
    wanted, root = stack()["recommended"], Path(__file__).parents[1]
    environment = yaml.safe_load((root / "environment.yml").read_text())
    pip = next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    readme = (root / "README.md").read_text()

    assert {f"torch=={wanted['torch']}+cpu", f"torch-npu=={wanted['torch_npu']}"} <= set(pip)
    index = next(line.split()[1] for line in pip if line.startswith("--extra-index-url"))
    assert environment["variables"]["TASK_QUEUE_ENABLE"] == "1"
    extra = set(project["optional-dependencies"]["npu"])
    assert {f"torch=={wanted['torch']}", f"torch-npu=={wanted['torch_npu']}"} <= extra
    assert set(stack()["cann_packages"].values()) <= extra | set(project["dependencies"])
    assert set(stack()["cann_packages"].values()) - set(project["dependencies"]) <= set(pip)
    for text in (
        f"torch {wanted['torch']}",
        f"torch_npu {wanted['torch_npu']}",
        f"CANN {wanted['cann']}",
        f"HDK {wanted['driver']}",
    ):
        assert text in readme, text
    assert f"--index-url {index}" in readme
    assert project["requires-python"] == ">=3.11.5" and "3.11 to 3.13" in (root / "Makefile").read_text()


def test_cann_version_comes_from_torch_npu_when_no_file_tells_it():
    host = ascend_server(files={f"{ROOT}/aarch64-linux/ascend_toolkit_install.info": None, f"{ROOT}/lib": ""})

    findings = run_checks(host)

    assert find(findings, "Versions", "torch_npu and CANN").status == "n/a"
    assert find(findings, "Import", "torch_npu and CANN").status == "ok"


def test_python_without_a_wheel_of_torch_npu_213_fails():
    host = ascend_server(python_version="3.9.18", packages={"torch": "2.13.0", "torch_npu": "2.13.0"})

    assert find(run_checks(host), "Versions", "python").status == "fail"


@pytest.mark.parametrize("python", ["3.11.5", "3.12.0", "3.13.0"])
def test_every_pinned_package_admits_each_supported_python(python):
    """What pip's resolver asks first; read from the packages installed here, so it needs no network."""
    pins = [line.partition("==")[0] for line in (Path(__file__).parents[1] / "constraints.txt").read_text().split()]
    refused = []
    for name in pins:
        try:
            needs = metadata(name)["Requires-Python"]
        except PackageNotFoundError:
            continue
        if needs and not SpecifierSet(needs).contains(python):
            refused.append(f"{name} needs Python {needs}")

    assert refused == []
