"""Declaration of a verb of `unic-ds`, from which its help is printed and its command line read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Generic, Literal, TypeVar, get_type_hints

from unic_ds.config import Config, args, help_text, job
from unic_ds.config.overrides import coerce, nearest, option_names

Options = TypeVar("Options")


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Options of a verb that declares none."""


@dataclass(frozen=True, kw_only=True)
class Call(Generic[Options]):
    """A parsed command line of a verb."""

    arguments: tuple[str, ...]
    options: Options
    overrides: dict[str, str]
    """`recipe` and the options of a run, as text; for `takes="job"` also the `JOB_OPTIONS`."""
    given: tuple[str, ...]
    """Names of all options on the command line."""

    def config(self) -> Config:
        """The Config of the recipe and its overrides; ValueError as `job.configure`."""
        recipe = self.overrides.get("recipe", "quickstart")
        rest = {name: text for name, text in self.overrides.items() if name != "recipe"}
        return job.configure(recipe, rest)


@dataclass(frozen=True, kw_only=True)
class Verb(Generic[Options]):
    """A verb of `unic-ds`."""

    name: str
    summary: str
    options: type[Options]
    """A frozen dataclass whose fields are made by `config.option`."""
    arguments: dict[str, str] = field(default_factory=dict)
    """Positional argument -> its help; one in brackets may be left out, one with ... repeated."""
    lists: dict[str, dict[str, str]] = field(default_factory=dict)
    """Title -> word -> its help: further sections, such as the legal words of an argument."""
    takes: Literal["nothing", "recipe", "job"] = "nothing"
    """Further options: a recipe with overrides, or all options of a training command."""
    exit_codes: dict[int, str] = field(default_factory=dict)
    """Exit codes other than 0 (done), 1 (failed) and 2 (a mistake in the command)."""
    usage: str = ""
    needs_hub: bool = False
    """True if the verb downloads from or uploads to a model hub."""

    def stay_offline(self) -> None:
        """Set HF_HUB_OFFLINE unless the verb needs the hub.

        Compute nodes download nothing; `unic-ds teachers fetch` does. Call this before
        huggingface_hub is imported, which reads the variable then.
        """
        if not self.needs_hub:
            os.environ["HF_HUB_OFFLINE"] = "1"

    def help(self) -> str:
        """Text of `unic-ds VERB --help`."""
        sections = self.sections()
        if self.takes != "nothing":
            sections += help_text.run_sections([row.name for part in sections for row in part.rows])
        summary = f"{self.summary[0].upper()}{self.summary[1:]}."
        return help_text.render(self.command_line(), summary, sections)

    def command_line(self) -> str:
        """The verb's usage."""
        has_options = bool(fields(self.options)) or self.takes != "nothing"  # type: ignore[arg-type]
        command = " ".join(["unic-ds", self.name, *self.arguments])
        return self.usage or command + (" [--option value ...]" if has_options else "")

    def sections(self) -> list[help_text.Section]:
        """Its arguments, lists of words, options and exit codes, without the settings of a run."""
        rows = [row for row, _ in help_text.option_rows(self.options)]
        more = {"nothing": [], "recipe": ["recipe"], "job": list(job.JOB_OPTIONS)}[self.takes]
        rows += [help_text.Row(f"--{name}", "TEXT", job.JOB_OPTIONS[name]) for name in more]
        codes = {0: "done", 1: "failed", 2: "mistake in the command"} | self.exit_codes
        words = {"arguments": self.arguments} | self.lists
        parts = {
            title: [help_text.Row(name, "", text) for name, text in of.items()]
            for title, of in words.items()
        }
        parts |= {
            "options": rows,
            "exit codes": [help_text.Row(str(code), "", text) for code, text in codes.items()],
        }
        return [help_text.Section(title, "", part) for title, part in parts.items() if part]

    def read(self, argv: Sequence[str]) -> Call[Options]:
        """Read a command line without the verb; ValueError for an unknown or ill-typed option."""
        words, given = args.parse(argv)
        given.pop("local_rank", None)  # the deepspeed launcher adds it
        self.check_options(given)
        self.check_arguments(words)
        hints = get_type_hints(self.options)
        values: dict[str, Any] = {
            name: coerce(hints[name], text, f"--{name}")
            for name, text in given.items()
            if name in hints
        }
        return Call(
            arguments=tuple(words),
            options=self.options(**values),
            overrides={name: text for name, text in given.items() if name not in hints},
            given=tuple(given),
        )

    def check_options(self, names: Iterable[str], known: Sequence[str] = ()) -> None:
        """Raise ValueError for the first option that is none of the verb's (or of `known`)."""
        if not known:
            known = [f.name for f in fields(self.options)]  # type: ignore[arg-type]
            known += [] if self.takes == "nothing" else ["recipe", *option_names()]
            known += list(job.JOB_OPTIONS) if self.takes == "job" else []
        for name in names:
            if name.split(".")[0] not in {word.split(".")[0] for word in known}:
                raise ValueError(
                    f"unknown option --{name}{nearest(name, list(known))};"
                    f" unic-ds {self.name} --help lists them all"
                )

    def check_arguments(self, words: Sequence[str]) -> None:
        """Raise ValueError unless there are as many words as positional arguments."""
        needed = [name for name in self.arguments if not name.startswith("[")]
        if len(words) < len(needed):
            raise ValueError(
                f"{self.name} needs {' and '.join(needed)}; unic-ds {self.name} --help explains"
            )
        endless = any("..." in name for name in self.arguments)
        if (extra := words[len(self.arguments) :]) and not endless:
            raise ValueError(
                f"{extra[0]!r} belongs to no option of {self.name}; write --name value, and quote"
                " a value with spaces"
            )
