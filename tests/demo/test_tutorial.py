"""docs/tutorial.md: its commands as they stand, in a folder like the repository's root."""

import re
import shutil
import subprocess

import pytest
from runs import DEMONSTRATION, ROOT, environment

from unic_ds import demo

BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.S)
ELSEWHERE = ("make quickstart", "sbatch")
"""First words of the blocks that CI, test_long.py and test_slurm.py run."""


@pytest.mark.lengthy
@pytest.mark.slow
@DEMONSTRATION
def test_the_tutorials_commands_run(finished, tmp_path):
    for name in ("unic_ds", "ds_configs", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(finished[0], tmp_path / "runs" / "quickstart")
    here = [block for block in BLOCKS if not block.startswith(ELSEWHERE)]
    assert len(here) == len(BLOCKS) - 2
    own = {"HOME": str(tmp_path), "UNIC_DS_CACHE": str(demo.root().parent)}
    ran = subprocess.run(
        ["bash", "-ec", "\n".join(here)],
        cwd=tmp_path,
        env=environment() | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
    for file in ("quickstart/report.html", "mine/student/model.safetensors", "shards"):
        assert (tmp_path / "runs" / file).exists()
    assert list((tmp_path / "runs" / "mine" / "onnx").glob("*.onnx"))
    assert ran.stdout.splitlines().count("192") == 1  # the student's width
