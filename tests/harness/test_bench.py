"""The benchmark of the evaluation measures every part, and writes its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pictures import folder

from unic_ds.harness import bench


def test_it_measures_every_part(tmp_path: Path, capsys: Any) -> None:
    images, file = folder(tmp_path / "images", 40), tmp_path / "bench.json"
    words = ["--scale", "0.01", "--rounds", "1", "--threads", "1"]
    bench.main([*words, "--images", str(images), "--json", str(file)])
    result = json.loads(file.read_text())
    assert list(result["figures"]) == list(bench.PARTS)
    printed = capsys.readouterr().out
    for name, figure in result["figures"].items():
        assert figure["value"] > 0 and name in printed
        low, high = sorted((figure["value"], figure["target"]))
        assert figure["meets"] is ((high if figure["least"] else low) == figure["value"])
    assert result["figures"]["probe"]["more"]["images"] == 32
    assert result["figures"]["lbfgs"]["more"]["trials"] == 2
    bench.main([*words, "--only", "sgd", "--json", str(file)])
    assert list(json.loads(file.read_text())["figures"]) == ["sgd"]
