"""Tasks' posteriors given eta: evidence and moments against closed forms and one-dimensional
quadrature.
"""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, special, stats
from torch import Tensor, nn

import varmeta as vm
from tests.fuzz.oracles import gaussian_task
from varmeta.fitting.groups_by_size import elbo_losses
from varmeta.hyper.conditional import conditionals
from varmeta.numerics.quadrature import nodes, normal_points
from varmeta.numerics.rows import rowwise
from varmeta.numerics.tree import map_tree

F64 = torch.float64


def ragged(sizes: tuple[int, ...], seed: int = 0) -> vm.TaskSet:
    rng = np.random.default_rng(seed)
    return vm.TaskSet(
        [vm.Task(support=(rng.normal(size=(n, 1)), rng.normal(size=n))) for n in sizes]
    )


def several(eta: dict[str, Tensor], number: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: value + 0.3 * torch.randn(number, *value.shape, generator=generator, dtype=F64)
        for name, value in eta.items()
    }


def test_linear_gaussian_tasks_have_a_closed_form() -> None:
    tasks = ragged((0, 1, 4, 9))
    model = vm.TaskModel(
        vm.LinearPredictor(["x"]),
        vm.likelihoods.Gaussian(),
        vm.GaussianPrior(learn_precision="full"),
    )
    eta = several(model.init(torch.zeros((), dtype=F64)))
    assert model.is_linear_gaussian
    quadrature, exact = (
        conditionals(model, tasks.batch(), eta, gaussian) for gaussian in (False, True)
    )
    for k in range(3):
        one = {name: value[k] for name, value in eta.items()}
        prior = model.prior_distribution(one)
        mean, covariance, noise = (
            prior.mean,
            prior.covariance_matrix,
            float(one["log_scale"].exp()) ** 2,
        )
        for i, task in enumerate(tasks):
            x, y = task.support or (torch.zeros(0, 1, dtype=F64), torch.zeros(0, dtype=F64))
            design = torch.cat([torch.ones(len(x), 1, dtype=F64), x], 1)
            total = design @ covariance @ design.T + noise * torch.eye(len(x), dtype=F64)
            evidence = stats.multivariate_normal(design @ mean, total).logpdf(y) if len(y) else 0.0
            precision = torch.linalg.inv(covariance) + design.T @ design / noise
            spread = torch.linalg.inv(precision)
            centre = spread @ (torch.linalg.solve(covariance, mean) + design.T @ y / noise)
            for found in (quadrature, exact):
                assert float(found.log_evidence[k, i]) == pytest.approx(float(evidence), abs=1e-9)
                torch.testing.assert_close(found.mean[k, i], centre, atol=1e-8, rtol=1e-8)
                torch.testing.assert_close(found.covariance[k, i], spread, atol=1e-8, rtol=1e-8)
                assert bool(found.converged[k, i])


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (3, 7), (47, 50)])
@pytest.mark.parametrize("sd", [1e-4, 0.5, 3.0])
def test_binomial_tasks_by_quadrature(successes: int, trials: int, sd: float) -> None:
    tasks = vm.TaskSet(
        [vm.Task(support=(np.zeros((1, 0)), np.array([[float(successes), float(trials)]])))]
    )
    model = vm.TaskModel(
        vm.LinearPredictor([]),
        vm.likelihoods.Binomial(),
        vm.GaussianPrior(learn_precision="shared"),
    )
    eta = {
        "intercept": torch.tensor([-0.7], dtype=F64),
        "log_precision": torch.tensor([-2.0 * math.log(sd)], dtype=F64),
    }
    found = conditionals(model, tasks.batch(), eta, False)

    def joint(power: int) -> float:
        def density(z: float) -> float:
            theta = -0.7 + sd * z
            return (
                theta**power
                * stats.norm.pdf(z)
                * stats.binom.pmf(successes, trials, special.expit(theta))
            )

        return integrate.quad(density, -12, 12, epsabs=1e-14, epsrel=1e-11, limit=400)[0]

    evidence, first, second = joint(0), joint(1), joint(2)
    mean = first / evidence
    variance = second / evidence - mean**2
    # the skew of no success in few trials under a wide prior is the hardest
    assert float(found.log_evidence) == pytest.approx(math.log(evidence), abs=5e-4)
    assert float(found.mean) == pytest.approx(mean, abs=2e-3 * math.sqrt(variance))
    assert float(found.covariance) == pytest.approx(variance, rel=1e-2)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_nodes_are_those_of_a_standard_normal(size: int) -> None:
    z, log_weight = nodes(size)
    weight = log_weight.exp()
    exact = 1e-10 if size <= 3 else 0.1
    assert float(weight.sum()) == pytest.approx(1.0)
    torch.testing.assert_close(weight @ z, torch.zeros(size, dtype=F64), atol=exact, rtol=0)
    covariance = (weight[:, None] * z).T @ z
    torch.testing.assert_close(covariance, torch.eye(size, dtype=F64), atol=exact, rtol=0)
    assert torch.equal(normal_points(8, size, 3), normal_points(8, size, 3))


def test_groups_of_ragged_tasks_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varmeta.tasks.batch.WORTH", 10)
    tasks = ragged((3, 40, 0, 2, 38, 3, 5))
    batch = tasks.batch()
    groups = batch.by_size()
    assert len(groups) == 2 and sorted(torch.cat([rows for rows, _ in groups]).tolist()) == list(
        range(7)
    )
    for rows, group in groups:
        assert group.names == tuple(batch.names[i] for i in rows.tolist())
        assert group.support.mask.shape[1] == int(batch.support.num_points[rows].max())
    model = vm.TaskModel(
        vm.LinearPredictor(["x"]),
        vm.likelihoods.Gaussian(),
        vm.GaussianPrior(learn_precision="full"),
    )
    problem = vm.Joint("multivariate_normal").problem(model, tasks, 0)
    eta = {
        name: value[0] for name, value in several(model.init(torch.zeros((), dtype=F64))).items()
    }
    phi = map_tree(lambda x: x + torch.randn(x.shape, dtype=F64), problem.start(batch, eta))
    torch.testing.assert_close(
        elbo_losses(problem, batch)(phi, eta), problem.losses("elbo", batch, 0)(phi, eta)
    )


def test_rows_one_by_one_where_vmap_refuses() -> None:
    def fn(x: Tensor) -> Tensor:
        return x * float(x.detach().sum() > 0)  # data-dependent control flow

    x = torch.tensor([[1.0, 2.0], [-3.0, 1.0]])
    torch.testing.assert_close(rowwise(fn)(x), torch.tensor([[1.0, 2.0], [0.0, 0.0]]))


def test_a_program_that_vmap_refuses_still_has_a_posterior() -> None:
    import pyro

    def program(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
        assert float(params["mean"].detach().sum()) == float(params["mean"].detach().sum())
        return pyro.sample("y", dist.Normal(params["mean"], 1.0), obs=y)

    tasks = vm.TaskSet(
        [vm.Task(support=(np.zeros((2, 0)), np.array([0.5, 1.5]) + i)) for i in range(3)]
    )
    model = vm.TaskModel.from_pyro(program, {"mean": ()}, vm.GaussianPrior(1.0))
    eta = {"mean": torch.tensor([0.0, 1.0], dtype=F64)}
    found = conditionals(model, tasks.batch(), eta, False)
    # prior N(m, 1), two observations of variance 1
    expected = (eta["mean"][:, None] + 2 * (1 + torch.arange(3.0, dtype=F64))) / 3
    torch.testing.assert_close(found.mean[..., 0], expected)


def far_apart(
    seed: int, unit: float, offset: float, response: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tasks of 4, 6, 1, 4 and 6 rows whose second column is the first."""
    rng = np.random.default_rng(seed)
    pairs = []
    for size in (4, 6, 1, 4, 6):
        x = rng.normal(size=(size, 1)) + offset
        pairs.append(
            (np.repeat(unit * x, 2, 1), response * (x[:, 0] - offset + 0.5 * rng.normal(size=size)))
        )
    return pairs


@pytest.mark.parametrize("precision", [1e-12, 1e-4, 1.0])
@pytest.mark.parametrize(("unit", "offset"), [(1.0, 0.0), (1.0, 100.0), (1e3, 0.0)])
def test_columns_that_repeat_each_other_under_a_wide_prior(
    precision: float, unit: float, offset: float
) -> None:
    """The evidence in fifty digits: curvatures 1 and 1e16 side by side were no covariance any more,
    or cost nats.
    """
    pairs = far_apart(0, unit, offset, 1.0)
    tasks = vm.TaskSet([vm.Task(pair) for pair in pairs])
    torch.manual_seed(0)
    net = nn.Linear(2, 1).double()
    model = vm.TaskModel(
        net, vm.likelihoods.Gaussian(0.5, learn_scale=False), vm.GaussianPrior(precision)
    )
    eta = {
        name: value.detach().unsqueeze(0)
        for name, value in model.init(torch.zeros((), dtype=F64)).items()
    }
    found = conditionals(model, tasks.batch(), eta, True).log_evidence[0]
    theta0 = model.weights.flatten({name: value[0] for name, value in eta.items()}).numpy()
    for i, (x, y) in enumerate(pairs):
        design = np.concatenate([x, np.ones((len(x), 1))], 1)
        exact = gaussian_task(design, y, theta0, np.full(3, precision), 0.5).log_evidence
        # float64 loses as many digits of a determinant as its curvatures are apart; of a direction
        # that is lost the prior is left
        apart = np.square(design).sum() / (0.25 * precision)
        assert float(found[i]) == pytest.approx(
            exact, abs=min(1e-2, 1e-9 + 1e-15 * apart), rel=1e-8
        )


def test_a_fit_to_columns_that_repeat_each_other_has_a_right_log_likelihood_or_none() -> None:
    pairs = far_apart(10, 1e6, 0.0, 1e6)
    torch.manual_seed(0)
    model = vm.TaskModel(
        nn.Linear(2, 1).double(),
        vm.likelihoods.Gaussian(0.5, learn_scale=False),
        vm.GaussianPrior(learn_precision="shared"),
    )
    tasks = vm.TaskSet([vm.Task(pair) for pair in pairs])
    with pytest.warns(RuntimeWarning, match="has not converged"):
        fit = vm.fit(model, tasks, vm.Joint("multivariate_normal"))
    # 1e12 nats in float64: the objective is the evidence but for its rounding, of some hundred
    # nats, which is no 1e-4
    assert fit.log_likelihood is None
    theta0, precision = (
        model.weights.flatten(part).numpy() for part in (fit.prior.loc, fit.prior.precision)
    )
    exact = sum(
        gaussian_task(
            np.concatenate([x, np.ones((len(x), 1))], 1), y, theta0, precision, 0.5
        ).log_evidence
        for x, y in pairs
    )
    assert -fit.loss == pytest.approx(exact, rel=1e-8)
