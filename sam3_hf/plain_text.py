"""
Names that came from elsewhere, as they can be shown anywhere: on one line, of bounded length, without controls; and
tables of them.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Container, Sequence

LONGEST = 80
JOINERS = "\u200c\u200d"  # shape letters of some scripts, and emoji


def plain(text: str, longest: int = LONGEST) -> str:
    """
    A text on one line, cut to `longest` characters. Controls are left out, those of the writing direction as well;
    what no font can show (surrogates, unassigned characters) is replaced by a sign for it.
    """
    line = " ".join(str(text).split())
    shown = "".join(_shown(character) for character in line[: longest + 1])
    return shown if len(line) <= longest else shown[: longest - 1] + "…"


def with_revision(name: str, source: str, revision: str) -> str:
    """A name of a model with the revision of its source, where that is of the Hub and not `main`: "me/model@v2"."""
    return name if revision == "main" or os.path.exists(source) else f"{name}@{revision}"


def markdown(text: str, longest: int = LONGEST) -> str:
    """`plain` text as Markdown, in a table as well, that shows it as it is: no emphasis, link, HTML or formula."""
    text = plain(text, longest).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{character}" if character in "\\`*_{}[]|~#$!" else character for character in text)


def markdown_code(text: str, longest: int = LONGEST) -> str:
    """`plain` text as code in Markdown; a backtick in it becomes an apostrophe."""
    return f"`{plain(text, longest).replace('`', chr(39)) or ' '}`"


def aligned(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> list[str]:
    """The lines of a table: the cells of the columns `left` stand at the left, all others at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def python_literal(text: str) -> str:
    """A text in double quotes as Python reads it back, on one line and without characters that cannot be seen."""
    quoted = "".join(
        f"\\{character}" if character in '"\\' else character if character.isprintable() else _escape(character)
        for character in text
    )
    return f'"{quoted}"'


def _shown(character: str) -> str:
    kind = unicodedata.category(character)
    if kind == "Cc" or kind == "Cf" and character not in JOINERS:
        return ""
    return "\ufffd" if kind in ("Cs", "Cn", "Co") else character


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\U{code:08x}" if code > 0xFFFF else f"\\u{code:04x}"
