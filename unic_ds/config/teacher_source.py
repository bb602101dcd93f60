"""A teacher's source, `KIND:REST`, parsed into its parts. Stdlib only.

timm:MODEL                   published weights by timm's name, as vit_base_patch14_dinov2.lvd142m
open_clip:MODEL/TAG          published weights by open_clip's names
file:PATH#arch=MODEL         a weight file of a timm architecture
run:PATH                     the student of a finished run, or a model folder
python:MODULE:FUNCTION       the torch module that a user's function returns
KIND:REST                    a kind that a plugin has added to the registry of sources
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath

from unic_ds.config.option import check

GRAMMAR = {
    "timm": "timm:NAME",
    "open_clip": "open_clip:ARCH/TAG",
    "file": "file:PATH#arch=TIMM_NAME",
    "run": "run:PATH",
    "python": "python:MODULE:FUNCTION",
}
"""Kinds of source that come with unic_ds, and how each is written."""

KIND = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class TeacherSource:
    """The parts of a source; those that its kind does not have are empty."""

    text: str  # unparsed, as in files on disk
    kind: str
    rest: str  # what follows `KIND:`
    model: str = ""  # by its library's name: timm's (with its tag, if one was given), open_clip's
    tag: str = ""  # open_clip: of the published weights
    path: str = ""  # file: of the weights, run: of a folder; `~` not expanded
    module: str = ""  # python
    function: str = ""  # python

    @classmethod
    def parse(cls, text: str, option: str = "a teacher's source") -> TeacherSource:
        """Parse a source; ValueError, naming the option, for any other text.

        The rest of a kind that is not built in stays unparsed: a plugin may have registered it.
        """
        kind, _, rest = text.partition(":")
        valid = bool(KIND.fullmatch(kind)) and rest != ""
        check(valid, option, "timm:, open_clip:, file:, run: or python: and a name", text)
        parts: dict[str, str] = {}
        if kind == "timm":
            parts = {"model": rest}
        elif kind == "open_clip":
            parts["model"], slash, parts["tag"] = rest.partition("/")
            check(slash != "", option, GRAMMAR[kind], text)
        elif kind == "file":
            parts["path"], arch, parts["model"] = rest.rpartition("#arch=")
            check(arch != "", option, GRAMMAR[kind], text)
        elif kind == "run":
            parts = {"path": rest}
        elif kind == "python":
            parts["module"], _, parts["function"] = rest.partition(":")
            check(rest.count(":") == 1, option, GRAMMAR[kind], text)
        return cls(text=text, kind=kind, rest=rest, **parts)

    @property
    def arch(self) -> str:
        """The model's architecture: timm's name without the tag of its weights."""
        return self.model if self.kind == "open_clip" else self.model.partition(".")[0]

    @property
    def without_folders(self) -> str:
        """The text without the folders of the machine that it was written on."""
        if self.kind == "file":
            return f"file:{PurePath(self.rest).name}"
        return f"run:{self.run_name}" if self.kind == "run" else self.text

    @property
    def science(self) -> str:
        """The text without a run's path, which may change: its weights' content identifies it."""
        return "run:" if self.kind == "run" else self.text

    @property
    def run_name(self) -> str:
        """The name of a `run:` source's folder; that of the run for its `student/`."""
        path = PurePath(self.path)
        return path.parent.name if path.name == "student" and path.parent.name else path.name

    @property
    def default_name(self) -> str:
        """A teacher's name made from its source: its model, file or function, in a-z, 0-9 and _."""
        rest = self.rest.partition("#")[0]
        stem = rest.rsplit("/")[-1] if self.kind == "file" else rest.split("/")[0].split(":")[-1]
        stem = self.run_name if self.kind == "run" else stem.split(".")[0]
        name = re.sub(r"[^a-z0-9]+", "_", stem.lower()).strip("_")
        return name if KIND.fullmatch(name) else f"t_{name}"
