"""Group the members of a tar shard into images with labels (WebDataset layout).

`0001.jpg 0001.cls` are one sample: members with the same key, the name up to the first dot of its
last part. Nothing is ever unpacked, so a name is never used as a path.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from unic_ds.data.image_files import SUFFIXES, is_hidden
from unic_ds.data.tar_headers import DEVICES, FOLDER, LINKS, REGULAR, Archive, DamagedTar, Header
from unic_ds.files import open_regular
from unic_ds.files.printable import printable

LABEL = "cls"
LONGEST_LABEL = 1024
"""Bytes of the longest `.cls` member."""

SAME_KEY = "images with the key (name up to its first dot) of another image; rename them"
NO_IMAGE = "labels (.cls) without an image of their key in the shard"
REPEATED = "labels (.cls) that another label of their key replaces"
NO_TEXT = f"labels (.cls) that are not UTF-8 text of 1 to {LONGEST_LABEL} bytes"
NUL = "members with a zero byte in their name"
HIDDEN = "hidden files (a part of the name begins with a dot, or is __MACOSX)"
LINKED = "links"
DEVICE = "devices and pipes"
OTHER = "members that are neither images nor .cls"
MAYBE_HIDDEN = re.compile(r"(^|/)(\.|__MACOSX)")
ENDING = "shards "
"""First word of a note about a shard as a whole."""
ENDINGS = 6
"""File endings that a note names."""


class Member(NamedTuple):
    """An image in a shard."""

    name: str
    offset: int
    size: int
    label: str  # text of its .cls member, "" without one


class SkippedMembers:
    """Counts of members that are not read, by reason, with the first of each as an example."""

    def __init__(self) -> None:
        self._count, self._first = Counter[str](), dict[str, str]()
        self._endings = Counter[str]()

    def add(self, reason: str, name: str, times: int = 1) -> None:
        """Count a member."""
        self._count[reason] += times
        self._first.setdefault(reason, name)

    def add_other(self, ending: str) -> None:
        """Count a member that is neither image nor label, by its ending."""
        if not ending.startswith(LABEL):
            ending = ending.rpartition(".")[2]
        self._endings[f".{printable(ending, 16)}" if ending else "without an ending"] += 1

    def merge(self, more: SkippedMembers) -> None:
        """Add the counts of another shard."""
        self._count += more._count
        self._endings += more._endings
        self._first = more._first | self._first

    def notes(self) -> list[str]:
        """One line per reason."""
        lines = [
            f"{count} {reason}, for example '{printable(self._first[reason], 100)}'"
            for reason, count in self._count.items()
        ]
        if self._endings:
            common = self._endings.most_common(ENDINGS)
            rest = self._endings.total() - sum(count for _, count in common)
            parts = [f"{count} {ending}" for ending, count in common]
            parts += [f"{rest} others"] if rest else []
            lines.append(f"{self._endings.total()} {OTHER}: {', '.join(parts)}")
        return lines


class Contents(NamedTuple):
    """The images of a shard, and counts of its other members."""

    members: list[Member]
    skipped: SkippedMembers


def members_of(tar: Path, *, hidden: bool = False) -> Contents:
    """The images of a shard, with `hidden` also hidden ones; ValueError if it is damaged."""
    try:
        with open_regular(tar) as file:
            return _Grouping(file, hidden).contents(tar.name)
    except DamagedTar as error:
        raise ValueError(
            f"shard {str(tar)!r} is not a complete tar ({error}); create it again"
        ) from error
    except OSError as error:
        raise ValueError(f"shard {str(tar)!r} cannot be read ({error.strerror})") from error


def key_of(name: str) -> tuple[str, str]:
    """(key, ending without its first dot) of a member."""
    folder, slash, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return folder + slash + stem, ending


def top_folder(name: str) -> str:
    """The first folder of a member's path other than "." and "..", or ""."""
    rest = name
    while "/" in rest:
        part, _, rest = rest.partition("/")
        if part not in ("", ".", ".."):
            return part
    return ""


class _Grouping:
    """Groups neighbouring members of a shard with one key into a sample, with one image each.

    A label that is not next to its image is matched by key after all members are read.
    """

    def __init__(self, file: BinaryIO, hidden: bool):
        self._file, self._hidden = file, hidden
        self._members, self._skipped = list[Member](), SkippedMembers()
        self._key, self._image, self._label = "", None, ""  # type: tuple[str, Member | None, str]
        self._unmatched = dict[str, str]()  # key -> label

    def contents(self, shard: str) -> Contents:
        """Read all headers; DamagedTar or OSError if that fails."""
        archive = Archive(self._file)
        for header in archive:
            if header.kind != FOLDER and not self._skip(header):
                self._add(header)
        self._close("")
        if archive.ending:
            self._skipped.add(f"{ENDING}{archive.ending}", shard)
        return Contents(self._matched(), self._skipped)

    def _skip(self, header: Header) -> bool:
        """True if a member cannot be an image or label, which is counted."""
        reason = ""
        if "\0" in header.name:
            reason = NUL
        elif (
            not self._hidden
            and MAYBE_HIDDEN.search(header.name)
            and any(map(is_hidden, header.name.split("/")))
        ):
            reason = HIDDEN
        elif header.kind in LINKS:
            reason = LINKED
        elif header.kind not in REGULAR:
            reason = DEVICE if header.kind in DEVICES else "members of an unknown kind"
        if reason:
            self._skipped.add(reason, header.name)
        return bool(reason)

    def _add(self, header: Header) -> None:
        key, ending = key_of(header.name)
        if key != self._key:
            self._close(key)
        if f".{ending.lower()}".endswith(SUFFIXES):
            if self._image is None:
                self._image = Member(header.name, header.offset, header.size, "")
            else:
                self._skipped.add(SAME_KEY, header.name)
        elif ending.lower() == LABEL:
            label = self._text(header)
            if self._label and label:
                self._skipped.add(REPEATED, header.name)
            self._label = label or self._label
        else:
            self._skipped.add_other(ending)

    def _close(self, key: str) -> None:
        """End the current sample and begin the next."""
        if self._image:
            self._members.append(self._image._replace(label=self._label))
        elif self._label:
            if self._key in self._unmatched:
                self._skipped.add(REPEATED, f"{self._key}.{LABEL}")
            self._unmatched[self._key] = self._label
        self._key, self._image, self._label = key, None, ""

    def _matched(self) -> list[Member]:
        """All images; one without a label gets the label of its key elsewhere in the shard."""
        if not self._unmatched:
            return self._members
        used = dict[str, bool]()  # key -> True if an image got the label
        for i, member in enumerate(self._members):
            key = key_of(member.name)[0]
            if key in self._unmatched:
                used[key] = used.get(key, False) or not member.label
                self._members[i] = member._replace(label=member.label or self._unmatched[key])
        for key in self._unmatched:
            if not used.get(key):
                self._skipped.add(REPEATED if key in used else NO_IMAGE, f"{key}.{LABEL}")
        return self._members

    def _text(self, header: Header) -> str:
        """The text of a label, "" if it is not valid."""
        data = os.pread(self._file.fileno(), min(header.size, LONGEST_LABEL + 1), header.offset)
        try:
            text = data.decode().strip() if len(data) <= LONGEST_LABEL else ""
        except UnicodeDecodeError:
            text = ""
        if not text or "\0" in text:
            self._skipped.add(NO_TEXT, header.name)
            return ""
        return text


def merged(parts: Iterable[Contents]) -> tuple[list[list[Member]], SkippedMembers]:
    """The members of each shard, and the counts of skipped members of all."""
    skipped, members = SkippedMembers(), []
    for part in parts:
        members.append(part.members)
        skipped.merge(part.skipped)
    return members, skipped
