"""The site's table of contents, its pages with pictures, its notebooks and its reference, without
Sphinx; `make docs` builds the whole.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest

import varmeta as vm
from docs.site import docstrings, pages, reference
from docs.site.build import fetches, write
from docs.site.run import Ran, run
from experiments.demo_page import README
from tests.printed import blocks

DOCS = README.parent / "docs"
LINES = 80
TEXT = """# A page

```python
import matplotlib.pyplot as plt

print(1.5)
figure, ax = plt.subplots()
ax.set(title="a curve", xlabel="x", ylabel="y")
```

```text
1.5
```

See `vm.fit`, `vm.no_such_name` and [changes](../CHANGELOG.md).

```python
again = "`vm.fit`"
```
"""


def test_the_table_of_contents_names_every_page_once() -> None:
    chapters = pages.contents((DOCS / "index.md").read_text())
    listed = [page for chapter in chapters.values() for page in chapter]
    assert sorted(listed) == sorted(path.stem for path in DOCS.glob("*.md") if path.stem != "index")


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= LINES


@pytest.mark.parametrize("page", [README, *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_pictures_are_there_and_links_meet_headings(page: Path) -> None:
    text = page.read_text()
    for image in re.findall(r"(?:src|srcset)=\"([^\"]+)\"", text):
        assert (page.parent / image).exists(), image
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", text):
        assert anchor in anchors((page.parent / target).read_text() if target else text), anchor


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", plain, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_a_page_gets_its_pictures_below_its_outputs_and_links_into_the_reference() -> None:
    ran, wrong = run(TEXT, "page.md")
    assert wrong == []
    assert [(block.printed, len(block.figures)) for block in ran] == [("1.5\n", 1), ("", 0)]
    out = pages.linked(pages.illustrated(TEXT, ran, "_pictures/page-{}.png"), reference.members())
    picture = "![a curve: y against x](_pictures/page-0.png)"
    assert out.index("1.5\n```") < out.index(picture) < out.index("See")
    assert "{py:obj}`vm.fit <varmeta.fit>`, `vm.no_such_name` and [changes](changelog.md)" in out
    assert 'again = "`vm.fit`"' in out


def test_an_output_that_is_not_what_is_shown_is_told() -> None:
    assert "shown 2.5, printed 1.5" in run(TEXT.replace("1.5\n```", "2.5\n```"), "page.md")[1][0]


def test_a_notebook_holds_text_code_and_what_it_gave() -> None:
    ran, _ = run(TEXT, "page.md")
    cells = json.loads(pages.notebook(TEXT, ran))["cells"]
    kinds = ["markdown", "code", "markdown", "code"]
    assert [cell["cell_type"] for cell in cells] == kinds
    assert [part["output_type"] for part in cells[1]["outputs"]] == ["stream", "display_data"]
    assert "```text" not in cells[2]["source"]


def test_every_tutorial_has_a_notebook_and_its_page_links_to_it(tmp_path: Path) -> None:
    unrun = {
        path.stem: [Ran(it, "") for it in blocks(path.read_text()) if it.language == "python"]
        for path in DOCS.glob("*.md")
    }
    write(tmp_path, unrun)
    tutorials = pages.contents((DOCS / "index.md").read_text())["Tutorials"]
    written = {path.stem: path for path in (tmp_path / "notebooks").glob("*.ipynb")}
    assert sorted(written) == sorted(tutorials)
    for name, path in written.items():
        cells = json.loads(path.read_text())["cells"]
        assert sum(cell["cell_type"] == "code" for cell in cells) == len(unrun[name]) > 0
        assert f"<notebooks/{name}.ipynb>" in (tmp_path / f"{name}.md").read_text()


def test_the_reference_has_every_public_name_on_one_page() -> None:
    told = re.findall(r"auto(?:class|function):: (\S+)", "".join(reference.pages().values()))
    assert sorted(told) == sorted(reference.public())
    assert {f"varmeta.{name}" for name in vm.__all__} - set(told) <= {
        f"varmeta.{name}" for name in ("datasets", "guides", "likelihoods", "plot")
    }


def test_docstrings_become_arguments_formulas_links_and_plain_words() -> None:
    def made(count: int) -> None:
        """Make a*b of `fit`.

        count: how many, a function `(step,
            generator)`, at least 1 (docs/traps.md).
        Raises ValueError for `fit
        (tasks)`.
        Note: no argument.

            y = x_i

        >>> 1
        1
        """

    lines = inspect.cleandoc(made.__doc__ or "").splitlines()
    rst = "\n".join(docstrings.rst(lines, docstrings.arguments(made), {"varmeta.fit"}))
    assert r"Make a\*b of :py:obj:`fit <varmeta.fit>`." in rst
    how = "how many, a function ``(step, generator)``, at least 1 (:doc:`/traps`)."
    assert f"\n\n``count``\n    {how}\n\nRaises ValueError for ``fit (tasks)``." in rst
    assert "``. Note: no argument." in rst
    assert "::\n\n        y = x_i" in rst
    assert ">>> 1\n1" in rst


def test_what_a_page_would_fetch_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<a href="https://x.y">x</a><script src="https://x.y/z.js">')
    (tmp_path / "b.html").write_text('<link rel="stylesheet" href="_static/a.css">')
    assert len(fetches(tmp_path)) == 1
