"""The parity script from outside: lines and exit codes, on good vectors, wrong ones and none."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import parity
import plain
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "vectors"
LINE = re.compile(
    r"\S.*\S +(\d\.\de[+-]\d\d|inf)  (ok|OVER) \(tolerance 1e-0[45](; worst: \S.*)?\)"
)


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "tests" / "support" / "parity.py")
    return subprocess.run(
        [sys.executable, script, str(folder)], cwd="/", capture_output=True, text=True, timeout=300
    )


def test_the_published_vectors_pass() -> None:
    done = run(DATA)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, total = [x for x in done.stdout.splitlines() if not x.startswith("skipped: ")]
    assert all(LINE.fullmatch(line) for line in lines), lines
    assert len(lines) == 5 * 4 + 3 * 4 + 3 + 2
    assert total == f"{len(lines)} of {len(lines)} quantities within their tolerances"
    assert f"skipped: {DATA} has no published_format.pth" in done.stdout


@pytest.mark.parametrize(
    ("file", "key", "quantity"),
    [
        ("loss.npz", "case1_loss_TB", "loss case1 loss_TB"),
        ("loss.npz", "case2_coeff_T", "loss case2 coefficients"),
        ("loss.npz", "case3_grad_b_patch", "loss case3 gradients"),
        ("ladder.npz", "case0_y_a_cls", "ladder case0 outputs"),
        ("ladder.npz", "case1_gx_patch2", "ladder case1 input gradients"),
        ("ladder.npz", "case2_gw:heads.b.patch.3.layers.1.bias", "ladder case2 weight gradients"),
        ("standardise.npz", "patch4_y", "standardise y"),
        ("standardise.npz", "cls2_mean_after", "standardise mean"),
        ("standardise.npz", "patch0_std_after", "standardise std"),
    ],
)
def test_one_wrong_number_is_found(file: str, key: str, quantity: str, tmp_path: Path) -> None:
    arrays = parity.load(DATA / file)
    at = np.abs(arrays[key]).argmax()
    arrays[key].flat[at] *= 1 + 3e-5
    np.savez(tmp_path / file, **arrays)
    assert [line[:34].strip() for line in wrong(tmp_path)] == [quantity]


def wrong(folder: Path) -> list[str]:
    """The lines over their tolerance, of a folder of one file."""
    (file,) = folder.iterdir()
    return parity.over(parity.CHECKS[file.name](file))


def test_one_wrong_number_is_a_line_and_exit_code_1(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DATA, tmp_path / "vectors"))
    schedules = json.loads((folder / "schedules.json").read_text())
    schedules["lr"]["values"][259] *= 1 + 3e-5  # 600 times smaller than the peak
    (folder / "schedules.json").write_text(json.dumps(schedules))
    done = run(folder)
    assert done.returncode == 1, done.stdout + done.stderr
    over = [line for line in done.stdout.splitlines() if " OVER " in line]
    assert len(over) == 1 and over[0].startswith("schedules lr ") and "step 260" in over[0]


def test_a_name_too_many_is_named(tmp_path: Path) -> None:
    arrays = parity.load(DATA / "ladder.npz")
    arrays["case1_w:heads.a.cls.1.scale"] = np.ones(1)
    np.savez(tmp_path / "ladder.npz", **arrays)
    (line,) = wrong(tmp_path)
    assert line.startswith("ladder case1 names") and "worst: heads.a.cls.1.scale" in line


def test_nan_and_other_shapes_are_infinitely_wrong() -> None:
    ones = torch.ones(3)
    assert parity.error(ones * torch.nan, ones) == parity.error(ones[:2], ones) == torch.inf
    assert parity.error(ones, ones * torch.nan) == torch.inf
    assert parity.error(ones, torch.zeros(3)) == torch.inf
    assert parity.error(torch.zeros(3), torch.zeros(3)) == 0


def test_nothing_to_compare_is_exit_code_2(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 2
    assert "holds none of loss.npz" in done.stderr
    (tmp_path / "loss.npz").write_bytes(b"no vectors")
    done = run(tmp_path)
    assert done.returncode == 2
    assert "loss.npz holds no such vectors" in done.stderr
    assert "Traceback" not in done.stderr


def test_vectors_of_another_seed_and_size(tmp_path: Path) -> None:
    teachers = {"clip_h": 9, "b": 17, "c_3": 4}
    plain.write_loss(
        tmp_path / "loss.npz",
        seed=11,
        sizes=[
            {"widths": teachers, "images": 4, "patches": 6, "drop": 0.7},
            {"widths": {"one": 5}, "images": 3, "patches": 1, "drop": 0.5},
            {"widths": teachers, "images": 2, "patches": 3, "drop": 0.0},
        ],
    )
    size = {"width": 10, "depth": 6, "widths": teachers, "hidden": (6, 14)}
    plain.write_ladder(
        tmp_path / "ladder.npz",
        seed=12,
        sizes=[size, size | {"blocks": [0, 2, 5], "prenorm": True}, size | {"midnorm": True}],
    )
    plain.write_standardise(tmp_path / "standardise.npz", seed=13, steps=7, width=11)
    plain.write_schedules(
        tmp_path / "schedules.json",
        lr={"base_value": 2e-3, "final_value": 1e-5, "epochs": 7, "niter_per_ep": 9}
        | {"warmup_epochs": 2},
        tnorm_momentum={"base_value": 1.0, "final_value": 0.01, "epochs": 7, "niter_per_ep": 9}
        | {"warmup_epochs": 0},
    )
    plain.write_published(tmp_path, seed=14, widths={"clip_h": 20, "b": 12}, grid=3)
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
    assert len(done.stdout.splitlines()) == 3 * 4 + 3 * 4 + 3 + 2 + 8 + 1
