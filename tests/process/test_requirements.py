"""Packages that are too old are refused at the start, by the floors that setup.py declares."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from unic_ds.process import requirements

ROOT = Path(__file__).resolve().parents[2]
FLOORS = dict(re.findall(r'"([\w-]+)>=([\w.]+)"', (ROOT / "setup.py").read_text()))


def installed(folder: Path, versions: dict[str, str]) -> dict[str, str]:
    """The environment of a process that finds these versions, and unic_ds as setup.py declares."""
    tools = {"hypothesis", "mypy", "pytest", "pytest-xdist", "ruff", "webdataset"}
    lines = [
        f"Requires-Dist: {name}>={floor}" + ('; extra == "dev"' if name in tools else "")
        for name, floor in FLOORS.items()
    ]
    for name, version in ({"unic_ds": "0.1.0"} | versions).items():
        (folder / f"{name}-{version}.dist-info").mkdir()
        text = f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n"
        text += "\n".join(lines) + "\n" if name == "unic_ds" else ""
        (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(text)
    path = os.pathsep.join((str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")))
    return os.environ | {"PYTHONPATH": path}


@pytest.mark.parametrize("program", [("-m", "unic_ds.cli", "plan"), ("unic_ds/train.py",)])
def test_an_old_version_is_one_sentence_with_the_remedy(tmp_path, program):
    env = installed(tmp_path, {"torch": "2.9.1", "timm": "1.0.9", "ruff": "0.1"})
    done = subprocess.run(
        [sys.executable, *program], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("unic_ds: error: too old for unic_ds: timm 1.0.9, torch 2.9.1;")
    assert f"pip install 'timm>={FLOORS['timm']}' 'torch>={FLOORS['torch']}'" in done.stderr


def test_help_is_printed_with_an_old_version(tmp_path):
    env = installed(tmp_path, {"torch": "2.9.1"})
    command = [sys.executable, "-m", "unic_ds.cli", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "unic-ds VERB" in done.stdout


def test_a_container_s_build_of_a_floor_is_new_enough(tmp_path):
    """For this check and for pip; one of the release before is neither."""
    env = installed(
        tmp_path, {"torch": "2.11.0a0+git1234.nv26.3", "torchvision": "0.26.0a0+nv26.3"}
    )
    code = "from unic_ds.process import requirements; requirements.check()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    for name, of_floor, before in (
        ("torch", "2.11.0a0+git1234.nv26.3", "2.10.0"),
        ("torchvision", "0.26.0a0+nv26.3", "0.25.0"),
    ):
        declared = Requirement(f"{name}>={FLOORS[name]}").specifier
        assert declared.contains(of_floor) and not declared.contains(before)


@pytest.mark.parametrize(
    ("version", "release"),
    [("2.11.0a0+git.nv25", "2.11"), ("2.11.0+cu128", "2.11.0"), ("13.0.0rc1.post2", "13")],
)
def test_the_release_of_a_version(version, release):
    assert requirements.release(version) == Version(release)


def test_the_oldest_pins_are_the_floors():
    pins = dict(
        re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints-oldest.txt").read_text(), re.M)
    )
    pins = {re.sub(r"[-_.]+", "-", name).lower(): pin for name, pin in pins.items()}
    newest = {"mypy", "ruff"}  # the tools that judge the style are not tested for age
    for name, floor in FLOORS.items():
        if name == "nvidia-dali-cuda120":
            continue
        pin = Version(pins[re.sub(r"[-_.]+", "-", name).lower()])
        size = len(Version(floor).release)
        same = pin.release[:size] == Version(floor).release
        assert same or name in newest, f"{name}: floor {floor}, but {pin} is tested"
