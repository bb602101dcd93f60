"""Bounded parsers of YAML and JSON from outside; stdlib and PyYAML's SafeLoader.

A few bytes of either may expand to gigabytes, or to a stack deeper than Python's; keys may be
repeated. All that is a ValueError of one clause, raised while the text is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from unic_ds.files import open_regular, read_text
from unic_ds.files.printable import printable

LIMIT = 1 << 20
"""Bytes of the largest settings file."""

DEPTH, VALUES = 20, 10_000
"""Levels and values of the largest settings; a run has three levels, and 20 values per teacher."""

DIGITS = 100
"""Characters of the longest number; a float's 17 digits with its exponent take 24."""

TEXT = "tag:yaml.org,2002:str"
PLAIN = ("str", "int", "float", "bool", "null")
"""YAML's kinds of scalar that settings have."""

LINE = 16 << 20
"""Bytes of the longest line of a log: an event names the samples of a step."""


def read_yaml(file: Path) -> Any:
    """Plain values of a YAML file, keys as text; ValueError of one clause."""
    return parse_yaml(_text(file))


def parse_yaml(text: str) -> Any:
    """Plain values of YAML, as `read_yaml`."""
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f" in line {mark.line + 1}" if mark else ""
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise ValueError(printable(problem + at)) from None
    except yaml.YAMLError as error:
        raise ValueError(printable(" ".join(str(error).split()))) from None


def read_json(file: Path) -> Any:
    """Plain values of a JSON file; ValueError of one clause."""
    try:
        value = json.loads(
            _text(file),
            object_pairs_hook=_unique,
            parse_int=_whole_number,
            parse_float=_number,
            parse_constant=_no_number,
        )
    except RecursionError:
        raise ValueError(f"more than {DEPTH} levels of nesting") from None
    _check_depth(value)
    return value


def json_lines(file: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the JSON object of each line of a log, None for an invalid one; nothing without a file.

    A killed process leaves its last line incomplete. Memory is that of one line of `LINE` bytes.
    """
    try:
        stream = open_regular(file)
    except OSError:
        return
    with stream:
        while line := stream.readline(LINE):
            yield parse_line(line)


def parse_line(line: bytes) -> dict[str, Any] | None:
    """JSON object of a line; None if it is something else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _text(file: Path) -> str:
    """Text of a settings file; ValueError if it is no regular file, too long or not UTF-8."""
    try:
        return read_text(file, LIMIT)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None


class _Loader(yaml.SafeLoader):
    """SafeLoader with bounds and without aliases, tags and repeated keys; every key is text."""

    level = count = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        event = self.peek_event()
        self.count += 1
        if isinstance(event, yaml.AliasEvent):
            _refuse(event, f"an alias, *{event.anchor}, which settings may not have,")
        if self.level >= DEPTH or self.count > VALUES:
            _refuse(event, f"more than {DEPTH} levels or {VALUES:,} values")
        if event.tag:
            _refuse(event, f"a tag, {event.tag}, which settings may not have,")
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        kind = node.tag.rpartition(":")[2]
        if kind in ("int", "float") and len(node.value) > DIGITS:
            _refuse(event, f"a number of {len(node.value):,} characters")
        if isinstance(node, yaml.ScalarNode) and kind not in PLAIN:
            node.tag = TEXT  # a date
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _refuse(key, "a key that is not plain text")
            if key.value in seen:
                _refuse(key, f"the key {printable(key.value)!r} a second time")
            seen.add(key.value)
            key.tag = TEXT  # `on` is a key, not the value true
        return node


def _refuse(at: yaml.Event | yaml.Node, problem: str) -> NoReturn:
    """Raise the error about the text at an event or a node."""
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Members of an object; ValueError if a key is repeated."""
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {printable(key)!r} is given twice")
        found[key] = value
    return found


def _whole_number(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a number of {len(text):,} characters")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {printable(text, 30)} is too large")
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number in JSON")


def _check_depth(value: object) -> None:
    """ValueError for more than DEPTH levels of nesting or VALUES values."""
    level, count = [value], 0
    for _ in range(DEPTH + 1):
        if not level:
            return
        count += len(level)
        if count > VALUES:
            raise ValueError(f"more than {VALUES:,} values")
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    raise ValueError(f"more than {DEPTH} levels of nesting")
