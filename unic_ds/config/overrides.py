"""Dotted overrides of a Config, and its values as a plain mapping for YAML.

A value's type is its field's annotation, not guessed from the text; the error for an unknown name
suggests the nearest known one.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from unic_ds.config import TEACHER_NAME, Config, Teacher
from unic_ds.config.option import SHOWN, Section, check, nearest, refuse_unknown
from unic_ds.config.teacher_source import TeacherSource
from unic_ds.files.printable import printable

__all__ = ["coerce", "from_dict", "nearest", "override_all", "science", "to_dict"]

AUTO = "auto"
"""Word of --teachers: chosen by a comparison (`auto_teachers`)."""

OPTION_ALIASES = {"cache": "teachers.cache"}
"""Fields whose option has another name."""

RENAMED = {
    "student.checkpoint": "student.activation_checkpointing",
    "ladder.recompute": "ladder.activation_checkpointing",
    "data.eval": "eval.data",  # a name that people try
}
"""Other name -> name of options; old names are still read on a command line and in config.yaml."""


def coerce(annotation: Any, text: str, name: str) -> Any:
    """The value of `text` for a field of that annotation; ValueError if it is not legal there."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        check(text in args, name, "one of " + ", ".join(a or "''" for a in args), text)
        return text
    if origin in (Union, types.UnionType):
        if text.lower() == "none" and type(None) in args:
            return None
        return coerce(next(a for a in args if a is not type(None)), text, name)
    if origin is tuple:
        parts = filter(None, map(str.strip, text.split(",")))
        return tuple(coerce(args[0], part, name) for part in parts)
    if annotation is bool:
        check(text.lower() in ("true", "false", "1", "0"), name, "true or false", text)
        return text.lower() in ("true", "1")
    if annotation is str:
        check("\0" not in text, name, "text without a zero byte", text)
        return text
    try:
        value = annotation(text)
    except ValueError:
        kind = {int: "a whole number", float: "a number"}[annotation]
        raise ValueError(f"{name} must be {kind}, got {printable(repr(text), SHOWN)}") from None
    check(math.isfinite(value), name, "finite", text)
    return value


def split_teachers(text: str) -> list[str]:
    """The comma-separated words of `--teachers`."""
    return [word for word in map(str.strip, text.split(",")) if word]


def parse_teachers(
    text: str, known: Sequence[Teacher] = (), option: str = "--teachers"
) -> tuple[Teacher, ...]:
    """Parse comma-separated `SOURCE`, `NAME=SOURCE`, or the name of a `known` teacher.

    That one keeps its settings. A missing name is made from the source. ValueError, which names the
    option, for any other text.
    """
    rows = {row.name: row for row in known}
    return tuple(
        rows[word] if word in rows else parse_teacher(word, option, tuple(rows))
        for word in split_teachers(text)
    )


def parse_teacher(word: str, option: str, known: Sequence[str]) -> Teacher:
    """The teacher of a `SOURCE` or `NAME=SOURCE`; the error for other text names those `known`."""
    if word == AUTO:
        raise ValueError(
            f"{option} auto is understood by train, check and plan alone; name the teachers"
            " (`unic-ds teachers compare` chooses some)"
        )
    name, equals, source = word.partition("=")
    if not equals or not TEACHER_NAME.fullmatch(name):
        if known and TEACHER_NAME.fullmatch(word):
            want = f"of the recipe's teachers ({', '.join(known)}), SOURCE or NAME=SOURCE"
            check(False, option, want, word)
        name, source = TeacherSource.parse(word, option).default_name, word
    return Teacher(name=name, source=source)


def override_all(
    config: Config, options: Mapping[str, str], *, others: tuple[str, ...] = ()
) -> Config:
    """Apply every option to `config`: coerce all of them, then build each section once.

    ValueError, one sentence, for an illegal value and for an unknown name; the message may suggest
    `others`, options of a command that are not fields.
    """
    options = by_field(options)
    teachers = options.pop("teachers", None)
    rows = config.teachers if teachers is None else parse_teachers(teachers, config.teachers)
    return build(config, options, rows, others)


def by_field(options: Mapping[str, str]) -> dict[str, str]:
    """The options by the names of their fields; ValueError for one given under two names."""
    names = RENAMED | {alias: field for field, alias in OPTION_ALIASES.items()}
    found: dict[str, str] = {}
    for name, text in options.items():
        field = names.get(name, name)
        if field in found:
            raise ValueError(f"--{printable(name, SHOWN)} is given twice, as --{field} too")
        found[field] = text
    return found


def build(
    config: Config,
    options: Mapping[str, str],
    teachers: tuple[Teacher, ...],
    others: tuple[str, ...] = (),
) -> Config:
    """`config` with these teachers and these options, which have the names of their fields."""
    changes: dict[str, dict[str, Any]] = {}
    names = tuple(row.name for row in teachers)
    for path in sorted(options, key=lambda p: (p.count("."), p)):
        section, owner, key = locate(path, names, others)
        value = coerce(hints_of(owner)[key], options[path], f"--{printable(path, SHOWN)}")
        changes.setdefault(section, {})[key] = value
    top_level = changes.pop("", {})
    rows = (replace(row, **changes.pop(f"teachers.{row.name}", {})) for row in teachers)
    changed: dict[str, Any] = {"teachers": tuple(rows)}
    for section, values in changes.items():
        changed[section] = replace(getattr(config, section), **values)
    return replace(config, **changed, **top_level)


def locate(
    path: str, teachers: tuple[str, ...], others: tuple[str, ...]
) -> tuple[str, type[Section], str]:
    """(section or `teachers.NAME`, its class, field) of a dotted path; ValueError if unknown."""
    head, _, rest = path.partition(".")
    section, key = "", path
    owner: type[Section] = Config
    if head == "teachers":
        name, _, key = rest.partition(".")
        check_teacher(name, key, rest, teachers)
        section, owner = f"teachers.{name}", Teacher
    elif head in SECTIONS:
        default: Section = getattr(Config, head)
        section, owner, key = head, type(default), rest
        if not rest:
            known = ", ".join(f"--{head}.{f.name}" for f in fields(owner))
            raise ValueError(f"--{head} is a section; set one of {known}")
    field, _, parts = key.partition(".")
    if parts and field in hints_of(owner):
        name = printable(f"{section}.{field}".lstrip("."), SHOWN)
        refuse_unknown([path], [], f"; --{name} has no parts")
    refuse_unknown([path] if key not in hints_of(owner) else [], [*option_names(), *others])
    return section, owner, key


def check_teacher(name: str, key: str, path: str, known: tuple[str, ...]) -> None:
    """Raise ValueError unless `teachers.NAME.KEY` names a teacher of the run and a key."""
    if name not in known:
        raise ValueError(
            f"unknown teacher {printable(repr(name), SHOWN)} in"
            f" --teachers.{printable(path, SHOWN)}; this recipe has {', '.join(known) or 'none'}"
        )
    if not key:
        names = ", ".join(f.name for f in fields(Teacher))
        raise ValueError(f"--teachers.{name} needs a key: {names}")


@cache
def hints_of(owner: type[Section]) -> dict[str, Any]:
    """Field -> annotation of a section's class."""
    hints = get_type_hints(owner)
    return {f.name: hints[f.name] for f in fields(owner)}


def options_of(config: Section | None = None, prefix: str = "") -> list[tuple[str, object, str]]:
    """(name, default, help) of every option, in declaration order."""
    rows: list[tuple[str, object, str]] = []
    config = config or Config()
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value) and not isinstance(value, type):
            rows += options_of(value, f"{prefix}{f.name}.")
        else:
            name = OPTION_ALIASES.get(prefix + f.name, prefix + f.name)
            rows.append((name, value, f.metadata["help"]))
    return rows


SECTIONS = ("teachers", *(f.name for f in fields(Config) if is_dataclass(f.default)))
"""Keys of a settings file that hold a mapping."""


def option_names() -> list[str]:
    """Every dotted option name, for the nearest-name message."""
    teacher = [f"teachers.NAME.{f.name}" for f in fields(Teacher)]
    return [name for name, _, _ in options_of()] + teacher


def to_dict(config: Section) -> dict[str, Any]:
    """Nested plain values, teachers by name: the content of `config.yaml`, read by `from_dict`."""
    plain: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name == "teachers":
            plain[f.name] = {
                t.name: {k: v for k, v in to_dict(t).items() if k != "name"} for t in value
            }
        elif is_dataclass(value) and not isinstance(value, type):
            plain[f.name] = to_dict(value)
        else:
            plain[f.name] = list(value) if isinstance(value, tuple) else value
    return plain


def from_dict(plain: dict[str, Any]) -> Config:
    """The Config of nested plain values; ValueError for unknown keys and illegal values."""
    check_shape(plain)
    rows = plain.get("teachers", {})
    teachers = tuple(Teacher(name=k, source=str(v.get("source", ""))) for k, v in rows.items())
    return build(Config(), by_field(flatten(plain)), teachers)


def check_shape(plain: dict[str, Any], prefix: str = "") -> None:
    """Raise ValueError for a mapping or list in place of a value or the reverse, or no value."""
    teachers = plain.get("teachers", {}) if not prefix else {}
    if not isinstance(teachers, dict):
        raise ValueError(
            "teachers must be a mapping from names to settings, as in {dino: {source: 'timm:...'}},"
            f" got {described(teachers)}"
        )
    for name, row in teachers.items():
        if not isinstance(row, dict):
            raise ValueError(
                f"teachers.{printable(name, SHOWN)} must be a mapping of settings with a source,"
                f" got {described(row)}"
            )
    for key, value in plain.items():
        name = printable(prefix + key, SHOWN)
        if isinstance(value, dict):
            if not value and (prefix or key not in SECTIONS):
                raise ValueError(f"{name} is an empty mapping; give a value or remove the line")
            check_shape(value, f"{prefix}{key}.")
        elif value is None:
            raise ValueError(f"{name} has no value; give one, '' for none, or remove the line")
        elif isinstance(value, (list, tuple)) and not all(map(plain_value, value)):
            raise ValueError(f"{name} must be a value or a list of values")


def plain_value(value: object) -> bool:
    """True for a number, a text, true or false."""
    return value is not None and not isinstance(value, (dict, list, tuple))


def described(value: object) -> str:
    """Describe a value of a file for a message: a list by its kind."""
    if isinstance(value, (list, tuple)):
        return "a list"
    return "nothing" if value is None else printable(repr(value), SHOWN)


def flatten(plain: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted name -> text of every leaf of nested values."""
    flat: dict[str, str] = {}
    for key, value in plain.items():
        if isinstance(value, dict):
            found = flatten(value, f"{prefix}{key}.")
        else:
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            found = {prefix + key: text}
        for twice in flat.keys() & found.keys():
            raise ValueError(f"{printable(twice, SHOWN)} is given twice; give it once")
        flat |= found
    return flat


def science(config: Config) -> dict[str, str]:
    """Dotted name -> text of the options that decide the result: all but the machinery."""
    machinery = set()
    for section in fields(config):
        value = getattr(config, section.name)
        if section.metadata.get("machinery"):
            machinery.add(section.name)
        elif is_dataclass(value):
            machinery |= {
                f"{section.name}.{f.name}" for f in fields(value) if f.metadata.get("machinery")
            }
    for row in config.teachers:
        machinery |= {
            f"teachers.{row.name}.{f.name}" for f in fields(row) if f.metadata.get("machinery")
        }
    texts = {k: v for k, v in flatten(to_dict(config)).items() if k not in machinery}
    texts |= {f"teachers.{t.name}.source": t.parsed_source.science for t in config.teachers}
    return texts | {"teachers": ",".join(t.name for t in config.teachers)}  # in their order
