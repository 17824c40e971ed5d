"""The measurements behind docs/choices.md run, and the page names none that there is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments.choices import MEASURES, main

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_list_and_one_in_smoke_size(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert capsys.readouterr().out.split()[0] == "guide"
    main(["--only", "precision", "--size", "smoke"])
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "precision" and len(rows) == 2 + 4
    errors = [float(row.split()[-1]) for row in rows[2:]]
    assert errors[0] < 1e-10 and errors[2] < 1e-4  # float64 and float32, in the prior's sds


def test_in_the_priors_sds_the_gradient_is_nearer_to_algebra() -> None:
    """What docs/choices.md says of 80 weights."""
    known, plain, single, plain_single = (
        row["relative error"] for row in MEASURES["precision"](False)
    )
    assert known < 1e-12 < 1e-8 < plain
    assert single < 1e-5 < 1e-4 < plain_single


def test_the_measures_that_the_pages_name_exist() -> None:
    for page in DOCS.glob("*.md"):
        text = page.read_text()
        parts = set(re.findall(r"experiments.benchmarks --only ([a-z])`", text))
        assert parts <= set("abcdefgh"), page.name
        named = set(re.findall(r"--only ([a-z]+)`", text)) - parts
        named -= {"thresholds", "linear", "spiral", "head"}  # of experiments.per_module
        named -= {"sinusoids", "speed", "unseen"}  # of experiments.closed_form
        assert named <= set(MEASURES), page.name
