"""The fenced blocks of a page, and where what its code printed differs from the output that the
page shows.

A block of ```text is the output of the Python above it and is compared: words exactly, numbers to
the last digit that is shown (or 1e-4 of it).  A comment right above the block asks for less, with
its reason:

    <!-- output: words only (the numbers depend on the processor) -->
    <!-- output: not compared (it is another program) -->
"""

from __future__ import annotations

import re
from dataclasses import dataclass

FENCE = re.compile(
    r"(?:<!-- (?P<note>[^>]*?) -->\n+)?^```(?P<language>\w+)\n(?P<body>.*?)^```$", re.M | re.S
)
NUMBER = re.compile(r"((?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?)")
RELATIVE = 1e-4
# what is below it is what a solver left over: `fit` stops there, by another digit on another
# processor
ROUNDING = 1e-6
STEPS = 2  # and may take so many steps more or fewer
NOTES = {
    "demo output: begin": "not compared",  # `make demo-page` writes it
    "output: words only": "words only",
    "output: not compared": "not compared",
}


@dataclass(frozen=True)
class Block:
    language: str
    body: str
    compared: str  # "all", "words only" or "not compared"
    line: int


def blocks(page: str) -> list[Block]:
    """The fenced blocks in their order.  Raises ValueError for a note that is unknown or has no
    reason.
    """
    return [
        Block(
            found["language"],
            found["body"],
            _compared(found["note"]),
            page[: found.start("body")].count("\n"),
        )
        for found in FENCE.finditer(page)
    ]


def _compared(note: str | None) -> str:
    if note is None:
        return "all"
    reasoned = re.fullmatch(r"(output: [a-z ]+) \(.+\)", note)
    asked = reasoned[1] if reasoned else note
    if asked not in NOTES or (reasoned is None and asked.startswith("output")):
        raise ValueError(
            f"unknown note {note!r}: write one of {list(NOTES)}, with its reason in brackets"
        )
    return NOTES[asked]


def difference(shown: str, printed: str, numbers: bool = True) -> str | None:
    """The first place where the two differ, in words; None where there is none.  Line breaks do not
    count.
    """
    mine, theirs = (NUMBER.split(" ".join(text.split())) for text in (shown, printed))
    for i, (a, b) in enumerate(zip(mine, theirs, strict=False)):
        if i % 2 == 0 and a.strip() != b.strip():
            return (
                f"shown {''.join(mine[max(i - 2, 0) : i + 2])!r}, printed "
                f"{''.join(theirs[max(i - 2, 0) : i + 2])!r}"
            )
        if i % 2 and numbers and abs(_value(a) - _value(b)) > _allowed(a, mine[i + 1]):
            return f"shown {a}, printed {b}, after {mine[i - 1][-60:]!r}"
    return (
        None
        if len(mine) == len(theirs)
        else f"{len(mine) // 2} numbers shown, {len(theirs) // 2} printed"
    )


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def _allowed(number: str, then: str) -> float:
    mantissa, _, exponent = number.partition("e")
    _, dot, decimals = mantissa.partition(".")
    last = (
        10.0 ** (int(exponent or 0) - len(decimals)) if dot or exponent else 0.0
    )  # whole numbers are counts
    steps = STEPS if then.startswith(" Newton step") else 0.0
    return max(1.01 * last, RELATIVE * abs(_value(number)), ROUNDING, steps)
