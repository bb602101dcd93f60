"""Images without labels, for the effective rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pictures import encode, folder, photo

from unic_ds import config
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import pixels_model
from unic_ds.evaluate.rankme import effective_rank
from unic_ds.evaluate.registry import evaluate_models
from unic_ds.harness import layouts

CFG = config.Config(data=config.Data(threads=1), eval=config.Eval(max_train=9))


def test_any_images_have_an_effective_rank(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name a folder that has images"):
        layouts.open_sets("rankme", tmp_path, CFG)
    folder(tmp_path / "train", 8)
    for i in range(4):  # without a class
        (tmp_path / "train" / f"{i}.jpg").write_bytes(encode(photo(seed=i)).tobytes())
    (tmp_path / "val").mkdir()  # not read
    sets = layouts.open_sets("rankme", tmp_path, CFG)
    assert [len(images) for images in sets.values()] == [9]
    data = EvalData(sets, options=CFG.eval, seed=0, device=torch.device("cpu"))
    (score,) = evaluate_models([pixels_model(32)], data, ["rankme"])
    x_NC = data.features_of([pixels_model(32)], "train").cls["pixels"]
    assert len(x_NC) == 9 and 1 < score.value == effective_rank(x_NC, data.device) < 9.01
    assert score.protocol == "rankme eps=1e-07 of at most 9, 9 training images 32 px"
