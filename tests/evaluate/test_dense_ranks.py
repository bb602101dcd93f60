"""Heads of segmentation and depth that two ranks train are those of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import Forked
from runs import SUPPORT, run


@pytest.mark.dist
def test_two_ranks_train_the_heads_of_one(tmp_path: Path) -> None:
    """Odd numbers of images, one of which cannot be read; an error of one rank ends both."""
    found = []
    for ranks in (1, 2):
        file = tmp_path / f"{ranks}.json"
        printed = run(Forked(ranks, [str(SUPPORT / "dealt_heads.py"), str(file)]))
        assert "1 of 7 images of memory are left out:\n  2.png is cut off\n" in printed
        first, *others = json.loads(file.read_text())
        assert others == [first] * (ranks - 1)
        found.append(first)
    (masks, depths), (masks_of_2, sentence, depths_of_2, sentence_of_depth) = found
    assert sentence == sentence_of_depth
    assert sentence == "features of 'broken' are NaN or infinite; leave the model out"
    assert len(masks) == 4 and len(depths) == 10
    for one, two in ((masks, masks_of_2), (depths, depths_of_2)):
        for (value, protocol), (other, same) in zip(one, two, strict=True):
            assert other == pytest.approx(value, rel=1e-3) and same == protocol
    assert all(20 < value < 100 for value, _ in masks)
