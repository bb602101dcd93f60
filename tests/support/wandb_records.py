"""Records of W&B's offline files, read by W&B's own message types.

A file is a LevelDB log: a header of 7 bytes, then blocks of 32 KB with chunks of a checksum, a
length and a kind (whole, first, middle, last), which make up one protobuf message each.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK, CHUNK = 7, 32768, struct.Struct("<IHB")
WHOLE, LAST = 1, 4


def messages(file: Path) -> Iterator[bytes]:
    """The messages of a file, in order."""
    data = file.read_bytes()
    assert data.startswith(b":W&B")
    at, message = HEADER, b""
    while at + CHUNK.size <= len(data):
        if (left := BLOCK - at % BLOCK) < CHUNK.size:
            at += left
            continue
        _, length, kind = CHUNK.unpack_from(data, at)
        at += CHUNK.size
        if at + length > len(data):  # it is being written
            return
        message += data[at : at + length]
        at += length
        if kind in (WHOLE, LAST):
            yield message
            message = b""


def records(file: Path) -> list[Record]:
    """The records of a file."""
    return [Record.FromString(message) for message in messages(file)]


def rows(file: Path) -> list[dict[str, Any]]:
    """Rows of the history in a file, with the step as `_step`."""
    found = []
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            row = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            found.append(row | {"_step": record.history.step.num})
    return found
