"""Strict dotted overrides of a Config, and the same as plain values for YAML.

A value's type is its field's annotation, never what it looks like; an unknown name is an error that
names its nearest neighbour.
"""

from __future__ import annotations

import difflib
import math
import re
import types
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from unic_ds.config import TEACHER_NAME, Config, Teacher, check
from unic_ds.files.printable import printable

SHOWN = 60
"""Characters of a name or value of a file that a message shows."""


class UnknownOption(ValueError):
    """A name that no option has: no other option makes it right."""


def nearest(word: str, known: list[str]) -> str:
    """` (did you mean X?)` for the known word closest to `word`, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def coerce(annotation: Any, text: str, name: str) -> Any:
    """The value of `text` for a field of that annotation; ValueError where it has none."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        check(text in args, name, "one of " + ", ".join(a or "''" for a in args), text)
        return text
    if origin in (Union, types.UnionType):
        if text.lower() == "none" and type(None) in args:
            return None
        return coerce(next(a for a in args if a is not type(None)), text, name)
    if origin is tuple:
        return tuple(
            coerce(args[0], part.strip(), name) for part in text.split(",") if part.strip()
        )
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


def parse_teachers(text: str) -> tuple[Teacher, ...]:
    """`SOURCE` or `NAME=SOURCE`, comma-separated; a name left out is made from the source."""
    rows = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, given, source = part.partition("=")
        if not given or not TEACHER_NAME.fullmatch(name):
            name, source = default_name(part), part
        rows.append(Teacher(name=name, source=source))
    return tuple(rows)


def default_name(source: str) -> str:
    """`timm:vit_base_patch14_dinov2.lvd142m` -> `vit_base_patch14_dinov2`."""
    rest = source.partition(":")[2].partition("#")[0]
    stem = (
        rest.rsplit("/", 1)[-1] if source.startswith("file:") else rest.split("/")[0].split(":")[-1]
    )
    name = re.sub(r"[^a-z0-9]+", "_", stem.split(".")[0].lower()).strip("_")
    return name if TEACHER_NAME.fullmatch(name) else f"t_{name}"


OPTION_ALIASES = {"cache": "teachers.cache"}
"""Fields whose option has another name."""


def override(config: Any, path: str, text: str, *, prefix: str = "") -> Any:
    """`config` with the field at the dotted `path` set from `text`; unknown names are an error."""
    if not prefix and path in OPTION_ALIASES.values():
        path = next(field for field, said in OPTION_ALIASES.items() if said == path)
    head, _, rest = path.partition(".")
    name = prefix + head
    hints = get_type_hints(type(config))
    if head not in hints:
        said = printable(prefix + path, SHOWN)
        raise UnknownOption(f"unknown option --{said}{nearest(said, option_names())}")
    old = getattr(config, head)
    if head == "teachers" and isinstance(config, Config):
        value = override_teacher(old, rest, text) if rest else parse_teachers(text)
    elif is_dataclass(old):
        if not rest:
            raise ValueError(
                f"--{name} is a section; set one of"
                f" {', '.join(f'--{name}.{f.name}' for f in fields(old))}"
            )
        value = override(old, rest, text, prefix=f"{name}.")
    elif rest:
        raise UnknownOption(
            f"unknown option --{printable(prefix + path, SHOWN)}; --{name} has no parts"
        )
    else:
        value = coerce(hints[head], text, f"--{name}")
    return replace(config, **{head: value})


def override_teacher(teachers: tuple[Teacher, ...], path: str, text: str) -> tuple[Teacher, ...]:
    """The teachers with one field of the named one replaced."""
    who, _, key = path.partition(".")
    names = [t.name for t in teachers]
    if who not in names:
        raise ValueError(
            f"unknown teacher {printable(repr(who), SHOWN)} in"
            f" --teachers.{printable(path, SHOWN)}; this recipe has {', '.join(names) or 'none'}"
        )
    if not key:
        raise ValueError(
            f"--teachers.{who} wants a key: {', '.join(f.name for f in fields(Teacher))}"
        )
    return tuple(
        override(t, key, text, prefix=f"teachers.{who}.") if t.name == who else t for t in teachers
    )


def override_all(config: Config, options: dict[str, str]) -> Config:
    """`config` with every option applied; `teachers` before `teachers.NAME.key`."""
    waiting = sorted(options, key=lambda p: (p.count("."), p))
    while waiting:
        refused: dict[str, ValueError] = {}
        for path in waiting:
            try:
                config = override(config, path, options[path])
            except UnknownOption:
                raise
            except ValueError as error:
                refused[path] = error  # it may be right beside another option: try again after it
        if len(refused) == len(waiting):
            raise next(iter(refused.values()))
        waiting = list(refused)
    return config


def options_of(config: Any = None, prefix: str = "") -> list[tuple[str, Any, str]]:
    """(name, default, help) of every option, in declaration order."""
    rows: list[tuple[str, Any, str]] = []
    for f in fields(config or Config()):
        value = getattr(config or Config(), f.name)
        if is_dataclass(value):
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


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values, teachers by name; what `config.yaml` holds and `from_dict` reads."""
    plain: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name == "teachers":
            plain[f.name] = {
                t.name: {k: v for k, v in to_dict(t).items() if k != "name"} for t in value
            }
        elif is_dataclass(value):
            plain[f.name] = to_dict(value)
        else:
            plain[f.name] = list(value) if isinstance(value, tuple) else value
    return plain


def from_dict(plain: dict[str, Any], base: Config | None = None) -> Config:
    """The Config of such nested values over `base`; unknown or ill-typed keys are an error."""
    config = base or Config()
    check_shape(plain)
    rows = plain.get("teachers", {})
    named = tuple(Teacher(name=k, source=str(v.get("source", ""))) for k, v in rows.items())
    return override_all(replace(config, teachers=named or config.teachers), flatten(plain))


def check_shape(plain: dict[str, Any], prefix: str = "") -> None:
    """ValueError where a mapping or a list stands for something else, or a value is missing."""
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
    """Return true for a number, a text, true or false."""
    return value is not None and not isinstance(value, (dict, list, tuple))


def described(value: object) -> str:
    """A value of a file as a message shows it: lists by their kind."""
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
    """Dotted name -> text of what decides the result: everything but the machinery."""
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
        of = f"teachers.{row.name}"
        machinery |= {f"{of}.{f.name}" for f in fields(row) if f.metadata.get("machinery")}
    said = {k: v for k, v in flatten(to_dict(config)).items() if k not in machinery}
    return said | {"teachers": ",".join(t.name for t in config.teachers)}  # their order decides
