"""Check every byte and row of a pack: `unic-ds pack verify`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from unic_ds import dist
from unic_ds.config import Data
from unic_ds.data import shard_index, shards
from unic_ds.data.index_format import Tables
from unic_ds.data.members import Member, members_of
from unic_ds.data.reader import measure
from unic_ds.data.string_table import StringTable
from unic_ds.files import sha256
from unic_ds.files.printable import printable
from unic_ds.process import console

LISTED = 10  # faults that the error names


def verify(out: Path) -> str:
    """Compare a pack's shards with its index; returns a sentence for the user.

    ValueError if `out` is not a pack, RuntimeError with the faults.
    """
    file = out / shards.INDEX
    if not file.exists():
        raise ValueError(f"{str(out)!r} is not a finished pack; make one with unic-ds pack SRC OUT")
    tables = shard_index.load(file, shards.found_in(out))
    if "sha256_S" not in tables:
        raise ValueError(
            f"{str(out)!r} was not packed by unic-ds, so it has no checksums; pack it"
            " into a new folder"
        )
    named = list(StringTable.cut(tables["shards"].tobytes()))
    names = StringTable.cut(tables["names"].tobytes())
    with ThreadPoolExecutor(dist.cores()) as pool:
        check = partial(_faults, out, tables, named, names)
        done = console.track(pool.map(check, range(len(named))), len(named), "verifying")
        faults = [fault for found in done for fault in found]
    unknown = sorted({tar.name for tar in shards.found_in(out)} - set(named))
    faults += [f"{name}: is not in the index" for name in unknown]
    if faults:
        more = [f"  and {len(faults) - LISTED} more"] if len(faults) > LISTED else []
        head = f"{str(out)!r} is damaged, {len(faults)} faults; pack it again into a new folder:"
        raise RuntimeError("\n".join([head, *(f"  {x}" for x in faults[:LISTED]), *more]))
    size = int(tables["bytes_S"].sum()) / 1e6
    return f"{out} is intact: {len(names)} images in {len(named)} shards, {size:.1f} MB"


def _faults(out: Path, tables: Tables, named: list[str], names: StringTable, s: int) -> list[str]:
    """The faults of shard `s`."""
    tar = out / named[s]
    if not tar.exists():
        return [f"{tar.name}: is missing"]
    try:
        if sha256(tar) != tables["sha256_S"][s].tobytes().hex():
            return [f"{tar.name}: its bytes have changed (SHA-256)"]
        members = members_of(tar, hidden=True).members
    except (OSError, ValueError) as error:
        return [f"{tar.name}: {printable(error)}"]
    rows = np.flatnonzero(tables["shard_N"] == s).tolist()
    classes = list(StringTable.cut(tables["classes"].tobytes()))
    if len(members) != len(rows):
        return [f"{tar.name}: {len(members)} images, {len(rows)} in the index"]
    faults = []
    for i, member in zip(rows, members, strict=True):
        row = (names[i], int(tables["offset_N"][i]), int(tables["size_N"][i]))
        if member[:3] != row:
            faults.append(f"{tar.name}: {member[:3]}, {row} in the index")
            continue
        shown, label = printable(member.name), int(tables["label_N"][i])
        if label >= len(classes) or member.label != (str(label) if label >= 0 else ""):
            faults.append(f"{tar.name}: {shown} has class {member.label!r}, {label} in the index")
        sides = (int(tables["width_N"][i]), int(tables["height_N"][i]))
        if (found := _sides(tar, member)) != sides:
            faults.append(f"{tar.name}: {shown} measures {found}, {sides} in the index")
    return faults


def _sides(tar: Path, member: Member) -> tuple[int, int] | str:
    """(width, height) of an image in a shard, or the reason why it cannot be read."""
    encoded = np.fromfile(tar, np.uint8, member.size, offset=member.offset)
    try:
        return measure(encoded, Data().max_megapixels)
    except ValueError as error:
        return str(error)
