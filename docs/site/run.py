"""Run a page's Python from top to bottom: what each block printed, the figures that it left, and
where that differs from the output which the page shows.
"""

from __future__ import annotations

import io
import sys
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any

from tests.printed import Block, blocks, difference

DPI = 110  # a picture of matplotlib's usual size is as wide as the site's text


@dataclass
class Ran:
    """A block of Python with what it printed and its figures: the bytes of a PNG, and words."""

    block: Block
    printed: str
    figures: list[tuple[bytes, str]] = field(default_factory=list)


def run(text: str, name: str) -> tuple[list[Ran], list[str]]:
    """The page's blocks of Python, run in the working directory, and what is shown wrongly."""
    names: dict[str, object] = {}
    ran: list[Ran] = []
    wrong: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what an example shows may be a warning
        warnings.filterwarnings("ignore", "Creating legend")  # of matplotlib, on a slow machine
        for block in blocks(text):
            if block.language == "python":
                with redirect_stdout(io.StringIO()) as output:
                    exec(compile(block.body, name, "exec"), names)
                ran.append(Ran(block, output.getvalue(), figures()))
            elif block.language == "text" and block.compared != "not compared":
                printed = ran[-1].printed if ran else ""
                found = difference(block.body, printed, numbers=block.compared == "all")
                if found:
                    wrong.append(f"{name}:{block.line}: {found}\nprinted was\n{printed}")
    return ran, wrong


def figures() -> list[tuple[bytes, str]]:
    """What is open in pyplot, drawn and closed, with words for who cannot see it."""
    if "matplotlib.pyplot" not in sys.modules:
        return []
    import matplotlib.pyplot as plt

    drawn = []
    for number in plt.get_fignums():
        figure = plt.figure(number)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=DPI)
        drawn.append((png.getvalue(), described(figure)))
    plt.close("all")
    return drawn


def described(figure: Any) -> str:
    """The titles and labels of a figure's axes, in one line."""
    words = [figure.get_suptitle()]
    for ax in figure.axes:
        axes = " against ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))
        words += [": ".join(filter(None, (ax.get_title(), axes)))]
    found = dict.fromkeys(" ".join(word.split()) for word in words if word)
    return "; ".join(found).replace("[", "(").replace("]", ")") or "a figure"
