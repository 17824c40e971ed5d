"""The post's one-dimensional pictures, against closed forms and scans that use nothing of the
package.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.cases import MODELS, known, linear_model, ragged_tasks, scalar_model
from varmeta.landscape.landscape import ROUTES, Jump, Landscape

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sine": lambda t: torch.sin(3 * t) + 0.2 * t**2,
    "double well": lambda t: 0.5 * (t**2 - 1) ** 2 + 0.1 * t,
    "wells": lambda t: (
        -1.2 * torch.exp(-0.5 * ((t + 1.2) / 0.15) ** 2)
        - 1.5 * torch.exp(-0.5 * ((t - 1.2) / 0.8) ** 2)
    ),
}
PRECISIONS = [0.3, 1.0, 3.0, 10.0]
LOW, HIGH = -4.0, 4.0


def waves(t: Tensor, c: Tensor) -> Tensor:
    return c[..., 0] * torch.sin(c[..., 1] * t + c[..., 2]) + 0.1 * (t - c[..., 3]) ** 2


def coefficients(num_tasks: int, seed: int = 0) -> Tensor:
    u = torch.rand(num_tasks, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return u * torch.tensor([1.0, 2.0, 2 * math.pi, 4.0]) + torch.tensor([0.5, 2.0, 0.0, -2.0])


@functools.cache
def jumps_of(name: str, precision: float) -> list[Jump]:
    return Landscape.of(FUNCTIONS[name], precision).jumps(LOW, HIGH, 41)


def hull_jumps(f: Callable[[Tensor], Tensor], precision: float) -> list[tuple[float, float, float]]:
    """Anchor, left and right of every jump, by brute force.

    theta* minimises h(theta) - lambda theta0 theta with h = f + lambda/2 theta^2, so it walks along
    the lower convex hull of
    h: a straight piece of the hull is a jump, and its slope is lambda theta0.
    """
    spacing = 2e-4  # the slope of a piece is exact to curvature x spacing^2 / (4 x its length)
    t = np.arange(-7.0, 7.0, spacing)
    h = f(torch.from_numpy(t)).numpy() + 0.5 * precision * t**2
    hull: list[int] = []
    for i in range(len(t)):
        while len(hull) > 1 and (h[hull[-1]] - h[hull[-2]]) * (t[i] - t[hull[-1]]) >= (
            h[i] - h[hull[-1]]
        ) * (t[hull[-1]] - t[hull[-2]]):
            hull.pop()
        hull.append(i)
    pieces = [(a, b) for a, b in itertools.pairwise(hull) if b - a > 10]
    jumps = [((h[b] - h[a]) / (t[b] - t[a]) / precision, t[a], t[b]) for a, b in pieces]
    return [jump for jump in jumps if LOW < jump[0] < HIGH]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_four_routes_to_the_derivative(name: str, precision: float) -> None:
    landscape = Landscape.of(FUNCTIONS[name], precision)
    anchors = torch.linspace(LOW, HIGH, 81, dtype=torch.float64)
    for jump in jumps_of(name, precision):
        anchors = anchors[(anchors - jump.anchor).abs() > 1e-3]
    assert len(anchors) > 70
    closed, *others = (landscape.derivative(anchors, route) for route in ROUTES)
    for found in others:
        # central differences: 1e-10 of the step's square times the third derivative, and rounding /
        # 1e-5
        torch.testing.assert_close(found, closed, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_jumps_are_the_gaps_of_the_convex_hull(name: str, precision: float) -> None:
    expected = hull_jumps(FUNCTIONS[name], precision)
    found = jumps_of(name, precision)
    assert len(found) == len(expected)
    for jump, (anchor, left, right) in zip(found, expected, strict=True):
        assert jump.anchor == pytest.approx(anchor, abs=1e-6)
        assert (jump.left, jump.right) == pytest.approx((left, right), abs=1e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_jumps_of_the_sine_in_closed_form(precision: float) -> None:
    """h = sin 3t + (lambda + 0.4) t^2 / 2 is symmetric about its bumps but for a straight line, so
    it ties above them.
    """
    bumps = math.pi / 6 + 2 * math.pi / 3 * np.arange(-5, 6)
    anchors = bumps * (precision + 0.4) / precision
    expected = (
        anchors[(anchors > LOW) & (anchors < HIGH)] if precision + 0.4 < 9 else []
    )  # h'' = lambda + 0.4 - 9 there
    assert [jump.anchor for jump in jumps_of("sine", precision)] == pytest.approx(
        list(expected), abs=1e-9
    )


def test_argmin_against_a_dense_scan_for_many_tasks() -> None:
    landscape = Landscape.of(waves, 0.7, coefficients(5))
    anchors = torch.linspace(-3, 3, 13, dtype=torch.float64)
    grid = torch.arange(-12, 12, 1e-3, dtype=torch.float64)
    theta = landscape.argmin(anchors)
    for task, row in enumerate(coefficients(5)):
        values = waves(grid, row) + 0.35 * (grid - anchors[:, None]) ** 2
        torch.testing.assert_close(theta[:, task], grid[values.argmin(1)], rtol=0, atol=1e-3)
        reached = waves(theta[:, task], row) + 0.35 * (theta[:, task] - anchors) ** 2
        assert bool((reached <= values.amin(1)).all())


@pytest.mark.parametrize(("name", "precision", "count"), [("sine", 3.0, 3), ("wells", 1.0, 3)])
def test_jumps_in_one_cell_are_told_apart(name: str, precision: float, count: int) -> None:
    landscape = Landscape.of(FUNCTIONS[name], precision)
    fine = jumps_of(name, precision)
    coarse = landscape.jumps(LOW, HIGH, num_anchors=2)  # one cell
    assert len(fine) == len(coarse) == count
    assert [jump.anchor for jump in coarse] == pytest.approx(
        [jump.anchor for jump in fine], abs=2e-9
    )


def test_jumps_of_many_tasks_are_those_of_each() -> None:
    rows = coefficients(3)
    together = Landscape.of(waves, 1.0, rows).jumps(-3.0, 3.0, 21)
    assert {jump.task for jump in together} == {f"task {index}" for index in range(3)}
    for index, row in enumerate(rows):
        alone = Landscape.of(waves, 1.0, row[None]).jumps(-3.0, 3.0, 61)
        mine = [jump.anchor for jump in together if jump.task == f"task {index}"]
        assert mine == pytest.approx([jump.anchor for jump in alone], abs=2e-9)


def test_a_convex_function_has_no_jumps() -> None:
    assert Landscape.of(lambda t: torch.cosh(t), 0.5).jumps(LOW, HIGH) == []
    line = Landscape.of(lambda t: 3 * t, 2.0)
    assert line.jumps(LOW, HIGH) == []
    torch.testing.assert_close(line.argmin([1.0]), torch.tensor([[-0.5]], dtype=torch.float64))
    for route in ROUTES:
        assert float(line.derivative(1.0, route)) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(
    ("anchor", "theta", "variational", "imaml"),
    # the research notes' numbers, at the global minimum
    [(0.7, -0.3822, 1.0822, 0.1127), (-2.0, -0.6479, -1.3521, -0.1382)],
)
def test_the_two_gradients_at_two_anchors(
    anchor: float, theta: float, variational: float, imaml: float
) -> None:
    landscape = Landscape.of(FUNCTIONS["sine"])
    assert float(landscape.argmin(anchor)) == pytest.approx(theta, abs=1e-4)
    for outer, objective, expected in (
        ("elbo", landscape.variational_objective, variational),
        ("query", landscape.meta_objective, imaml),
    ):
        gradient = float(landscape.gradient(anchor, outer))
        assert gradient == pytest.approx(expected, abs=5e-5)
        numeric = float(objective(anchor + 1e-5) - objective(anchor - 1e-5)) / 2e-5
        assert gradient == pytest.approx(numeric, abs=1e-8)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_the_envelope_and_its_preconditioned_form(name: str) -> None:
    """lambda (theta0 - theta*), and that times lambda / (lambda + f'')."""
    landscape = Landscape.of(FUNCTIONS[name], 3.0)
    anchors = torch.linspace(LOW, HIGH, 50, dtype=torch.float64)
    theta = landscape.argmin(anchors)
    envelope = 3.0 * (anchors[:, None] - theta)
    torch.testing.assert_close(
        landscape.gradient(anchors, "elbo", theta), envelope, rtol=1e-12, atol=1e-12
    )
    expected = envelope * landscape.derivative(anchors, "closed form")
    torch.testing.assert_close(
        landscape.gradient(anchors, "query", theta), expected, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_only_the_variational_objective_is_continuous_at_jumps(name: str) -> None:
    landscape = Landscape.of(FUNCTIONS[name], 1.0)
    jumps = jumps_of(name, 1.0)
    assert jumps
    for jump in jumps:
        sides = torch.tensor([jump.anchor - 1e-8, jump.anchor + 1e-8], dtype=torch.float64)
        assert landscape.argmin(sides).flatten().tolist() == pytest.approx(
            [jump.left, jump.right], abs=1e-6
        )
        left, right = landscape.variational_objective(sides).flatten().tolist()
        assert left == pytest.approx(right, abs=1e-6)
        # F ties, so f jumps by what the penalty jumps, the other way
        left, right = landscape.meta_objective(sides).flatten().tolist()
        expected = 0.5 * (jump.left - jump.anchor) ** 2 - 0.5 * (jump.right - jump.anchor) ** 2
        assert right - left == pytest.approx(expected, abs=1e-6)
    steps = landscape.meta_objective(
        [s for j in jumps for s in (j.anchor - 1e-8, j.anchor + 1e-8)]
    ).reshape(-1, 2)
    assert float((steps[:, 1] - steps[:, 0]).abs().max()) > 0.05


def test_downhill_from_the_anchor() -> None:
    """Never over a bump, so it ends at the first well on the slope; the global minimum is as low or
    lower.
    """
    landscape = Landscape.of(FUNCTIONS["sine"], 0.3)
    anchors = torch.linspace(-3, 3, 25, dtype=torch.float64)
    reached = landscape.reached(anchors)
    grid = torch.arange(-5, 5, 1e-3, dtype=torch.float64)
    for anchor, theta in zip(anchors.tolist(), reached[:, 0].tolist(), strict=True):
        values = landscape.regularized(grid, anchor)[:, 0]
        point = int((anchor + 5) / 1e-3)
        while values[point + 1] < values[point] or values[point - 1] < values[point]:
            point += 1 if values[point + 1] < values[point] else -1
        assert theta == pytest.approx(float(grid[point]), abs=2e-3)
    lowest = landscape.variational_objective(anchors)
    assert bool((lowest <= landscape.variational_objective(anchors, reached) + 1e-12).all())
    assert bool((lowest < landscape.variational_objective(anchors, reached) - 1e-3).any())


# -- models ----------------------------------------------------------------------------------------


def test_loss_penalty_and_their_sum() -> None:
    landscape = Landscape.of(waves, 2.0, coefficients(3))
    theta = torch.linspace(-1, 1, 5, dtype=torch.float64)
    expected = torch.stack([waves(theta, row) for row in coefficients(3)], 1)
    torch.testing.assert_close(landscape.loss(theta), expected)
    torch.testing.assert_close(landscape.penalty(theta, 0.4), (theta - 0.4)[:, None] ** 2)
    torch.testing.assert_close(
        landscape.regularized(theta, 0.4), expected + (theta - 0.4)[:, None] ** 2
    )


@pytest.mark.parametrize("anchor", [-0.6, 0.3, 1.1])
def test_strategies_see_the_same(anchor: float) -> None:
    """A sine regression with one weight, ragged tasks and query data of their own."""
    model, tasks = scalar_model(vm.GaussianPrior(4.0)), ragged_tasks(4)
    landscape = Landscape(model, tasks)
    eta = model.init(torch.zeros((), dtype=torch.float64)) | {
        "w": torch.tensor(anchor, dtype=torch.float64)
    }
    # Alg here is the way downhill
    torch.testing.assert_close(
        landscape.reached(anchor), landscape.argmin(anchor), rtol=0, atol=1e-9
    )
    for outer, values, constant in (
        ("query", landscape.meta_objective(anchor), 0.0),
        ("elbo", landscape.variational_objective(anchor), landscape.normaliser),
    ):
        one = vm.meta_gradient(model, tasks, vm.Implicit("delta", outer), eta=eta)
        assert one.certificate is not None and one.certificate.ok
        assert float(values.sum()) + 4 * constant == pytest.approx(one.value, abs=1e-9)
        assert float(landscape.gradient(anchor, outer).sum()) == pytest.approx(
            float(one.grads["w"]), abs=1e-7
        )
    minimizer = vm.GradientDescent(lr=0.02)
    unrolled = vm.meta_gradient(
        model, tasks, vm.Unrolled(inner_steps=3, minimizer=minimizer), eta=eta
    )
    value = landscape.meta_objective(anchor, landscape.reached(anchor, minimizer, steps=3)).sum()
    assert float(value) == pytest.approx(unrolled.value, abs=1e-9)


def test_a_fit_ends_in_a_valley_of_its_landscape() -> None:
    net = nn.Linear(1, 1, bias=False)  # a weight of shape (1, 1), in float32
    model = vm.TaskModel(
        net, vm.likelihoods.Gaussian(scale=0.5, learn_scale=False), vm.GaussianPrior(2.0)
    )
    tasks = ragged_tasks(3)
    for outer in ("query", "elbo"):
        fit = vm.fit(model, tasks, vm.Implicit("delta", outer), progress=False)
        landscape = Landscape.of_fit(fit)
        theta0 = fit.prior.loc["weight"].flatten()
        assert float(landscape.gradient(theta0, outer).sum()) == pytest.approx(0.0, abs=1e-5)


def test_learned_numbers_are_taken_over() -> None:
    model, tasks = scalar_model(vm.GaussianPrior(4.0, "shared")), ragged_tasks(2)
    eta = {"log_precision": torch.tensor(math.log(9.0)), "log_sd": torch.tensor(1.0)}
    landscape = Landscape(model, tasks, eta)
    assert landscape.precision == pytest.approx(9.0)
    assert landscape.normaliser == pytest.approx(0.5 * math.log(2 * math.pi / 9.0))
    assert float(landscape.loss(0.0)[0, 0]) != float(Landscape(model, tasks).loss(0.0)[0, 0])


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "two weights": (
        lambda: Landscape(linear_model(vm.GaussianPrior()), ragged_tasks(2)),
        "2 weights",
    ),
    "a net": (
        lambda: Landscape(MODELS["net"](vm.GaussianPrior()), ragged_tasks(2)),
        "scalar weight",
    ),
    "a guide with a width": (
        lambda: Landscape.of_fit(
            known(scalar_model(vm.GaussianPrior()), ragged_tasks(2), vm.Joint("normal"))
        ),
        "has a width",
    ),
    "some queries": (
        lambda: Landscape(
            scalar_model(vm.GaussianPrior()),
            vm.TaskSet([*ragged_tasks(1), vm.Task((np.ones((1, 1)), np.ones(1)), name="bare")]),
        ),
        "'bare' has no query",
    ),
    "unknown eta": (
        lambda: Landscape(
            scalar_model(vm.GaussianPrior()), ragged_tasks(1), {"sd": torch.ones(())}
        ),
        "eta names",
    ),
    "a precision": (lambda: Landscape.of(torch.cos, -1.0), "positive"),
    "a spacing": (lambda: Landscape.of(torch.cos, spacing=0.0), "spacing"),
    "one number for all": (lambda: Landscape.of(torch.sum), "one number for each theta"),
    "a vector of coefficients": (lambda: Landscape.of(waves, 1.0, [1.0, 2.0]), "one row per task"),
    "other queries": (
        lambda: Landscape.of(waves, 1.0, coefficients(2), coefficients(3)),
        "query has shape",
    ),
    "a range": (lambda: Landscape.of(torch.cos).jumps(1.0, -1.0), "low < high"),
    "an endless range": (lambda: Landscape.of(torch.cos).jumps(0.0, math.inf), "low < high"),
    "one anchor": (lambda: Landscape.of(torch.cos).jumps(0.0, 1.0, 1), "at least 2"),
    "a NaN": (lambda: Landscape.of(torch.cos).argmin([0.0, math.nan]), "finite"),
    "no anchors": (lambda: Landscape.of(torch.cos).argmin([]), "along one axis"),
    "a table of anchors": (
        lambda: Landscape.of(torch.cos).argmin(torch.zeros(2, 2)),
        "along one axis",
    ),
    "a route": (lambda: Landscape.of(torch.cos).derivative(0.0, "adjoint"), "route must be"),
    "an outer": (lambda: Landscape.of(torch.cos).gradient(0.0, "query_elbo"), "outer must be"),
    "another theta": (
        lambda: Landscape.of(torch.cos).meta_objective([0.0, 1.0], torch.zeros(1, 1)),
        "theta has shape",
    ),
    "a pole": (
        lambda: Landscape.of(lambda t: 1 / (t - 1).abs()).argmin(0.0),
        "not finite at theta = 1",
    ),
    "no minimum": (lambda: Landscape.of(lambda t: -(t**2)).argmin(0.5), "falls as fast"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_no_function() -> None:
    with pytest.raises(TypeError, match="must be a function"):
        Landscape.of(3.0)  # type: ignore[arg-type]


def test_a_kink_is_said() -> None:
    with pytest.warns(RuntimeWarning, match="not exact"):
        Landscape.of(lambda t: (t - 0.003).abs()).argmin(0.5)
