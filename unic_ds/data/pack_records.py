"""Records of the finished shards of an unfinished pack, one JSON file each."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from unic_ds.files import read_limited
from unic_ds.files.printable import printable

LARGEST = 256 << 20
"""Bytes of the largest record that is read; an image takes about 100."""
MEMBER = (str, int, int, int, int, int)
SIDES = 1 << 31
"""Above every label, width and height."""


@dataclass(frozen=True)
class Record:
    """A finished shard."""

    end: int  # number of the chunk after its last
    bytes: int
    sha256: str
    members: list[tuple[str, int, int, int, int, int]]
    """(name, offset, size, label, width, height)"""
    broken: list[tuple[str, str]]  # (name in the source, reason)


def read_record(file: Path, *, images: int, chunk: int, begin: int) -> Record:
    """Read the record of the shard that begins with chunk `begin`.

    A chunk has `chunk` samples; the source has `images`. ValueError if the record is damaged, or
    its number of images is not that of its chunks.
    """
    remedy = "delete it to have its shard packed again"
    row = read_object(file, remedy)
    if not _is_record(row):
        raise ValueError(f"{str(file)!r} is not the record of a shard; {remedy}")
    record = Record(**row)
    expected = min(record.end * chunk, images) - begin * chunk
    if record.end <= begin or expected != len(record.members) + len(record.broken):
        raise ValueError(f"{str(file)!r} does not fit its pack; {remedy}")
    return record


def read_object(file: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object; ValueError with the `remedy` if the file is not one."""
    try:
        found = json.loads(read_limited(file, LARGEST))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is damaged ({printable(error)}); {remedy}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(file)!r} is damaged (it is not a JSON object); {remedy}")
    return found


def _is_record(row: dict[str, Any]) -> bool:
    """True if a JSON object has the keys and types of a Record."""
    if row.keys() != {field.name for field in fields(Record)}:
        return False
    if type(row["end"]) is not int or type(row["bytes"]) is not int:
        return False
    if not isinstance(row["members"], list) or not isinstance(row["broken"], list):
        return False
    members = all(
        _are(member, MEMBER) and _is_name(member[0]) and _in_range(*member[1:])
        for member in row["members"]
    )
    return members and _is_sha256(row["sha256"]) and all(_are(x, (str, str)) for x in row["broken"])


def _are(row: object, kinds: tuple[type, ...]) -> bool:
    return isinstance(row, list) and tuple(map(type, row)) == kinds


def _in_range(offset: int, size: int, label: int, width: int, height: int) -> bool:
    in_file = min(offset, size) >= 0 and max(offset, size) < 1 << 62
    return in_file and -1 <= label < SIDES and 0 <= min(width, height) <= max(width, height) < SIDES


def _is_name(name: str) -> bool:
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _is_sha256(text: object) -> bool:
    try:
        return isinstance(text, str) and len(bytes.fromhex(text)) == 32
    except ValueError:
        return False
