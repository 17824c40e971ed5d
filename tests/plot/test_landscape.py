"""Figures of a landscape: the curves are the landscape's own, broken where it jumps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import varmeta as vm
from varmeta.plot import plot_anchored_loss, plot_minima, plot_objectives

SINE = vm.Landscape.of(lambda theta: torch.sin(3 * theta) + 0.2 * theta**2)


def line(ax: Any, label: str) -> np.ndarray:
    return next(np.asarray(one.get_xydata()) for one in ax.lines if one.get_label() == label)


def test_the_sum_has_its_minimum_at_the_star() -> None:
    ax = plot_anchored_loss(SINE, 1.3, -2.6, 2.6)
    total, star = line(ax, "their sum"), line(ax, r"its minimum $\theta^*$")[0]
    assert star[0] == pytest.approx(float(SINE.argmin(1.3)))
    assert star[1] == pytest.approx(np.nanmin(total[:, 1]), abs=1e-3)
    loss = line(ax, r"loss $f(\theta)$")
    assert np.allclose(loss[:, 1], np.sin(3 * loss[:, 0]) + 0.2 * loss[:, 0] ** 2)


def test_a_task_is_chosen_by_name() -> None:
    both = vm.Landscape.of(lambda t, c: (t - c[..., 0]) ** 2, 1.0, [[0.0], [2.0]])
    ax = plot_anchored_loss(both, 0.0, -1.0, 3.0, both.tasks.names[1])
    star = line(ax, r"its minimum $\theta^*$")[0, 0]
    assert star == pytest.approx(4.0 / 3.0)
    with pytest.raises(KeyError, match="no task is called"):
        plot_anchored_loss(both, 0.0, -1.0, 3.0, "other")


def test_minima_are_broken_where_they_jump() -> None:
    ax = plot_minima(SINE, -3.0, 3.0)
    jumps = SINE.jumps(-3.0, 3.0)
    x, y = line(ax, r"$\theta^*(\theta_0)$").T
    assert x[np.isnan(y)] == pytest.approx([jump.anchor for jump in jumps])
    ends = [one.get_ydata() for one in ax.lines if one.get_label() == "jump"]
    assert np.allclose(ends, [[jump.left, jump.right] for jump in jumps])
    assert ax.get_title() == "the minimum jumps at 2 anchors"


def test_of_many_tasks_twelve_are_drawn_and_all_jumps_counted() -> None:
    at = torch.linspace(0, 6, 40, dtype=torch.float64)[:, None]
    many = vm.Landscape.of(lambda t, c: torch.sin(3 * t + c[..., 0]) + 0.2 * t**2, 1.0, at)
    ax = plot_minima(many, -1.0, 1.0, num_anchors=101)
    label = r"$\theta^*(\theta_0)$ of 12 of 40 tasks"
    assert [one.get_label() for one in ax.lines].count(label) == 12
    number = len(many.jumps(-1.0, 1.0, 101))
    assert ax.get_title() == f"the minimum of 40 tasks jumps at {number} anchors"


def test_only_imamls_objective_jumps() -> None:
    ax = plot_objectives(SINE, -3.0, 3.0)
    imaml, variational = line(ax, "iMAML"), line(ax, "variational")
    assert np.isnan(imaml[:, 1]).sum() == 2 and np.isfinite(variational).all()
    known = np.isfinite(imaml[:, 1])
    assert imaml[known, 1] == pytest.approx(
        SINE.meta_objective(variational[:, 0]).sum(1).numpy(), abs=1e-9
    )
    title = " ".join(ax.get_title().split())
    assert title == "iMAML's objective jumps at 2 anchors, the variational one at none"
    bowl = vm.Landscape.of(lambda theta: theta**2)
    assert plot_objectives(bowl, -1.0, 1.0).get_title().startswith("no minimum jumps")


def test_a_range_is_asked_for() -> None:
    for draw in (plot_minima, plot_objectives):
        with pytest.raises(ValueError, match="expected a range, low < high, not 1.0 and 1.0"):
            draw(SINE, 1.0, 1.0)
