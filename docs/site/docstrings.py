"""The docstrings' plain text as reStructuredText, which Sphinx reads.

They are sentences in paragraphs, arguments as `name: ...` with the rest indented, formulas that
are indented, lists with a dash, and examples with >>>.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from typing import Any

HEAD = re.compile(r"(\*{0,2}[A-Za-z_]\w*(?:, \*{0,2}[A-Za-z_]\w*)*): (\S.*)")
CODE = re.compile(r"(`[^`]+`)")
SOURCES = {"Source", "Reference", "References"}


def arguments(obj: Any) -> set[str]:
    """The names that a docstring's `name: ...` may be about: parameters and fields."""
    names = set(getattr(obj, "__annotations__", {}))
    with contextlib.suppress(TypeError, ValueError):  # a property has no parameters
        names |= set(inspect.signature(obj).parameters)
    return names


def rst(lines: list[str], names: set[str], public: set[str]) -> list[str]:
    """Lines of a docstring, its indentation taken off, as lines of reStructuredText.

    names: what counts as an argument.  public: the dotted names that the reference has.
    """
    out: list[str] = []
    for paragraph in "\n".join(line.rstrip() for line in lines).split("\n\n"):
        rows = paragraph.strip("\n").splitlines()
        if not rows:
            continue
        if rows[0].startswith(">>>"):
            out += rows
        elif rows[0].startswith(" "):  # a formula, or rows of one
            out += ["::", "", *(f"    {row}" for row in rows)]
        else:
            out += _prose(rows, names, public)
        out.append("")
    return out


def _prose(rows: list[str], names: set[str], public: set[str]) -> list[str]:
    """Sentences, arguments and items, which may follow each other without an empty line."""
    pieces: list[tuple[str, str, str]] = []  # what stands before it, how deep, its words
    for row in rows:
        head = HEAD.fullmatch(row)
        asked = set(head[1].replace("*", "").split(", ")) if head else set()
        if head and asked <= names:
            title = ", ".join(f"``{name}``" for name in head[1].split(", "))
            pieces.append((f"{title}\n    ", "argument", head[2]))
        elif head and asked <= SOURCES:
            pieces.append((f"*{head[1]}:* ", "text", head[2]))
        elif row.startswith("- "):
            pieces.append(("- ", "item", row[2:]))
        elif pieces and (row.startswith(" ") or pieces[-1][1] == "text") and not _opens(row):
            before, kind, words = pieces.pop()
            pieces.append((before, kind, f"{words} {row.strip()}"))
        else:
            pieces.append(("", "text", row.strip()))
    lines = [f"{before}{inline(words, public)}\n" for before, _, words in pieces]
    return "\n".join(lines).rstrip().split("\n")


def _opens(row: str) -> bool:
    """Whether a row begins a paragraph of its own, without an empty line before it."""
    return row.startswith(("Raises ", "Returns "))


def inline(text: str, public: set[str]) -> str:
    """A line with its code as literals or links, and no character that reStructuredText minds."""
    parts = CODE.split(text)
    out = ""
    for at, part in enumerate(parts):
        if at % 2:
            glued = "\\ " if out[-1:].isalnum() else ""
            then = "\\ " if parts[at + 1][:1].isalnum() else ""
            out += glued + _code(part[1:-1], public) + then
        else:
            plain = re.sub(r"([\\*|`_])", r"\\\1", part)
            out += re.sub(r"docs/([a-z0-9-]+)\.md", r":doc:`/\1`", plain)
    return out


def _code(code: str, public: set[str]) -> str:
    name = code.removesuffix("()").removeprefix("vm.")
    if f"varmeta.{name}" in public:
        return f":py:obj:`{code} <varmeta.{name}>`"
    return f"``{code}``"
