"""docs/evaluation.md: its commands on small data, as they stand, in a home of their own."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from caption_tower import STAMPS
from runs import DEMONSTRATION, ROOT, environment

from unic_ds import demo
from unic_ds.evaluate import comparison

COMMANDS = re.search(
    r"## Try it.*?```bash\n(.*?)```", (ROOT / "docs" / "evaluation.md").read_text(), re.S
)
KINDS = ("knn", "zeroshot", "teacher", "transfer", "correspondence", "segmentation", "detection")


@pytest.mark.lengthy
@pytest.mark.slow
@pytest.mark.skipif(not STAMPS.is_dir(), reason="needs Debian's tuxpaint-stamps-default")
@DEMONSTRATION
def test_the_commands_of_the_docs_print_one_table_of_every_kind_of_task(tmp_path: Path) -> None:
    for name in ("tests", "unic_ds", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    assert COMMANDS
    commands = COMMANDS[1].replace("PYTHONPATH=", "PYTHONPATH=$PYTHONPATH:").rstrip()
    own = {"HOME": str(tmp_path), "UNIC_DS_CACHE": str(demo.root().parent), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        ["bash", "-ec", f"{commands} --out compared"],
        cwd=tmp_path,
        env=environment() | own,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-4000:]
    found = comparison.read(tmp_path / "compared")
    assert list(found.roles) == ["stamps", "clip", "effnet", "pixels"]
    names = [row.name for row in found.rows]
    assert all(any(name.startswith(kind) for name in names) for kind in KINDS), names
    assert all(row.protocols.keys() == row.values.keys() for row in found.rows)
    rows = {row.name: row.values for row in found.rows}
    assert rows["knn"]["effnet"] > 100 / 6  # of six groups of stamps
    assert rows["zeroshot clip"].keys() == {"stamps", "clip"}
    for name in ("segmentation mIoU", "detection box AP", "correspondence PCK@0.1"):
        assert rows[name].keys() == {"stamps", "clip", "effnet"}
