"""Work that may fail: it is said once, whatever the exception, and ends nothing."""

from __future__ import annotations

import pytest

from unic_ds.training.attempts import Attempts


class Unforeseen(Exception):
    """An exception of no kind that our code raises."""


def fail() -> None:
    raise Unforeseen("it\x1b broke")


def test_any_exception_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    attempts = Attempts("a picture is missing")
    assert not attempts.on_all_ranks(fail) and not attempts.here(fail)
    assert attempts.on_all_ranks(list) and attempts.here(list)
    said = capsys.readouterr().out
    assert said.count("a picture is missing: ") == 1 and r"Unforeseen: it\x1b broke" in said
