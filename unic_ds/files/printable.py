"""Escapes text from files for a terminal, a log line or a Markdown page. Stdlib only.

The name of a tensor, a class or a licence may hold anything: line breaks would forge a second
message, escape sequences move the cursor, and markup ends a table.
"""

from __future__ import annotations

import html
import re
import unicodedata

LONGEST = 400
"""Characters that a message shows of one text from outside."""

HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories that print nothing, break lines or change the direction of writing."""


def printable(text: object, longest: int = LONGEST) -> str:
    """Text as one line of visible characters, others as `\\n`, `\\x1b` etc., cut at `longest`.

    Surrogates, which stand for bytes of a file name that is not UTF-8, are escaped too, so the
    result can be encoded in UTF-8.
    """
    plain = "".join(map(_visible, str(text)[: longest + 1]))
    return plain if len(plain) <= longest else plain[: longest - 3] + "..."


def markdown(text: object) -> str:
    """`printable` text, escaped for Markdown and HTML, also inside the cell of a table."""
    escaped = html.escape(printable(text), quote=False)
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", escaped)


def _visible(character: str) -> str:
    """The character if it is visible, else its escape."""
    if unicodedata.category(character) not in HIDDEN:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
