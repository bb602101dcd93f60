"""Classes of the images in tar shards, from `.cls` members or folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from unic_ds.data.members import Member, top_folder
from unic_ds.data.source import NO_CLASS
from unic_ds.files import TEXT_LIMIT, read_limited
from unic_ds.files.printable import printable

CLASSES = "classes.txt"


class Classified(NamedTuple):
    """Class names, the label of each image (-1: no class), and notes for the user."""

    classes: list[str]
    label_N: list[int]
    notes: list[str]


def class_names(folder: Path) -> list[str]:
    """The lines of `classes.txt`: names of classes 0, 1, ...; empty without such a file.

    ValueError if it is not a text file.
    """
    file = folder / CLASSES
    try:
        data = read_limited(file, TEXT_LIMIT)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"{str(file)!r} cannot be read ({error.strerror})") from error
    if b"\0" in data:
        raise ValueError(f"{str(file)!r} is not a text file: it has a zero byte")
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    return lines.split("\n") if lines else []


def classified(members: Sequence[Member], known: Sequence[str]) -> Classified:
    """The class of each image: its `.cls` label, or without one its first folder.

    `known` has the names of numeric labels, in order. ValueError for a number beyond its length.
    """
    given = {member.label for member in members} - {""}
    folder_B = [top_folder(member.name) for member in members if not member.label]
    folders = set(folder_B) - {""}
    text = sorted(label for label in given if not is_number(label))
    strange = sorted(folders - set(known))
    notes = []
    if known and (text or (strange and not given)):
        why = f"label '{printable(text[0])}' is not a number" if text else _lacks(strange)
        notes, known = [f"{CLASSES} is ignored: {why}"], ()
    elif known and strange:
        notes = [f"folders of images without a label become further classes: {_lacks(strange)}"]
    twice = [name for name, times in Counter(known).items() if times > 1]
    if twice:
        notes.append(f"{CLASSES} names '{printable(twice[0])}' twice; both lines are one class")
    if known:
        _check_numbers(members, len(known))
        named = {label: known[int(label)] for label in given}
        classes = [*known, *strange]
    else:
        named = {label: label for label in given}
        classes = sorted(given | folders, key=str if text else _by_number)
    label_of = {name: i for i, name in enumerate(classes)} | {"": NO_CLASS}
    folder = iter(folder_B)
    label_N = [label_of[named[m.label] if m.label else next(folder)] for m in members]
    return Classified(classes, label_N, [*notes, *_mixed(folder_B, len(members))])


def is_number(label: str) -> bool:
    """True if a label is the number of a class."""
    return label.isascii() and label.isdecimal() and len(label) <= 18


def _check_numbers(members: Sequence[Member], classes: int) -> None:
    for member in members:
        if member.label and int(member.label) >= classes:
            raise ValueError(
                f"'{printable(member.name)}' has class {member.label}, but {CLASSES} names"
                f" {classes}; add the missing names"
            )


def _by_number(label: str) -> tuple[bool, int, str]:
    """Sort key: numbers by value, then text."""
    return (False, int(label), label) if is_number(label) else (True, 0, label)


def _lacks(folders: Sequence[str]) -> str:
    more = f" and {len(folders) - 1} more" if len(folders) > 1 else ""
    return f"it does not list folder '{printable(folders[0])}'{more}"


def _mixed(folder_B: Sequence[str], images: int) -> list[str]:
    """A note if only some images have no label; `folder_B` has the folders of those."""
    if not folder_B or len(folder_B) == images:
        return []
    unlabelled = folder_B.count("")
    return [
        f"{len(folder_B)} of {images} images have no label (.cls): the class of"
        f" {len(folder_B) - unlabelled} is their folder, {unlabelled} have no class"
    ]
