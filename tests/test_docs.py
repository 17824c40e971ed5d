"""The Python in the README and in docs/ runs as it stands, each file from top to bottom."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from experiments.demo import strategies
from experiments.readme import BLOCK, README
from varmeta.baselines import BASELINES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some of them write files
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what an example shows may be a warning
        for block in blocks:
            exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_readme_shows_what_the_demonstration_prints() -> None:
    """`make readme` writes it; its numbers move with the machine, so only its rows are compared."""
    found = BLOCK.search(README.read_text())
    assert found is not None
    rows = {line.split("  ")[0] for line in found[0].splitlines()}
    assert {*strategies(), *BASELINES} <= rows
    assert "radon log likelihood -1043.5214 -1043.5213" in found[0]
