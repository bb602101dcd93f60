"""Samples that can be read; the others are left out of all models alike, counted and named."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from unic_ds import dist
from unic_ds.evaluate.rank_errors import raised_on_all_ranks
from unic_ds.evaluate.samples import SampleSet, UnreadableImage, mapped_ahead
from unic_ds.files.printable import printable
from unic_ds.process import console

log = logging.getLogger("unic_ds.evaluate")
Item = TypeVar("Item")
Prepared = TypeVar("Prepared")


def prepared(
    samples: SampleSet[Any],
    places: Iterable[int | None],
    prepare: Callable[[int, Any], Prepared],
    *,
    failures: set[str],
) -> Iterator[Prepared | None]:
    """Yield `prepare(number, sample)` of each place, None if it cannot be read or for no place.

    Threads read and prepare in advance; `number` counts the places from 0. The reason of a failure,
    which names the file, is added to `failures` and logged the first time.
    """

    def read(numbered: tuple[int, int | None]) -> Prepared | UnreadableImage | None:
        number, place = numbered
        if place is None:
            return None
        try:
            return prepare(number, samples.read(place))
        except UnreadableImage as error:
            return error

    for found in mapped_ahead(read, enumerate(places)):
        if not isinstance(found, UnreadableImage):
            yield found
            continue
        if str(found) not in failures:
            failures.add(str(found))
            log.warning("%s; it is left out", printable(found))
        yield None


def in_rounds(
    items: Iterable[Item | None], size: int, *, rounds: int, task: str, remedy: str
) -> Iterator[list[Item]]:
    """This rank's items, without None, of `size` at a time: `rounds` lists, some perhaps empty.

    Every rank calls it with the same `rounds`, so that all encode equally often: a model may have
    collectives. `task` and `remedy` as `raised_on_all_ranks`.
    """
    left = iter(items)
    for _ in range(rounds):
        with raised_on_all_ranks(task, remedy):
            group = [item for item in islice(left, size) if item is not None]
        yield group


def rounds_of(count: int, size: int) -> int:
    """Rounds in which all ranks have seen `count` items, each `size` at a time."""
    return -(-count // (size * dist.world()))


def say_left_out(task: str, failures: set[str]) -> int:
    """Print how many images all ranks left out, and the first; the count. Every rank calls it."""
    found = sorted(set().union(*dist.all_gather_objects(failures)))
    if found:
        were = "image was" if len(found) == 1 else "images were"
        first = printable(found[0])
        console.say(f"{task}: {len(found)} {were} left out of all models; first: {first}")
    return len(found)
