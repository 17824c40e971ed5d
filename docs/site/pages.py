"""A page of docs/ as the site shows it: with pictures, with links into the reference, and as a
notebook.
"""

from __future__ import annotations

import base64
import json
import re
from typing import Any

from docs.site.run import Ran
from tests.printed import FENCE

# pages that stand elsewhere in the repository, by their name on the site
ELSEWHERE = {
    "../CHANGELOG.md": "changelog.md",
    "../CONTRIBUTING.md": "contributing.md",
    "../varmeta/datasets/data/LICENSES.md": "data-licences.md",
    "../README.md": "index.md",
}
NAME = re.compile(r"(?<!\[)`vm\.([A-Za-z_][\w.]*)(\([^`<>\\\n]*\))?`(?!\])")
BETWEEN = re.compile(r"(?:\s|<!--.*?-->)*", re.S)


def illustrated(text: str, ran: list[Ran], pictures: str) -> str:
    """The page with a block's figures below it, and below the output that is shown of it.

    pictures: where they lie, as a format of the figure's number, "_pictures/idea-{}.png".
    """
    found = list(FENCE.finditer(text))
    left, number, parts, at = list(ran), 0, [], 0
    for block, then in zip(found, [*found[1:], None], strict=True):
        if block["language"] != "python":
            continue
        end, drawn = block.end(), left.pop(0).figures
        if then and then["language"] == "text" and BETWEEN.fullmatch(text[end : then.start()]):
            end = then.end()
        parts.append(text[at:end])
        at = end
        for _, words in drawn:
            parts.append(f"\n\n![{words}]({pictures.format(number)})\n")
            number += 1
    return "".join([*parts, text[at:]])


def linked(text: str, public: set[str]) -> str:
    """The page with `vm.fit` linked to the reference, and files that the site has elsewhere.

    public: the dotted names that the reference has, "varmeta.fit".
    """

    def link(name: re.Match[str]) -> str:
        full = f"varmeta.{name[1]}"
        if full not in public:
            return name[0]
        return f"{{py:obj}}`vm.{name[1]}{name[2] or ''} <{full}>`"

    parts, at = [], 0
    for fence in re.finditer(r"^```.*?^```$", text, re.M | re.S):
        parts += [NAME.sub(link, text[at : fence.start()]), fence[0]]
        at = fence.end()
    out = "".join([*parts, NAME.sub(link, text[at:])])
    for target, page in ELSEWHERE.items():
        out = out.replace(f"]({target}", f"]({page}")
    return out


def contents(text: str) -> dict[str, list[str]]:
    """The pages that docs/index.md lists under each of its headings, without their endings."""
    chapters: dict[str, list[str]] = {}
    for chapter in re.split(r"^## ", text, flags=re.M)[1:]:
        listed = re.findall(r"^- \[[^\]]+\]\(([^)#]+)\.md\)", chapter, re.M)
        chapters[chapter.splitlines()[0]] = listed
    return chapters


def toctree(caption: str, names: list[str]) -> str:
    lines = [":hidden:", f":caption: {caption}", "", *names]
    return "\n\n```{toctree}\n" + "\n".join(lines) + "\n```\n"


def notebook(text: str, ran: list[Ran]) -> str:
    """The page as a Jupyter notebook: its text, its code, and what the code gave here."""
    cells, at, left = [], 0, list(ran)
    for block in FENCE.finditer(text):
        if block["language"] != "python":
            continue
        cells += _words(text[at : block.start()])
        cells.append(_code(left.pop(0), len(cells)))
        at = block.end()
        shown = FENCE.search(text, at)  # a cell has its output already
        if shown and shown["language"] == "text" and BETWEEN.fullmatch(text[at : shown.start()]):
            at = shown.end()
    cells += _words(text[at:])
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    python = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": cells, "metadata": {"kernelspec": python}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1)


def _words(text: str) -> list[dict[str, Any]]:
    words = re.sub(r"<!--.*?-->\n*", "", text, flags=re.S).strip()
    return [{"cell_type": "markdown", "metadata": {}, "source": words}] if words else []


def _code(ran: Ran, count: int) -> dict[str, Any]:
    outputs: list[dict[str, Any]] = []
    if ran.printed:
        outputs.append({"output_type": "stream", "name": "stdout", "text": ran.printed})
    for png, words in ran.figures:
        data = {"image/png": base64.b64encode(png).decode(), "text/plain": words}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    return {
        "cell_type": "code",
        "execution_count": None,
        "metadata": {},
        "outputs": outputs,
        "source": ran.block.body.strip(),
    }
