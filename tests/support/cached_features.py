"""Extracts features into a cache, slowly, so that it can be killed: `cached_features.py FOLDER`.

FOLDER/images has images. Every rank prints the sum of its rows at the end.
"""

import sys
import time
from pathlib import Path

import torch

from unic_ds import data, dist
from unic_ds.config import Config, Data, Eval
from unic_ds.evaluate.extraction import extract
from unic_ds.evaluate.features import Model, Outputs, pixels
from unic_ds.harness import feature_cache
from unic_ds.harness.feature_cache import FeatureCache
from unic_ds.harness.image_sets import SampledImages

FOLDER = Path(sys.argv[1])
SLEEP_S = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
feature_cache.FLUSH_S = 0.0  # every batch is a part


def encode(image_B3HW, _):
    """Thumbnails; a line of a file counts the images, so that a test knows which were encoded."""
    time.sleep(SLEEP_S)
    with (FOLDER / "encoded").open("a") as file:
        file.write(f"{len(image_B3HW)}\n")
    return Outputs(pixels(image_B3HW, 4))


if __name__ == "__main__":
    dist.start()
    cfg = Config(data=Data(backend="torch", bad_limit=1.0), eval=Eval(batch=2))
    images = SampledImages(data.scan(str(FOLDER / "images")), cfg, labelled=False)
    model = Model("pixels", 16, frozenset({"cls"}), encode, identity="pixels")
    found = extract([model], images, FeatureCache(FOLDER / "cache"))
    weight_R = 1.0 + found.place_R.double()
    total = dist.all_reduce_sum(weight_R @ found.cls["pixels"].double().sum(1))
    count = dist.all_reduce_sum(torch.tensor(len(found.place_R)))
    if dist.rank() == 0:
        (FOLDER / "found").write_text(f"{int(count)} {float(total):.6f}")
