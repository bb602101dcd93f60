"""Text from files, made fit for a terminal, a log line or a page: stdlib only.

A tensor's name, a class or a licence is whatever its author wrote: line breaks would forge a second
message, escape sequences move the cursor, and markup ends a table.
"""

from __future__ import annotations

import html
import re
import unicodedata

LONGEST = 400
"""Characters of one foreign text that a message shows."""

HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories that print nothing, break lines or turn the direction of writing."""


def printable(text: object, longest: int = LONGEST) -> str:
    """One line of visible characters: others as escapes like `\\n` and `\\x1b`, cut at `longest`.

    Surrogates, which stand for the bytes of a file name that is not UTF-8, become escapes too, so
    the result can be encoded for any UTF-8 stream.
    """
    plain = "".join(map(_visible, str(text)[: longest + 1]))
    return plain if len(plain) <= longest else plain[: longest - 3] + "..."


def markdown(text: object) -> str:
    """`printable` text that Markdown and HTML show as it is, also inside a table's cell."""
    escaped = html.escape(printable(text), quote=False)
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", escaped)


def _visible(character: str) -> str:
    """The character, or its escape."""
    if unicodedata.category(character) not in HIDDEN:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
