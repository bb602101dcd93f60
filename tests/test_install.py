"""The ways of docs/install.md, as far as a machine without a network can go them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TORCH, VISION = "2.11.0a0+git1234.nv26.3", "0.26.0a0+nv26.3"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of unic_ds, built from a copy."""
    folder = tmp_path_factory.mktemp("wheel")
    kept = ("setup.py", "pyproject.toml", "LICENSE", "unic_ds", "kernels")
    for name in kept:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    command = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", "wheels", "."]
    done = pip(*command, cwd=folder)
    assert done.returncode == 0, done.stderr
    (found,) = (folder / "wheels").glob("unic_ds-*.whl")
    return found


@pytest.fixture
def container(tmp_path) -> Path:
    """A Python with these packages, but torch and torchvision as a container builds them."""
    venv.create(tmp_path / "container", with_pip=False)
    (site,) = (tmp_path / "container").glob("lib/python*/site-packages")
    (site / "image.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for name, version in (("torch", TORCH), ("torchvision", VISION)):
        about = site / f"{name}-{version}.dist-info"
        about.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (about / "METADATA").write_text(text)
        (about / "RECORD").write_text("")
    return tmp_path / "container" / "bin" / "python"


def pip(*words: str, python: Path | None = None, cwd: Path | None = None):
    """Result of a pip command without a network."""
    which = ["--python", str(python)] if python else []
    command = [sys.executable, "-m", "pip", *which, "--disable-pip-version-check", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def commands(start: str) -> list[str]:
    """The commands of docs/install.md that begin so."""
    text = (ROOT / "docs" / "install.md").read_text()
    return [line for line in text.splitlines() if line.startswith(start)]


def test_a_container_s_torch_stays(container, wheel, tmp_path):
    """By the command of docs/install.md that names what may not change."""
    (keep,) = commands("python -m pip list --format=freeze | grep")
    kept = re.search(r"grep -iE '(.+)' >", keep)[1]
    listed = pip("list", "--format=freeze", python=container)
    pins = [line for line in listed.stdout.splitlines() if re.match(kept, line, re.I)]
    assert {f"torch=={TORCH}", f"torchvision=={VISION}"} < set(pins)
    assert any(pin.startswith("triton==") for pin in pins)
    (tmp_path / "keep.txt").write_text("\n".join(pins))

    report = ["--report", str(tmp_path / "report.json")]
    asked = ["install", "--no-index", "-c", str(tmp_path / "keep.txt")]
    done = pip(*asked, "--dry-run", f"{wheel}[cuda13,quickstart]", *report, python=container)
    assert done.returncode == 0, done.stderr
    assert "Requirement already satisfied: torch>=2.11" in done.stdout
    changed = json.loads((tmp_path / "report.json").read_text())["install"]
    assert {row["metadata"]["name"] for row in changed} <= {"unic_ds"}

    (tmp_path / "keep.txt").write_text("torch==2.10.0")
    done = pip(*asked, "--dry-run", f"{wheel}[cuda13]", python=container)
    assert done.returncode != 0 and "conflict" in done.stderr


def test_what_is_too_old_is_refused_once_installed(container, wheel):
    done = pip(
        "install", "--no-index", "--no-deps", "--force-reinstall", str(wheel), python=container
    )
    assert done.returncode == 0, done.stderr
    (site,) = container.parents[1].glob("lib/python*/site-packages")
    assert (site / "unic_ds" / "report" / "templates" / "report.html.jinja").is_file()
    program = [str(container), "-P", "-m", "unic_ds.cli", "nothing"]
    done = subprocess.run(program, cwd=site, env={}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "unknown verb" in done.stderr, done.stderr
    (site / f"torch-{TORCH}.dist-info").rename(site / "torch-2.9.1.dist-info")
    about = site / "torch-2.9.1.dist-info" / "METADATA"
    about.write_text(about.read_text().replace(TORCH, "2.9.1"))
    done = subprocess.run(program, cwd=site, env={}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "torch 2.9.1; pip install 'torch>=2.11" in done.stderr


def test_wheels_install_without_a_network(container, wheel, tmp_path):
    """A folder of wheels is all that pip looks at; what lacks there is named."""
    asked = ["install", "--no-index", "--find-links", str(wheel.parent), "--dry-run"]
    report = str(tmp_path / "report.json")
    done = pip(*asked, "--ignore-installed", "--no-deps", "--report", report, "unic_ds")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(Path(report).read_text())["install"]
    assert row["download_info"]["url"] == wheel.as_uri()
    extras = set(row["metadata"]["provides_extra"])
    assert {"cuda12", "cuda13", "quickstart"} <= extras
    done = pip(*asked, "--ignore-installed", "unic_ds")
    assert done.returncode != 0 and "deepspeed" in done.stderr
