"""A default fit asks once what it needs to know once, and does not walk further than it did."""

from __future__ import annotations

from tests.walk import walks


def test_a_default_fit_and_an_adaptation_stay_near() -> None:
    found = walks()
    fit, adapt = found["fit"], found["adapt"]
    assert fit.calls["TaskModel.is_linear"] == fit.calls["Problem.make"] == 1, fit.text
    assert fit.calls["TaskModel.init"] == 1, fit.text
    assert len(fit.files) <= 66 and sum(fit.crossings.values()) <= 600, fit.text
    assert len(adapt.files) <= 42 and sum(adapt.crossings.values()) <= 150, adapt.text
