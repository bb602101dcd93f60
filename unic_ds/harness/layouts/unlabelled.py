"""Images without labels, in any folders, below `train/` or below the folder itself."""

from __future__ import annotations

from pathlib import Path

from unic_ds.config import Config
from unic_ds.files.printable import printable
from unic_ds.harness.image_sets import SampledImages, scan


def open_sets(folder: Path, cfg: Config) -> dict[str, SampledImages]:
    """The images as `train`; ValueError if there are none."""
    train = folder / "train"
    source = scan(str(train if train.is_dir() else folder))
    name = printable(folder.name)
    return {"train": SampledImages(source, cfg, cfg.eval.max_train, labelled=False, name=name)}
