"""Images that are files of their own: a folder of them, or a list.

Nothing is opened here: 1.3 million files are listed in seconds.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from unic_ds.data.source import FLAT, Source, say_unlabelled
from unic_ds.data.string_table import StringTable
from unic_ds.files import open_regular
from unic_ds.files.printable import printable
from unic_ds.process import console

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp")
LONGEST_LINE = 65536
"""Bytes of a list's longest line."""
LISTED = 8
"""Endings that a line about other files names."""
ONE_LINE = "a line of a list is a path, path<tab>class, or path<blank>class"


@dataclass
class Found:
    """The images below a folder, and counts of everything else there."""

    names: list[str] = field(default_factory=list)
    endings: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def passed_over(self) -> str:
        """A sentence about what is there but no image; empty if there is nothing else."""
        total = self.endings.total() + self.reasons.total()
        parts = [by_ending(self.endings)] if self.endings else []
        parts += [f"{count} {reason}" for reason, count in sorted(self.reasons.items())]
        were = "file was" if total == 1 else "files were"
        return f"{total} {were} passed over: {', '.join(parts)}" if total else ""


def of_folder(root: Path) -> Source:
    """The images below a folder, links followed; ValueError where there is none.

    A sample's class is the first folder below `root` on its path. One line says how many other
    files were passed over.
    """
    found = walk(os.fspath(root))
    others = found.passed_over()
    if not found.names:
        there = f" ({others})" if others else ""
        raise ValueError(
            f"no {', '.join(SUFFIXES)} below {str(root)!r}{there}; name a folder that has images"
        )
    if others:
        console.say(f"{printable(root)}: {others}")
    names = sorted(found.names)
    return labelled(root, names, [first_folder(name) for name in names])


def of_list(file: Path) -> Source:
    """The images that a text file names, one a line, in that order.

    A path is absolute, or relative to the list. Its class stands after a tab, or after a blank
    that follows the path's ending; without it the class is the first folder of a relative path,
    the last of an absolute one. ValueError names the line that cannot be such.
    """
    names, tops = [], []
    for number, line in _lines(file):
        try:
            name, top = entry_of(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {str(file)!r} {error}") from None
        if name:
            names.append(name)
            tops.append(top)
    if not names:
        raise ValueError(f"list {str(file)!r} names no image; write one path a line")
    others = Counter(ending_of(name) for name in names if not name.lower().endswith(SUFFIXES))
    if others:
        console.say(
            f"{printable(file)}: {others.total()} of {len(names)} lines end in none of"
            f" {', '.join(SUFFIXES)} ({by_ending(others)}): they are read all the same, and"
            " replaced where they are no JPEG, PNG, WebP or BMP"
        )
    return labelled(file.parent, names, tops)


def entry_of(line: str) -> tuple[str, str]:
    """(path, class) of a list's line, "" for none; ValueError says what is wrong with it.

    A function of the text alone: a blank separates path and class where what stands before the
    last one ends like an image and the whole line does not.
    """
    name, tab, top = line.rstrip("\r\n").partition("\t")
    name, top = name.rstrip(" "), top.strip()
    if not tab:
        head, _, last = name.rpartition(" ")
        head = head.rstrip(" ")
        if head.lower().endswith(SUFFIXES) and not name.lower().endswith(SUFFIXES):
            name, top = head, last
    if "\t" in top or (top and not name.strip()):
        raise ValueError(f"is '{printable(line.strip())}'; {ONE_LINE}")
    if not name.strip():
        return "", ""
    if "\0" in line:
        raise ValueError("has a zero byte, which no path has; save the list as UTF-8 text")
    path = PurePosixPath(name)
    if ".." in path.parts:
        raise ValueError(f"leaves the list's folder: {name!r}; write it as an absolute path")
    own = path.parent.name if path.is_absolute() else first_folder(name)
    return name, top or own


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line that ends in a line feed, read one at a time."""
    try:
        with open_regular(file) as stream:
            number = 0
            while line := stream.readline(LONGEST_LINE + 1):
                number += 1
                if number == 1:
                    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                        raise ValueError(f"list {str(file)!r} is UTF-16 text; save it as UTF-8")
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if len(line) > LONGEST_LINE:
                    raise ValueError(
                        f"line {number} of {str(file)!r} has more than {LONGEST_LINE} bytes;"
                        f" {ONE_LINE}"
                    )
                yield number, os.fsdecode(line)
    except OSError as error:
        raise ValueError(f"list {str(file)!r} cannot be read ({error.strerror})") from error


def labelled(root: Path, names: Sequence[str], tops: Sequence[str]) -> Source:
    """A source of files whose classes are given by name, "" for none."""
    classes = tuple(sorted(set(tops) - {""}))
    number = {top: i for i, top in enumerate(classes)} | {"": FLAT}
    label_N = np.array([number[top] for top in tops], dtype=np.int32)
    if classes:
        say_unlabelled(root, label_N)
    return Source(root, StringTable.of(names), classes, label_N)


def first_folder(name: str) -> str:
    """The first folder of a relative path, or ""."""
    return name.partition("/")[0] if "/" in name else ""


def is_hidden(name: str) -> bool:
    """True for a name that begins with a dot, and for the folder that macOS adds to archives."""
    return name == "__MACOSX" or (name.startswith(".") and name not in (".", ".."))


def ending_of(name: str) -> str:
    """The ending of a file's name in small letters, with its dot; "" without one."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - a Path per file is slow


def by_ending(endings: Counter[str]) -> str:
    """Numbers by ending, the most frequent first, as `2 .tif, 1 .gif`."""
    rows = sorted(endings.items(), key=lambda row: (-row[1], row[0]))
    parts = [f"{n} {printable(e, 20) or 'without an ending'}" for e, n in rows[:LISTED]]
    more = sum(n for _, n in rows[LISTED:])
    return ", ".join([*parts, *([f"{more} of other endings"] if more else [])])


def walk(root: str) -> Found:
    """The contents of a folder; each real folder is listed once, however many links lead to it.

    Folders come before links to folders, and these in the order of their paths, so which path a
    folder has depends on names alone. ValueError for a folder that cannot be listed.
    """
    found, seen, links = Found(), set(), [""]
    while links:
        stack, links = sorted(links, reverse=True), []
        while stack:
            prefix = stack.pop()
            try:
                stat = os.stat(f"{root}/{prefix}")  # noqa: PTH116 - a Path triples a scan's time
                if (stat.st_dev, stat.st_ino) in seen:
                    found.reasons["linked to a folder that is listed already"] += 1
                    continue
                seen.add((stat.st_dev, stat.st_ino))
                folders, further = _list(root, prefix, found)
            except OSError as error:
                raise ValueError(
                    f"image folder '{printable(f'{root}/{prefix}')}' cannot be listed"
                    f" ({error.strerror}); mend its permissions or remove it"
                ) from error
            stack += sorted(folders, reverse=True)
            links += further
    return found


def _list(root: str, prefix: str, found: Found) -> tuple[list[str], list[str]]:
    """(folders, links to folders) in a folder; images and the rest are added to `found`."""
    folders: list[str] = []
    links: list[str] = []
    with os.scandir(f"{root}/{prefix}") as entries:
        for entry in entries:
            name = entry.name
            if is_hidden(name):
                found.reasons["hidden (a dot first, or __MACOSX)"] += 1
                continue
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself, or to where nobody may look
                is_folder = is_file = False
            if is_folder:
                (links if entry.is_symlink() else folders).append(f"{prefix}{name}/")
            elif not is_file:
                found.reasons["linked to nothing" if entry.is_symlink() else "not regular"] += 1
            elif name.lower().endswith(SUFFIXES):
                found.names.append(prefix + name)
            else:
                found.endings[ending_of(name)] += 1
    return folders, links
