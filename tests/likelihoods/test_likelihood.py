"""Likelihoods against scipy, through the whole model; their supports; their second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import special, stats
from torch import Tensor, nn

import varmeta as vm
from tests.cases import seeded
from tests.common import F64, junk, moved, problem, randn, start, with_grad
from varmeta.models.check import check_model

L = vm.likelihoods
COUNTS = torch.tensor([0, 2, 1, 3, 0, 1, 2])
TRIALS = torch.stack([COUNTS, torch.tensor([3, 4, 2, 3, 1, 5, 2])], -1)


WEIGHTS = torch.tensor([1, 2, 3, 1, 2, 1, 4])


def ordered(y: Any, out: Any, cutpoints: list[float]) -> Any:
    """Probabilities of the cumulative logit model, as differences."""
    edges = np.array([-np.inf, *cutpoints, np.inf])
    return special.expit(edges[y + 1] - out) - special.expit(edges[y] - out)


def sigmoid(out: Any) -> Any:
    return special.expit(out)


# name: likelihood, y of seven rows, outputs of the network, log density of row by scipy, junk for y
# in the padding
CASES: dict[str, tuple[Any, Tensor, int, Callable[[Any, Any], Any], float]] = {
    "gaussian": (
        L.Gaussian(0.7),
        randn(7, seed=4),
        1,
        lambda y, f: stats.norm(f[..., 0], 0.7).logpdf(y),
        1e6,
    ),
    "gaussian_fixed": (
        L.Gaussian(0.7, False),
        randn(7, seed=4),
        1,
        lambda y, f: stats.norm(f[..., 0], 0.7).logpdf(y),
        1e6,
    ),
    "two_responses": (
        L.Gaussian(0.7),
        randn(7, 2, seed=4),
        2,
        lambda y, f: stats.norm(f, 0.7).logpdf(y).sum(-1),
        1e6,
    ),
    "one_response_column": (
        L.Gaussian(0.7),
        randn(7, 1, seed=4),
        1,
        lambda y, f: stats.norm(f, 0.7).logpdf(y).sum(-1),
        1e6,
    ),
    "student": (
        L.StudentT(3.0, 0.7),
        randn(7, seed=4),
        1,
        lambda y, f: stats.t(3.0, f[..., 0], 0.7).logpdf(y),
        1e6,
    ),
    "bernoulli": (
        L.Bernoulli(),
        COUNTS % 2,
        1,
        lambda y, f: stats.bernoulli(sigmoid(f[..., 0])).logpmf(y),
        7,
    ),
    "categorical": (
        L.Categorical(3),
        COUNTS % 3,
        3,
        lambda y, f: np.take_along_axis(special.log_softmax(f, -1), y[..., None], -1)[..., 0],
        9,
    ),
    "poisson": (
        L.Poisson(),
        COUNTS,
        1,
        lambda y, f: stats.poisson(np.exp(f[..., 0])).logpmf(y),
        10**6,
    ),
    "lognormal": (
        L.LogNormal(0.7),
        randn(7, seed=4).exp(),
        1,
        lambda y, f: stats.lognorm(0.7, scale=np.exp(f[..., 0])).logpdf(y),
        1e6,
    ),
    "negative_binomial": (
        L.NegativeBinomial(1.7),
        COUNTS,
        1,
        lambda y, f: stats.nbinom(1.7, 1.7 / (1.7 + np.exp(f[..., 0]))).logpmf(y),
        10**6,
    ),
    "ordinal": (
        L.Ordinal(4),
        COUNTS,
        1,
        lambda y, f: np.log(ordered(y, f[..., 0], [0.0, 1.0, 2.0])),
        99,
    ),
    "ordinal of two": (
        L.Ordinal(2),
        COUNTS % 2,
        1,
        lambda y, f: stats.bernoulli(sigmoid(f[..., 0])).logpmf(y),
        99,
    ),
    "weighted": (
        L.Weighted(L.Poisson()),
        torch.stack([COUNTS, WEIGHTS], -1),
        1,
        lambda y, f: y[..., 1] * stats.poisson(np.exp(f[..., 0])).logpmf(y[..., 0]),
        99,
    ),
    "weighted trials": (
        L.Weighted(L.Binomial()),
        torch.cat([TRIALS, WEIGHTS[:, None]], -1),
        1,
        lambda y, f: y[..., 2] * stats.binom(y[..., 1], sigmoid(f[..., 0])).logpmf(y[..., 0]),
        99,
    ),
    "binomial": (
        L.Binomial(4),
        COUNTS,
        1,
        lambda y, f: stats.binom(4, sigmoid(f[..., 0])).logpmf(y),
        99,
    ),
    "binomial_trials": (
        L.Binomial(),
        TRIALS,
        1,
        lambda y, f: stats.binom(y[..., 1], sigmoid(f[..., 0])).logpmf(y[..., 0]),
        99,
    ),
}


def case(name: str, features: int | None = 2) -> tuple[vm.TaskModel, vm.TaskSet, nn.Linear]:
    likelihood, y, channels, _, _ = CASES[name]
    x = randn(7) if features is None else randn(7, features)
    tasks = [
        vm.Task((x[:4], y[:4])),
        vm.Task((x[4:6], y[4:6]), query=(x[:2], y[:2])),
        vm.Task((x[6:], y[6:])),
    ]
    net = seeded(lambda: nn.Linear(features or 1, channels))
    assert isinstance(net, nn.Linear)
    return vm.TaskModel(net, likelihood, vm.GaussianPrior(2.0)), vm.TaskSet(tasks), net


@pytest.mark.parametrize("features", [None, 2])
@pytest.mark.parametrize("name", CASES)
def test_log_density_is_scipys(name: str, features: int | None) -> None:
    """A delta guide at theta0: -log prior density is known, the rest is the likelihood summed over
    rows.
    """
    model, tasks, net = case(name, features)
    check_model(model, tasks)
    eta, density = start(model), CASES[name][3]
    made = problem(model, "delta")
    batch = tasks.batch()
    nll = made.objective.terms(
        made.start(batch, eta), eta, batch.support, torch.zeros(1, 1, 1, dtype=F64)
    )[1][0]
    for index, task in enumerate(tasks):
        assert task.support is not None
        x, y = task.support
        out = net(x.reshape(len(x), -1)).detach().numpy()
        assert float(nll[index]) == pytest.approx(-float(density(y.numpy(), out).sum()), rel=1e-12)


@pytest.mark.parametrize("guide", ["delta", "normal", "multivariate_normal"])
@pytest.mark.parametrize("name", CASES)
def test_padding_changes_nothing_and_tasks_do_not_meet(name: str, guide: str) -> None:
    """Junk in the padding changes loss and every gradient by exactly 0; a set is the loop over its
    tasks to 1e-12.
    """
    model, tasks, _ = case(name)
    made, batch = problem(model, guide), tasks.batch()
    eta = moved(start(model))
    phi = moved(made.start(batch, eta), seed=2)

    def evaluate(some: Any, rows: Any, objective: str = "elbo") -> list[Tensor]:
        point, shared = with_grad({key: value[rows] for key, value in phi.items()}), with_grad(eta)
        losses = made.losses(objective, some, 0)(point, shared)
        leaves = [*point.values(), *shared.values()]
        gradients = torch.autograd.grad(
            losses.sum(), leaves, allow_unused=True, materialize_grads=True
        )
        return [losses.detach(), *gradients]

    for objective in ("elbo", "query", "query_predictive"):
        clean, spoiled = (
            evaluate(some, slice(None), objective) for some in (batch, junk(batch, CASES[name][4]))
        )
        for a, b in zip(clean, spoiled, strict=True):
            assert torch.equal(a, b)
    whole = evaluate(batch, slice(None))
    parts = [
        evaluate(tasks[[index]].batch(), slice(index, index + 1)) for index in range(len(tasks))
    ]
    for position, together in enumerate(whole):
        apart = [part[position] for part in parts]
        joined = torch.cat(apart) if position <= len(phi) else torch.stack(apart).sum(0)
        torch.testing.assert_close(together, joined, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["binomial", "bernoulli", "categorical", "poisson"])
def test_second_derivative_where_the_network_puts_out_zero(name: str) -> None:
    """torch's own Binomial has none at log odds of exactly 0, where theta0 = 0 puts every row."""
    likelihood, y, channels, density, _ = CASES[name]
    out = torch.zeros(7, channels, dtype=F64)

    def nll(value: Tensor) -> Tensor:
        value = value if channels > 1 else value.squeeze(-1)
        return -likelihood.distribution(value, {}, y).log_prob(likelihood.observed(y).to(F64)).sum()

    curvature = (
        torch.autograd.functional.hessian(nll, out)
        .reshape(7 * channels, -1)
        .diagonal()
        .reshape(7, channels)
    )
    step = 1e-4
    for channel in range(channels):
        shift = np.zeros((7, channels))
        shift[:, channel] = step
        numeric = (
            -(
                density(y.numpy(), shift)
                - 2 * density(y.numpy(), 0 * shift)
                + density(y.numpy(), -shift)
            )
            / step**2
        )
        np.testing.assert_allclose(curvature[:, channel], numeric, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("likelihood", "y", "expected"),
    [
        (L.Bernoulli(), [0.0, 1.0, 2.0], "0 or 1"),
        (L.Bernoulli(), [[0.0, 1.0], [1.0, 1.0], [1.0, 0.5]], "0 or 1"),
        (L.Categorical(3), [0, 1, 3], "a class 0, ..., 2"),
        (L.Categorical(), [0, 1, -1], "a class"),
        (L.Categorical(), [0, 1, 7], "Categorical"),  # known only once the network has run
        (L.Poisson(), [0.0, 1.0, 1.5], "a count"),
        (L.Binomial(2), [0, 1, 3], "a count 0, ..., 2"),
        (L.LogNormal(), [1.0, 0.5, 0.0], "a positive number"),
        (L.NegativeBinomial(), [0.0, 1.0, -1.0], "a count"),
        (L.Ordinal(3), [0, 1, 3], "an ordered class 0, ..., 2"),
        (L.Weighted(L.Poisson()), [[1.0, 1.0], [1.0, 0.5], [1.0, 0.0]], "a positive weight"),
        (L.Binomial(), [[0, 1], [1, 1], [2, 1]], "successes <= trials"),
    ],
)
def test_outside_the_support_names_task_and_row(
    likelihood: Any, y: list[Any], expected: str
) -> None:
    x = torch.zeros(3, 1)
    good = (x[:1], torch.as_tensor(y[:1]))
    tasks = vm.TaskSet([vm.Task(good, name="a"), vm.Task((x, torch.as_tensor(y)), name="b")])
    channels = (
        3 if isinstance(likelihood, L.Categorical) else 2 if torch.as_tensor(y).dim() == 2 else 1
    )
    model = vm.TaskModel(nn.Linear(1, channels), likelihood)
    with pytest.raises(ValueError, match=f"task 'b', row 2: y = .*{expected}"):
        check_model(model, tasks)


@pytest.mark.parametrize(
    ("likelihood", "channels", "y"),
    [
        (L.Gaussian(), 1, torch.zeros(3, 2)),  # broadcasting would give both responses one mean
        (L.Gaussian(), 2, torch.zeros(3)),
        (L.Gaussian(), 3, torch.zeros(3, 2)),
        (L.Categorical(), 3, torch.zeros(3, 1).long()),
        (L.Binomial(3), 1, torch.zeros(3, 2)),
    ],
)
def test_outputs_that_do_not_fit_y(likelihood: Any, channels: int, y: Tensor) -> None:
    tasks = vm.TaskSet([vm.Task((torch.zeros(3, 1), y)), vm.Task((torch.zeros(1, 1), y[:1]))])
    with pytest.raises(ValueError, match=r"does not (fit|run)"):
        check_model(vm.TaskModel(nn.Linear(1, channels), likelihood), tasks)


@pytest.mark.parametrize("points", [1, 2])
def test_a_network_may_leave_out_its_only_channel(points: int) -> None:
    """Also with one point, where the points' axis looks like a channel."""
    tasks = vm.TaskSet([vm.Task((randn(points, 2), randn(points))) for _ in range(3)])
    flat = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)).double()
    check_model(vm.TaskModel(flat, L.Gaussian()), tasks)
    made = [
        problem(vm.TaskModel(net, L.Gaussian()), "delta") for net in (flat, nn.Sequential(flat[0]))
    ]
    values = [
        p.losses("elbo", tasks.batch(), 0)(p.start(tasks.batch(), start(p.model)), start(p.model))
        for p in made
    ]
    assert torch.equal(*values)


@pytest.mark.parametrize(
    "make",
    [
        lambda: L.Gaussian(scale=0.0), lambda: L.Gaussian(scale=float("nan")),
        lambda: L.StudentT(df=-1.0), lambda: L.LogNormal(-1.0),
        lambda: L.Categorical(1), lambda: L.Ordinal(1), lambda: L.Ordinal(2.5),
        lambda: L.Binomial(0), lambda: L.NegativeBinomial(0.0),
    ],
)  # fmt: skip
def test_settings_without_meaning(make: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()


def test_the_scale_is_learned_where_asked() -> None:
    net = nn.Linear(1, 1)
    assert "log_scale" in start(vm.TaskModel(net, L.StudentT(scale=0.5)))
    assert float(start(vm.TaskModel(net, L.Gaussian(0.5)))["log_scale"].exp()) == pytest.approx(0.5)
    assert "log_scale" not in start(vm.TaskModel(net, L.Gaussian(0.5, learn_scale=False)))


def test_a_weight_is_the_row_repeated() -> None:
    x, y = randn(7, 2), COUNTS
    many = vm.TaskSet([vm.Task((x.repeat_interleave(WEIGHTS, 0), y.repeat_interleave(WEIGHTS)))])
    few = vm.TaskSet([vm.Task((x, torch.stack([y, WEIGHTS], -1)))])
    values = []
    for tasks, likelihood in ((many, L.Poisson()), (few, L.Weighted(L.Poisson()))):
        model = vm.TaskModel(seeded(lambda: nn.Linear(2, 1)), likelihood, vm.GaussianPrior(2.0))
        values.append(vm.meta_gradient(model, tasks, vm.Implicit("laplace")))
    assert values[0].value == pytest.approx(values[1].value, rel=1e-12)
    for name, gradient in values[0].grads.items():
        torch.testing.assert_close(gradient, values[1].grads[name])
    posterior = vm.fit(model, few, vm.Implicit("laplace"), num_steps=1).posterior()
    assert posterior.predict(x[:2], num_samples=3).samples.shape == (3, 1, 2)
    with pytest.raises(TypeError, match="likelihood must be one of"):
        L.Weighted("poisson")  # type: ignore[arg-type]


def test_an_offset_is_a_column_with_a_known_coefficient() -> None:
    predictor = vm.LinearPredictor(["age", "log_years"], offset="log_years")
    assert [name for name, _ in predictor.named_parameters()] == ["intercept", "age"]
    with torch.no_grad():
        predictor.age.fill_(2.0)
    assert predictor(torch.tensor([[1.0, 5.0], [0.0, -1.0]])).tolist() == [7.0, -1.0]
    assert "offset(log_years)" in repr(predictor)
    with pytest.raises(ValueError, match=r"offset names \['years'\], but the columns are"):
        vm.LinearPredictor(["age"], offset="years")


def test_what_a_likelihood_learned_in_readable_numbers() -> None:
    gaps = torch.tensor([[1.0, 0.5], [2.0, 2.0]], dtype=F64).log()
    found = L.Weighted(L.Ordinal(4)).learned({"log_gaps": gaps})
    assert {name: value.tolist() for name, value in found.items()} == {
        "cutpoint 1": pytest.approx([1.0, 2.0]), "cutpoint 2": pytest.approx([1.5, 4.0]),
    }  # fmt: skip
    assert (
        L.Ordinal(2).learned({})
        == L.Gaussian(1.0, False).learned({})
        == L.Poisson().learned({})
        == {}
    )


@pytest.mark.parametrize("name", ["concentration", "gaps"])
def test_learned_numbers_are_recovered(name: str) -> None:
    """Many rows from known numbers: the fit finds them within four standard errors."""
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for _ in range(30):
        level = 1.0 + 0.5 * float(torch.randn((), generator=generator))
        u = torch.rand(60, generator=generator, dtype=F64)
        if name == "gaps":  # cutpoints 0, 1.5, 2
            y = (
                u.unsqueeze(-1) < torch.sigmoid(level - torch.tensor([0.0, 1.5, 2.0], dtype=F64))
            ).sum(-1)
        else:
            y = torch.from_numpy(
                stats.nbinom(2.0, 2.0 / (2.0 + np.exp(level))).ppf(u.numpy())
            ).long()
        tasks.append(vm.Task((torch.zeros(60, 0, dtype=F64), y)))
    likelihood = L.Ordinal(4) if name == "gaps" else L.NegativeBinomial()
    model = vm.TaskModel(
        vm.LinearPredictor([]).double(), likelihood, vm.GaussianPrior(learn_precision="shared")
    )
    fit = vm.fit(model, vm.TaskSet(tasks), vm.Implicit("laplace"))
    assert fit.converged
    if name == "gaps":
        found = likelihood.cutpoints(fit.eta, fit.eta["log_gaps"])
        torch.testing.assert_close(
            found, torch.tensor([0.0, 1.5, 2.0], dtype=F64), rtol=0, atol=0.35
        )
    else:
        assert float(fit.eta["log_concentration"]) == pytest.approx(np.log(2.0), abs=0.25)
    assert float(fit.prior.sd["intercept"]) == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize("c", [1e-3, 0.5, 29.99, 30.01, 1e4, 1e9])
def test_the_negative_binomial_and_its_derivatives_in_any_concentration(c: float) -> None:
    """Against Gamma(c + y) / (Gamma(c) c^y) = prod_{k < y} (1 + k / c), whose derivatives lose no
    digits.
    """
    y, log_mean = torch.arange(40, dtype=F64), torch.tensor(1.3, dtype=F64)

    def product(log_c: Tensor) -> Tensor:
        k = torch.arange(40, dtype=F64)
        rising = torch.where(k < y[:, None], (k / log_c.exp()).log1p(), 0.0).sum(-1)
        return (
            rising
            - (y + 1).lgamma()
            + y * log_mean
            - (log_c.exp() + y) * (log_mean.exp() / log_c.exp()).log1p()
        )

    def ours(log_c: Tensor) -> Tensor:
        return (
            L.NegativeBinomial()
            .distribution(log_mean.expand(40), {"log_concentration": log_c})
            .log_prob(y)
        )

    at = torch.tensor(np.log(c), dtype=F64)
    for mine, its in ((ours, product), (torch.func.jacfwd(ours), torch.func.jacfwd(product))):
        torch.testing.assert_close(mine(at), its(at), rtol=1e-9, atol=1e-12)
    second = (torch.func.jacfwd(torch.func.jacfwd(f))(at) for f in (ours, product))
    torch.testing.assert_close(*second, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    ("returned", "error", "match"),
    [
        (lambda out, eta: -out.square(), TypeError, "Own.distribution returned a Tensor, expected"),
        (
            lambda out, eta: dist.Normal(out, eta["log_beta"].exp()),
            ValueError,
            "Own reads 'log_beta', of which nothing is known: .* its init returns",
        ),
        (
            lambda out, eta: dist.Normal(out.sum(-1), 1.0),
            ValueError,
            r"one of batch shape \(2, 1\) for outputs of shape \(2, 1, 5\), expected \(2, 1, 5\)",
        ),
        (lambda out, eta: dist.Normal(out[0], 1.0), ValueError, r"batch shape \(1, 5\)"),
    ],
)
def test_what_a_likelihood_of_ones_own_returns_is_looked_at(returned, error, match):
    class Own(vm.likelihoods.Likelihood):
        kind = "regression"

        def init(self, like):
            return {}

        def distribution(self, out, eta, y):
            return returned(out, eta)

    model = vm.TaskModel(vm.LinearPredictor(["x"]), Own())
    with pytest.raises(error, match=match):
        vm.fit(model, vm.datasets.lines(5, num_support=5), vm.Joint("normal"), 2)
