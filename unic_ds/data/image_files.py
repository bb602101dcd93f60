"""Sources of image files: a folder, or a text file that lists paths.

No image is opened here: 1.3 million files are listed in seconds.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from unic_ds.data.source import NO_CLASS, Source, say_unlabelled
from unic_ds.data.string_table import StringTable
from unic_ds.files import open_regular
from unic_ds.files.printable import printable
from unic_ds.process import console

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp")
LONGEST_LINE = 65536
"""Bytes of the longest line of a list."""
LISTED = 8
"""File endings that a line about skipped files names."""
ONE_LINE = "a line of a list is a path, path<tab>class, or path<blank>class"


@dataclass
class Found:
    """The images below a folder, and counts of the files that are skipped."""

    names: list[str] = field(default_factory=list)
    endings: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def describe_skipped(self) -> str:
        """A sentence about the skipped files; empty if there are none."""
        total = self.endings.total() + self.reasons.total()
        parts = [by_ending(self.endings)] if self.endings else []
        parts += [f"{count} {reason}" for reason, count in sorted(self.reasons.items())]
        were = "file was" if total == 1 else "files were"
        return f"{total} {were} skipped: {', '.join(parts)}" if total else ""


def of_folder(root: Path) -> Source:
    """The images below a folder; links are followed. ValueError if there is none.

    A sample's class is the first folder below `root` on its path. Prints a line with the counts of
    skipped files.
    """
    found = walk(os.fspath(root))
    skipped = found.describe_skipped()
    if not found.names:
        counts = f" ({skipped})" if skipped else ""
        raise ValueError(
            f"no {', '.join(SUFFIXES)} below {str(root)!r}{counts}; name a folder that has images"
        )
    if skipped:
        console.say(f"{printable(root)}: {skipped}")
    names = sorted(found.names)
    return labelled(root, names, [first_folder(name) for name in names])


def of_list(file: Path) -> Source:
    """The images that a text file lists, one per line, in that order.

    A path is absolute, or relative to the list. Its class follows a tab, or a blank after the
    path's ending; without it the class is the first folder of a relative path, or the last folder
    of an absolute one. ValueError with the number of a line that is malformed.
    """
    names, classes = [], []
    for number, line in _lines(file):
        try:
            name, class_name = entry_of(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {str(file)!r} {error}") from None
        if name:
            names.append(name)
            classes.append(class_name)
    if not names:
        raise ValueError(f"list {str(file)!r} names no image; write one path per line")
    others = Counter(ending_of(name) for name in names if not name.lower().endswith(SUFFIXES))
    if others:
        console.say(
            f"{printable(file)}: {others.total()} of {len(names)} lines end in none of"
            f" {', '.join(SUFFIXES)} ({by_ending(others)}); they are read, and replaced if they"
            " are not JPEG, PNG, WebP or BMP"
        )
    return labelled(file.parent, names, classes)


def entry_of(line: str) -> tuple[str, str]:
    """(path, class) of a line of a list, "" for none; ValueError if it is malformed.

    The text alone decides: a blank separates path and class if the part before the last blank has
    the ending of an image and the whole line does not.
    """
    name, tab, class_name = line.rstrip("\r\n").partition("\t")
    name, class_name = name.rstrip(" "), class_name.strip()
    if not tab:
        head, _, last = name.rpartition(" ")
        head = head.rstrip(" ")
        if head.lower().endswith(SUFFIXES) and not name.lower().endswith(SUFFIXES):
            name, class_name = head, last
    if "\t" in class_name or (class_name and not name.strip()):
        raise ValueError(f"is '{printable(line.strip())}'; {ONE_LINE}")
    if not name.strip():
        return "", ""
    if "\0" in line:
        raise ValueError("has a zero byte; save the list as UTF-8 text")
    path = PurePosixPath(name)
    if ".." in path.parts:
        raise ValueError(f"leaves the list's folder: {name!r}; write it as an absolute path")
    folder = path.parent.name if path.is_absolute() else first_folder(name)
    return name, class_name or folder


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each line, read one at a time; only a line feed ends a line."""
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


def labelled(root: Path, names: Sequence[str], class_names: Sequence[str]) -> Source:
    """A source of files whose classes are given by name, "" for none."""
    classes = tuple(sorted(set(class_names) - {""}))
    label_of = {name: i for i, name in enumerate(classes)} | {"": NO_CLASS}
    label_N = np.array([label_of[name] for name in class_names], dtype=np.int32)
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
    """The ending of a file's name in lower case, with its dot; "" without one."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - a Path per file is slow


def by_ending(endings: Counter[str]) -> str:
    """Counts by ending, the most frequent first, as `2 .tif, 1 .gif`."""
    rows = sorted(endings.items(), key=lambda row: (-row[1], row[0]))
    parts = [f"{n} {printable(e, 20) or 'without an ending'}" for e, n in rows[:LISTED]]
    more = sum(n for _, n in rows[LISTED:])
    return ", ".join([*parts, *([f"{more} of other endings"] if more else [])])


def walk(root: str) -> Found:
    """List a folder and all below it; a folder that several links lead to is listed once.

    Folders come before links to folders, and links in the order of their paths, so the path under
    which a folder is listed depends on names alone. ValueError for a folder that cannot be listed.
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
                    f" ({error.strerror}); correct its permissions or remove it"
                ) from error
            stack += sorted(folders, reverse=True)
            links += further
    return found


def _list(root: str, prefix: str, found: Found) -> tuple[list[str], list[str]]:
    """(folders, links to folders) in a folder; all other entries are added to `found`."""
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
            except OSError:  # a link to itself, or into a folder without permission
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
