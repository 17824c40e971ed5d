"""Values below a limit of detection: a Pyro program whose y has two columns, the value (or the
limit) and whether it is below.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import varmeta as vm

LIMIT, SCALE = -0.3, 0.5


def censored(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    noise = dist.Normal(params["level"] + x, SCALE)
    if y is None:
        return pyro.sample("y", noise)
    value, below = y[..., 0], y[..., 1] > 0
    pyro.factor(
        "below the limit",
        torch.where(below, torch.special.log_ndtr((value - noise.loc) / SCALE), 0.0),
    )
    with pyro.poutine.mask(mask=~below):
        return pyro.sample("y", noise, obs=value)


def assays(number: int, seed: int = 0, rows: tuple[int, ...] = (2, 5, 3)) -> vm.TaskSet:
    """level_i ~ N(0, 1); what lies below the limit is recorded as the limit."""
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for i in range(number):
        x = torch.linspace(-0.5, 0.5, rows[i % len(rows)], dtype=torch.float64)
        draws = torch.randn(1 + len(x), generator=generator, dtype=torch.float64)
        value = draws[0] + x + SCALE * draws[1:]
        below = value < LIMIT
        tasks.append(
            vm.Task(
                (x, torch.stack([value.clamp(min=LIMIT), below.to(value)], -1)), name=f"assay {i}"
            )
        )
    return vm.TaskSet(tasks)


def model(prior: vm.GaussianPrior) -> vm.TaskModel:
    return vm.TaskModel.from_pyro(censored, {"level": ()}, prior)


def exact(tasks: vm.TaskSet, loc: float, sd: float) -> Tensor:
    """log p(y_i) by the trapezoid rule over +-12 prior sds, `(tasks,)`: of a smooth integrand,
    exact to rounding.
    """
    level = torch.linspace(loc - 12 * sd, loc + 12 * sd, 20_001, dtype=torch.float64)
    out = []
    for task in tasks:
        assert task.support is not None
        x, y = task.support
        z = (y[:, 0, None] - level - x[:, None]) / SCALE
        density = -0.5 * z.square() - math.log(SCALE * math.sqrt(2 * math.pi))
        terms = torch.where(y[:, 1, None] > 0, torch.special.ndtr(z).log(), density).sum(0)
        prior = -0.5 * ((level - loc) / sd).square() - math.log(sd * math.sqrt(2 * math.pi))
        out.append((terms + prior).logsumexp(0) + (level[1] - level[0]).log())
    return torch.stack(out)


def test_evidence_is_the_integral() -> None:
    tasks = assays(30)
    assert (
        sum(float(task.support[1][:, 1].sum()) for task in tasks if task.support) > 10
    )  # rows below the limit
    fit = vm.fit(
        model(vm.GaussianPrior(learn_precision="shared")),
        tasks,
        vm.Joint("multivariate_normal"),
        compile=False,
    )
    assert fit.converged
    integral = exact(tasks, float(fit.prior.loc["level"]), float(fit.prior.sd["level"]))
    found = fit.posterior().evidence(num_samples=4000)
    assert (
        abs(found["evidence"].iloc[:-1] - integral.numpy()) <= 4 * found["se"].iloc[:-1] + 1e-4
    ).all()
    assert 0.0 < float(integral.sum()) + fit.loss < 0.02 * len(tasks)  # a bound, and near


def test_the_estimates_are_those_of_the_integral() -> None:
    """The dense guide's optimum and the integral's, by the integral's slope: steeper nowhere than a
    tenth of a standard error.
    """
    tasks = assays(30)
    fit = vm.fit(
        model(vm.GaussianPrior(learn_precision="shared")),
        tasks,
        vm.Joint("multivariate_normal"),
        compile=False,
    )
    loc, log_sd = float(fit.prior.loc["level"]), math.log(float(fit.prior.sd["level"]))

    def total(a: float, b: float) -> float:
        return float(exact(tasks, loc + a, math.exp(log_sd + b)).sum())

    for a, b in ((1e-3, 0.0), (0.0, 1e-3)):
        slope = (total(a, b) - total(-a, -b)) / 2e-3
        curvature = -(total(a, b) - 2 * total(0.0, 0.0) + total(-a, -b)) / 1e-6
        assert curvature > 0
        assert abs(slope) / math.sqrt(curvature) < 0.1


def test_padding_counts_for_nothing() -> None:
    """A censored row in the padding would count log Phi: tasks of 2 to 5 rows together, and each on
    its own.
    """
    tasks, own = assays(3), model(vm.GaussianPrior(precision=2.0))
    for strategy in (vm.Implicit("multivariate_normal"), vm.Implicit("laplace")):
        together = vm.meta_gradient(own, tasks, strategy)
        alone = [vm.meta_gradient(own, tasks[i : i + 1], strategy) for i in range(3)]
        assert float(together.value) == pytest.approx(
            sum(float(part.value) for part in alone), rel=1e-12
        )
        grads = sum(float(part.grads["level"]) for part in alone)
        assert float(together.grads["level"]) == pytest.approx(grads, rel=1e-9)


def test_truth_is_recovered_where_the_limit_as_a_value_is_off() -> None:
    tasks = assays(300, rows=(4,))
    learned = vm.GaussianPrior(learn_precision="shared")
    right = vm.fit(model(learned), tasks, vm.Joint("multivariate_normal"), compile=False)
    plain = vm.TaskSet(
        [
            vm.Task((t.support[0], t.support[1] * torch.tensor([1.0, 0.0])), name=t.name)
            for t in tasks
            if t.support
        ]
    )
    wrong = vm.fit(model(learned), plain, vm.Joint("multivariate_normal"), compile=False)
    assert right.standard_errors is not None and wrong.standard_errors is not None
    for fit, ok in ((right, True), (wrong, False)):
        assert (abs(float(fit.prior.loc["level"])) <= 3 * float(fit.standard_errors["level"])) is ok  # type: ignore[index]
    assert float(right.prior.sd["level"]) == pytest.approx(1.0, rel=4 / math.sqrt(600))
    # predictions are of values, below the limit too
    drawn = right.posterior().predict([0.0], num_samples=2000)
    assert drawn.samples.shape == (2000, 300, 1) and float(drawn.samples.min()) < LIMIT - 1
