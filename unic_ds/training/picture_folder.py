"""The pictures of a run: PNG files in OUT/pictures, and pictures.json, which lists them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, Self

from torch import Tensor

from unic_ds import files
from unic_ds.evaluate.picture_grids import Pixels, to_png
from unic_ds.files import run_files, tensor_files
from unic_ds.files.documents import read_json
from unic_ds.process import console

BASES = "pca.safetensors"
KEPT = 60
"""Pictures of a kind; of more, every second of the older ones is deleted."""

Kind = Literal["pca", "neighbours", "augmented"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A picture as pictures.json lists it."""

    file: str
    kind: str
    step: int
    title: str
    caption: str
    model: str

    @classmethod
    def read(cls, row: object) -> Self | None:
        """The entry of an object of pictures.json; None if it is none."""
        if not isinstance(row, dict):
            return None
        names = [field.name for field in fields(cls) if field.name != "step"]
        texts = {name: text for name in names if isinstance(text := row.get(name), str)}
        step = row.get("step")
        if type(step) is not int or len(texts) < len(names):
            return None
        entry = cls(step=step, **texts)
        return entry if Path(entry.file).name == entry.file and entry.file[:1] != "." else None


class PictureFolder:
    """The folder of pictures of a run; rank 0 alone has it."""

    def __init__(self, out: Path):
        self.path = out / run_files.PICTURES

    def entries(self) -> list[Entry]:
        """The pictures that there are, newest last; none if pictures.json cannot be read."""
        try:
            rows = read_json(self.path / run_files.PICTURE_LIST)
        except ValueError:
            return []
        found = [Entry.read(row) for row in rows] if isinstance(rows, list) else []
        return [entry for entry in found if entry and (self.path / entry.file).is_file()]

    def has(self, kind: Kind) -> bool:
        """True if there is a picture of a kind."""
        return any(entry.kind == kind for entry in self.entries())

    def drop_after(self, step: int) -> None:
        """Delete pictures of later steps, which an earlier start made: this one makes them anew.

        After step 0, for a run that begins, also the bases, which may be of other models.
        """
        if step == 0:
            (self.path / BASES).unlink(missing_ok=True)
        entries = self.entries()
        kept = [entry for entry in entries if entry.step <= step]
        if len(kept) < len(entries):
            self.write(kept, old=entries)

    def add(self, kind: Kind, image: Pixels, *, step: int, title: str, caption: str) -> Entry:
        """Write a picture, in place of one of the same kind and step; OSError if it fails."""
        self.path.mkdir(exist_ok=True)
        entry = Entry(
            file=f"{kind}_step_{step:07d}.png",
            kind=kind,
            step=step,
            title=title,
            caption=caption,
            model="student",
        )
        with files.open_atomic(self.path / entry.file, sync=False) as stream:
            stream.write(to_png(image))
        old = self.entries()
        others = [one for one in old if one.file != entry.file]
        same = [one for one in others if one.kind == kind]
        kept = [one for one in others if one.kind != kind] + thinned(same)
        self.write([*kept, entry], old=old)
        return entry

    def write(self, entries: list[Entry], *, old: list[Entry]) -> None:
        """Write pictures.json, and delete the files of old entries that it does not have."""
        entries = sorted(entries, key=lambda entry: entry.step)
        rows = [asdict(entry) for entry in entries]
        files.write_atomic(self.path / run_files.PICTURE_LIST, json.dumps(rows, indent=1) + "\n")
        for file in {entry.file for entry in old} - {entry.file for entry in entries}:
            (self.path / file).unlink(missing_ok=True)

    def bases(self) -> dict[str, Tensor]:
        """Tensors of the stored PCA bases; none, with a line, if the file cannot be read."""
        file = self.path / BASES
        if not file.exists():
            return {}
        try:
            return tensor_files.read(file)
        except ValueError as error:
            console.say(f"the PCA of the pictures is fitted anew: {error}")
            return {}

    def store_bases(self, state: dict[str, Tensor]) -> None:
        """Write the tensors of PCA bases; OSError if it fails."""
        self.path.mkdir(exist_ok=True)
        part = self.path / f".{BASES}.part"
        tensor_files.save(state, part)
        part.replace(self.path / BASES)


def thinned(entries: list[Entry]) -> list[Entry]:
    """The entries, or every second of them if there are `KEPT` or more; the newest stays."""
    return entries[::-1][::2][::-1] if len(entries) >= KEPT else entries
