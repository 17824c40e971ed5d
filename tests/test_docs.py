"""The Python in the README and in docs/ runs as it stands, each file from top to bottom, and prints
what is shown.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.site.run import run
from experiments.demo import strategies
from experiments.demo_page import BLOCK, PAGE
from tests.printed import blocks, difference
from varmeta.fitting.baselines import BASELINES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_run_and_print_what_is_shown(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some of them write files
    _, wrong = run(page.read_text(), page.name)
    assert not wrong, "\n".join(wrong)


SHOWN = (
    "converged after 10 Newton steps: it can fall by 1.4e-19 nats more\nfloor  -0.60465 of 821, "
    "k-hat 0.68\n"
)


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("10 Newton", "12 Newton", True),
        ("10 Newton", "13 Newton", False),
        ("1.4e-19", "6.2e-14", True),
        ("1.4e-19", "3.1e-05", False),
        ("-0.60465", "-0.60466", True),
        ("-0.60465", "-0.60485", False),
        ("-0.60465", "0.60465", False),
        ("821", "822", False),
        ("0.68", "0.70", False),
        ("floor  ", "intercept ", False),
        ("floor  ", "floor\n", True),
        (", k-hat 0.68", "", False),
        ("0.68\n", "0.68, and more", False),
    ],
)
def test_an_output_that_is_not_what_was_printed_is_found(old: str, new: str, same: bool) -> None:
    assert old in SHOWN
    assert (difference(SHOWN, SHOWN.replace(old, new)) is None) is same


def test_of_words_only_the_numbers_are_not_compared() -> None:
    assert difference("fell by 51 nats", "fell by 3e-2 nats", numbers=False) is None
    assert difference("fell by 51 nats", "rose by 51 nats", numbers=False) is not None
    with pytest.raises(ValueError, match="with its reason"):
        blocks(
            "<!-- output: not compared -->\n\n```text\n1\n```\n<!-- output: later (no) "
            "-->\n```text\n1\n```\n"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_page_of_the_demonstration_shows_what_it_prints() -> None:
    """`make demo-page` writes it; numbers move with the machine, so its rows are compared."""
    found = BLOCK.search(PAGE.read_text())
    assert found is not None
    rows = {line.split("  ")[0] for line in found[0].splitlines()}
    assert {*strategies(), *BASELINES} <= rows
    assert "radon log likelihood -1043.5214 -1043.5213" in found[0]
