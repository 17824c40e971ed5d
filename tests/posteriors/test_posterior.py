"""Adaptation and prediction where the exact answers are formulas: conjugate Gaussian tasks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta
from scipy import stats
from torch import Tensor, nn

import varmeta as vm
from tests.cases import known, linear_model, net_model, ragged_tasks, seeded
from varmeta.models.model import TaskModel

NOISE, SDS, LOC = 0.5, (0.8, 1.5), (0.3, -1.0)  # noise; prior sds and means of (intercept, slope)


def line_model(learn: bool = False) -> vm.TaskModel:
    """y = bias + weight x + noise under the true prior, or one that has to be learned."""
    likelihood = vm.likelihoods.Gaussian(scale=NOISE, learn_scale=learn)
    if learn:
        return vm.TaskModel(
            seeded(lambda: nn.Linear(1, 1)), likelihood, vm.GaussianPrior(1.0, "per_parameter")
        )
    precision = {"bias": SDS[0] ** -2, "weight": SDS[1] ** -2}
    prior = vm.GaussianPrior(precision, loc={"bias": LOC[0], "weight": LOC[1]})
    return vm.TaskModel(seeded(lambda: nn.Linear(1, 1)), likelihood, prior)


def line_tasks(num_tasks: int, points: int, query: int, seed: int) -> tuple[vm.TaskSet, Tensor]:
    """Tasks drawn from the prior, and their true (intercept, slope), `(tasks, 2)`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    theta = torch.tensor(LOC) + torch.tensor(SDS) * normal(num_tasks, 2)
    x = normal(num_tasks, points + query)
    y = theta[:, :1] + theta[:, 1:] * x + NOISE * normal(num_tasks, points + query)
    parts = [(x[i].unsqueeze(-1), y[i]) for i in range(num_tasks)]
    tasks = [
        vm.Task(
            support=(a[:points], b[:points]),
            query=(a[points:], b[points:]),
            name=f"line {seed}.{i}",
        )
        for i, (a, b) in enumerate(parts)
    ]
    return vm.TaskSet(tasks), theta


def exact_posterior(task: vm.Task) -> tuple[Tensor, Tensor]:
    """Mean and covariance of (intercept, slope)."""
    precision = torch.diag(torch.tensor(SDS, dtype=torch.float64) ** -2)
    mean = precision @ torch.tensor(LOC, dtype=torch.float64)
    if task.support is not None:
        design = torch.cat([torch.ones_like(task.support[0]), task.support[0]], -1)
        precision = precision + design.T @ design / NOISE**2
        mean = mean + design.T @ task.support[1] / NOISE**2
    covariance = torch.linalg.inv(precision)
    return covariance @ mean, covariance


def exact_predictive(task: vm.Task, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sd of y at the rows of x."""
    mean, covariance = exact_posterior(task)
    design = torch.cat([torch.ones_like(x), x], -1)
    return design @ mean, ((design @ covariance) * design).sum(-1).add(NOISE**2).sqrt()


def test_intervals_of_a_thousand_tasks_cover() -> None:
    """With the prior learned from other tasks, 90 % intervals for weights and for new observations
    hold what they say.
    """
    train, _ = line_tasks(300, 4, 0, seed=0)
    tasks, theta = line_tasks(1000, 3, 1, seed=1)
    fit = vm.fit(line_model(learn=True), train, vm.Joint("multivariate_normal"))
    assert fit.converged
    posterior = fit.adapt(tasks)
    draws = posterior.sample(1000)
    for column, name in enumerate(("bias", "weight")):
        low, high = torch.quantile(
            draws[name].reshape(1000, 1000), torch.tensor([0.05, 0.95], dtype=torch.float64), dim=0
        )
        covered = (low <= theta[:, column]) & (theta[:, column] <= high)
        assert 0.87 <= float(covered.double().mean()) <= 0.93  # 3 standard errors of 1,000 tasks
    table = posterior.score(num_samples=1000)
    assert len(table) == 1001 and table.loc["all", "n"] == 1000
    assert 0.87 <= table.loc["all", "coverage"] <= 0.93
    assert table.loc["all", "calibration_error"] <= 0.03
    low, high = posterior.predict(
        [task.query[0] for task in tasks if task.query is not None]
    ).interval(0.9)
    y = torch.stack([task.query[1] for task in tasks if task.query is not None])
    assert 0.87 <= float(((low <= y) & (y <= high)).double().mean()) <= 0.93


def test_the_dense_guide_is_the_exact_posterior() -> None:
    tasks, _ = line_tasks(5, 3, 2, seed=2)
    posterior = known(line_model(), tasks, vm.Joint("multivariate_normal")).adapt(tasks)
    for index, task in enumerate(tasks):
        mean, covariance = exact_posterior(task)
        got = torch.stack([posterior.mean["bias"][index, 0], posterior.mean["weight"][index, 0, 0]])
        sd = torch.stack([posterior.sd["bias"][index, 0], posterior.sd["weight"][index, 0, 0]])
        torch.testing.assert_close(got, mean, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(sd, covariance.diagonal().sqrt(), rtol=1e-6, atol=0)


def test_score_is_the_exact_predictive_density() -> None:
    tasks, _ = line_tasks(6, 3, 4, seed=3)
    posterior = known(line_model(), tasks, vm.Joint("multivariate_normal")).adapt(tasks)
    table = posterior.score(num_samples=20_000)
    total, squares = [], []
    for task in tasks:
        assert task.query is not None
        mean, sd = exact_predictive(task, task.query[0])
        exact = torch.distributions.Normal(mean, sd).log_prob(task.query[1])
        # Monte Carlo error of 20,000 draws: about 0.01 an observation even in the tail
        assert table.loc[task.name, "log_density"] == pytest.approx(float(exact.mean()), abs=0.02)
        error = float((mean - task.query[1]).square().mean())
        assert table.loc[task.name, "rmse"] == pytest.approx(math.sqrt(error), abs=0.02)
        z = (task.query[1] - mean) / sd
        unit = torch.distributions.Normal(0.0, 1.0)
        crps = sd * (
            z * (2 * unit.cdf(z) - 1) + 2 * unit.log_prob(z).exp() - 1 / math.sqrt(math.pi)
        )
        assert table.loc[task.name, "crps"] == pytest.approx(float(crps.mean()), abs=0.02)
        total.append(exact)
        squares.append(error)
    assert table.loc["all", "log_density"] == pytest.approx(
        float(torch.cat(total).mean()), abs=0.02
    )
    assert table.loc["all", "rmse"] == pytest.approx(math.sqrt(sum(squares) / 6), abs=0.02)


# -- no data yet -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    [
        vm.Joint("normal"),
        vm.Joint("multivariate_normal"),
        vm.Implicit("normal"),
        vm.Unrolled("normal", inner_steps=3),
    ],
    ids=lambda strategy: strategy.describe(),
)
def test_without_data_the_posterior_is_the_prior(strategy: vm.Joint) -> None:
    tasks, _ = line_tasks(4, 3, 2, seed=4)
    posterior = known(line_model(), tasks, strategy).adapt(vm.TaskSet([vm.Task(), vm.Task()]))
    assert posterior.mean["bias"].flatten().tolist() == pytest.approx([LOC[0]] * 2, abs=1e-7)
    assert posterior.mean["weight"].flatten().tolist() == pytest.approx([LOC[1]] * 2, abs=1e-7)
    assert posterior.sd["bias"].flatten().tolist() == pytest.approx([SDS[0]] * 2, rel=1e-7)
    assert posterior.sd["weight"].flatten().tolist() == pytest.approx([SDS[1]] * 2, rel=1e-7)
    x = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    samples = posterior.predict(x, num_samples=4000).samples
    mean, sd = exact_predictive(vm.Task(), x)
    for point in range(2):
        for index in range(2):
            exact = stats.norm(float(mean[point]), float(sd[point]))
            assert stats.kstest(samples[:, index, point].numpy(), exact.cdf).pvalue > 1e-3


def test_without_data_the_predictive_is_the_prior_predictive_of_counts() -> None:
    tasks = count_tasks()
    model = vm.TaskModel(
        seeded(lambda: nn.Linear(1, 1)), vm.likelihoods.Poisson(), vm.GaussianPrior(2.0)
    )
    fit = known(model, tasks, vm.Joint("normal"))
    samples = (
        fit.adapt(vm.TaskSet([vm.Task(name="new")])).predict([[0.7]], 4000).samples[:, 0, 0].numpy()
    )
    rng = np.random.default_rng(0)
    loc = fit.model.weights.flatten(fit.prior.loc).numpy()
    theta = loc + rng.normal(size=(4000, 2)) / math.sqrt(2.0)
    by_hand = rng.poisson(np.exp(theta[:, 0] * 0.7 + theta[:, 1]))
    assert stats.ks_2samp(samples, by_hand).pvalue > 1e-3


def test_some_tasks_with_data_and_some_without() -> None:
    tasks, _ = line_tasks(3, 3, 2, seed=5)
    mixed = vm.TaskSet([tasks[0], vm.Task(name="new"), tasks[1]])
    posterior = known(line_model(), tasks, vm.Joint("multivariate_normal")).adapt(mixed)
    assert float(posterior.mean["bias"][1]) == pytest.approx(LOC[0], abs=1e-7)
    assert float(posterior.sd["weight"][1]) == pytest.approx(SDS[1], rel=1e-7)
    assert list(posterior.score().index) == ["line 5.0", "line 5.1", "all"]


# -- sample ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", ["delta", "normal", "multivariate_normal"])
def test_sample_by_name(guide: str) -> None:
    tasks = ragged_tasks(3)
    posterior = known(net_model(vm.GaussianPrior(3.0)), tasks, vm.Implicit(guide)).adapt(tasks)
    draws = posterior.sample(7)
    shapes = {"0.weight": (3, 1), "0.bias": (3,), "2.weight": (1, 3), "2.bias": (1,)}
    assert {name: tuple(value.shape) for name, value in draws.items()} == {
        n: (7, 3, *s) for n, s in shapes.items()
    }
    torch.testing.assert_close(
        posterior.model.weights.flatten(draws), posterior.draws(7), rtol=0, atol=0
    )
    for name, value in posterior.sample(7).items():
        assert torch.equal(value, draws[name])
    same = all(
        torch.equal(value, draws[name]) for name, value in posterior.sample(7, seed=1).items()
    )
    assert same == (guide == "delta")
    if guide == "delta":
        assert all(not value.any() for value in posterior.sd.values())
        assert all(torch.equal(value[3], posterior.mean[name]) for name, value in draws.items())


@pytest.mark.parametrize("guide", ["normal", "multivariate_normal"])
def test_sample_has_the_posteriors_moments(guide: str) -> None:
    tasks = ragged_tasks(2)
    posterior = known(linear_model(vm.GaussianPrior(3.0)), tasks, vm.Joint(guide)).adapt(tasks)
    draws = posterior.draws(20_000)
    q = posterior.distribution
    covariance = torch.stack([torch.cov(draws[:, i].T) for i in range(2)])
    exact = (
        torch.diag_embed(q.variance.squeeze(1))
        if guide == "normal"
        else q.covariance_matrix.squeeze(1)
    )
    torch.testing.assert_close(draws.mean(0), q.mean.squeeze(1), rtol=0, atol=0.02)
    torch.testing.assert_close(covariance, exact, rtol=0.05, atol=0.005)


def test_draws_of_a_task_do_not_depend_on_the_other_tasks() -> None:
    tasks = ragged_tasks(5)
    fit = known(linear_model(vm.GaussianPrior(3.0)), tasks, vm.Joint("multivariate_normal"))
    whole, part = fit.adapt(tasks).draws(50), fit.adapt(tasks[[3, 1]]).draws(50)
    # the posterior itself is found by an iteration, whose sums differ in the last bits with the
    # padding
    torch.testing.assert_close(part, whole[:, [3, 1]], rtol=0, atol=1e-8)
    few = fit.adapt(tasks).draws(20)
    torch.testing.assert_close(few, whole[:20], rtol=0, atol=0)


@pytest.mark.parametrize("number", [0, -1, 2.5])
def test_the_number_of_draws_is_checked(number: Any) -> None:
    tasks = ragged_tasks(2)
    posterior = known(linear_model(vm.GaussianPrior()), tasks, vm.Joint()).posterior()
    with pytest.raises(ValueError, match="num_samples must be a whole number of at least 1"):
        posterior.sample(number)


def test_numbers_of_numpy_are_numbers() -> None:
    tasks = ragged_tasks(2)
    posterior = known(linear_model(vm.GaussianPrior()), tasks, vm.Joint()).posterior()
    assert torch.equal(posterior.draws(np.int64(5)), posterior.draws(5))  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match="num_samples must be a whole number of at least 1, not 'five'"
    ):
        posterior.sample("five")  # type: ignore[arg-type]


# -- predict ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lines() -> vm.Posterior:
    tasks, _ = line_tasks(3, 3, 2, seed=6)
    return known(line_model(), tasks, vm.Joint("multivariate_normal")).adapt(tasks)


def test_predict_at_common_points(lines: vm.Posterior) -> None:
    x = torch.linspace(-2, 2, 5, dtype=torch.float64).unsqueeze(-1)
    prediction = lines.predict(x, num_samples=20_000)
    assert prediction.samples.shape == (20_000, 3, 5) and bool(prediction.mask.all())
    for index, task in enumerate(lines.tasks):
        mean, sd = exact_predictive(task, x)
        torch.testing.assert_close(prediction.mean[index], mean, rtol=0, atol=0.04)
        torch.testing.assert_close(prediction.sd[index], sd, rtol=0.04, atol=0)
        low, high = prediction.interval(0.8)
        torch.testing.assert_close(high[index] - low[index], 2 * 1.2816 * sd, rtol=0.04, atol=0)
    assert torch.equal(lines.predict(x.numpy(), 10).samples, lines.predict(x, 10).samples)
    assert not torch.equal(lines.predict(x, 10, seed=1).samples, lines.predict(x, 10).samples)


def test_predict_at_points_of_each_task(lines: vm.Posterior) -> None:
    parts = [torch.full((n, 1), float(n), dtype=torch.float64) for n in (1, 3, 2)]
    prediction = lines.predict(parts, num_samples=5000)
    assert prediction.mask.tolist() == [
        [True, False, False],
        [True, True, True],
        [True, True, False],
    ]
    for index, (name, part) in enumerate(zip(lines.names, parts, strict=True)):
        draws = prediction.task(name)
        assert draws.shape == (5000, len(part))
        torch.testing.assert_close(
            draws.mean(0), exact_predictive(lines.tasks[index], part)[0], rtol=0, atol=0.1
        )
    with pytest.raises(KeyError, match="no task is called 'line'"):
        prediction.task("line")


def test_predictions_of_many_numbers_come_in_slices(
    lines: vm.Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.zeros(2, 1, dtype=torch.float64)
    whole = lines.score(num_samples=100, query=[(x, x[:, 0])] * 3)
    monkeypatch.setattr("varmeta.posteriors.slices.CHUNK", 1000)
    parts = lines.score(num_samples=100, query=[(x, x[:, 0])] * 3)
    assert lines.predict(x, 100).samples.shape == (100, 3, 2)
    assert parts["log_density"].to_numpy() == pytest.approx(
        whole["log_density"].to_numpy(), abs=1e-12
    )


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([np.zeros((2, 1))] * 2, "x lists 2 arrays, but there are 3 tasks"),
        (np.zeros(4), r"a row has shape \(\), but \(1,\)"),
        (np.zeros((4, 2)), r"a row has shape \(2,\), but \(1,\)"),
        (
            [np.zeros((2, 1)), np.zeros((2, 1)), np.zeros(2)],
            "x of task 'line 6.2': a row has shape",
        ),
        (np.array([[0.0], [np.nan]]), r"row 1 \(counted from 0\), is nan"),
        (1.5, "is a single number"),
    ],
)
def test_predict_refuses(lines: vm.Posterior, x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lines.predict(x)


def test_nested_lists_of_numbers_are_rows(lines: vm.Posterior) -> None:
    """As in numpy; only a list of arrays is one per task.  Three rows for three tasks are where the
    two could be mixed up.
    """
    rows = [[0.0], [5.0], [10.0]]
    assert torch.equal(lines.predict(rows, 10).samples, lines.predict(np.array(rows), 10).samples)
    assert lines.predict([np.array(rows), np.array(rows[:1]), rows[:2]], 10).mask.sum(
        -1
    ).tolist() == [3, 1, 2]


def test_predict_refuses_words(lines: vm.Posterior) -> None:
    with pytest.raises(TypeError, match="expected real numbers"):
        lines.predict(np.array([["a"], ["b"]]))


def test_the_level_is_a_probability(lines: vm.Posterior) -> None:
    with pytest.raises(ValueError, match="level must be a probability between 0 and 1.* not 90"):
        lines.predict(np.zeros((1, 1))).interval(90)


# -- score: which columns, which rows --------------------------------------------------------------

NUMBERS = ["n", "log_density", "rmse", "coverage", "calibration_error", "crps"]
CLASSES = ["n", "log_density", "error_rate", "calibration_error"]


def tasks_with(y: Any) -> vm.TaskSet:
    """Three tasks of 4 and 3 points whose y is made by `y(generator, x)`."""
    rng = np.random.default_rng(0)
    xs = [(rng.normal(size=(4, 1)), rng.normal(size=(3, 1))) for _ in range(3)]
    return vm.TaskSet(
        [
            vm.Task(support=(a, y(rng, a[:, 0])), query=(b, y(rng, b[:, 0])), name=f"t{i}")
            for i, (a, b) in enumerate(xs)
        ]
    )


def count_tasks() -> vm.TaskSet:
    return tasks_with(lambda rng, x: rng.poisson(np.exp(0.3 * x)))


def binomial(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    trials = rng.integers(1, 9, size=len(x))
    return np.stack([rng.binomial(trials, 0.4), trials], -1)


def bernoulli_program(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    return pyro.sample("y", dist.Bernoulli(logits=params["a"] + params["b"] * x[..., 0]), obs=y)


def net(outputs: int, likelihood: Any) -> vm.TaskModel:
    return vm.TaskModel(seeded(lambda: nn.Linear(1, outputs)), likelihood, vm.GaussianPrior(2.0))


KINDS: dict[str, tuple[Any, Any, list[str]]] = {
    "gaussian": (
        lambda: net(1, vm.likelihoods.Gaussian()),
        lambda rng, x: x + rng.normal(size=len(x)),
        NUMBERS,
    ),
    "several responses": (
        lambda: net(2, vm.likelihoods.Gaussian()),
        lambda rng, x: rng.normal(size=(len(x), 2)),
        NUMBERS,
    ),
    "student": (
        lambda: net(1, vm.likelihoods.StudentT()),
        lambda rng, x: x + rng.normal(size=len(x)),
        NUMBERS,
    ),
    "counts": (
        lambda: net(1, vm.likelihoods.Poisson()),
        lambda rng, x: rng.poisson(1.5, size=len(x)),
        NUMBERS,
    ),
    "binomial": (lambda: net(1, vm.likelihoods.Binomial()), binomial, NUMBERS),
    "binomial of 5": (
        lambda: net(1, vm.likelihoods.Binomial(5)),
        lambda rng, x: rng.binomial(5, 0.4, len(x)),
        NUMBERS,
    ),
    "binary": (
        lambda: net(1, vm.likelihoods.Bernoulli()),
        lambda rng, x: rng.integers(2, size=len(x)),
        CLASSES,
    ),
    "classes": (
        lambda: net(3, vm.likelihoods.Categorical(3)),
        lambda rng, x: rng.integers(3, size=len(x)),
        CLASSES,
    ),
    "binary program": (
        lambda: TaskModel.from_pyro(bernoulli_program, {"a": (), "b": ()}),
        lambda rng, x: rng.integers(2, size=len(x)).astype(float),
        CLASSES,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guide", ["delta", "normal"])
def test_columns_of_the_score(kind: str, guide: str) -> None:
    make_model, y, columns = KINDS[kind]
    tasks = tasks_with(y)
    posterior = known(make_model(), tasks, vm.Implicit(guide)).adapt(tasks)
    table = posterior.score(num_samples=50)
    assert list(table.columns) == columns
    assert list(table.index) == ["t0", "t1", "t2", "all"] and table.index.name == "task"
    assert table["n"].tolist() == [3, 3, 3, 9]
    assert np.isfinite(table.to_numpy(dtype=float)).all()
    assert table.loc["all", "log_density"] == pytest.approx(
        table["log_density"][:3].mean(), abs=1e-12
    )
    # the mean density over draws of the weights, taken by hand
    # a linear Gaussian model needs no draws, so that only many of them agree
    exact = kind in ("gaussian", "several responses") and guide == "normal"
    draws, close = (20_000, 0.02) if exact else (50, 1e-10)
    log_prob, mask = posterior.log_prob(num_samples=draws)
    assert log_prob.shape == (draws, 3, 3) and bool(mask.all())
    by_hand = log_prob.exp().mean(0).log().mean(1)
    assert table["log_density"].to_numpy()[:3] == pytest.approx(by_hand.numpy(), abs=close)


def test_probabilities_of_binomial_trials_count() -> None:
    """With a point, the log density of k of n successes is that of scipy."""
    tasks = tasks_with(binomial)
    posterior = known(net(1, vm.likelihoods.Binomial()), tasks, vm.Implicit("delta")).adapt(tasks)
    table = posterior.score(num_samples=2)
    for index, task in enumerate(tasks):
        assert task.query is not None
        x, y = (part.numpy() for part in task.query)
        weight, bias = (
            posterior.mean["weight"][index, 0, 0].item(),
            posterior.mean["bias"][index, 0].item(),
        )
        exact = stats.binom.logpmf(y[:, 0], y[:, 1], 1 / (1 + np.exp(-weight * x[:, 0] - bias)))
        assert table.loc[task.name, "log_density"] == pytest.approx(exact.mean(), abs=1e-10)


def test_padding_is_not_scored() -> None:
    """A task is scored alike alone and beside a larger one."""
    tasks = ragged_tasks(4)
    fit = known(linear_model(vm.GaussianPrior(3.0)), tasks, vm.Joint("multivariate_normal"))
    together = fit.adapt(tasks).score(num_samples=200)
    for index, name in enumerate(tasks.names):
        alone = fit.adapt(tasks[[index]]).score(num_samples=200)
        assert alone.loc[name, "n"] == together.loc[name, "n"]
        assert alone.loc[name, "log_density"] == pytest.approx(
            together.loc[name, "log_density"], abs=1e-7
        )
    log_prob, mask = fit.adapt(tasks).log_prob(num_samples=3)
    assert not mask.all() and not log_prob[:, ~mask].any()


def test_what_is_scored() -> None:
    tasks = ragged_tasks(3)
    posterior = known(linear_model(vm.GaussianPrior(3.0)), tasks, vm.Joint()).adapt(tasks)
    own = posterior.score(num_samples=20)
    pairs = [task.query for task in tasks]
    assert posterior.score(tasks, 20).equals(own)
    assert posterior.score(pairs, 20).equals(own)
    assert posterior.score([vm.Task(support=pair) for pair in pairs], 20).equals(own)
    assert posterior.score(
        vm.TaskSet([vm.Task(query=t.query, name=t.name) for t in tasks]), 20
    ).equals(own)


def test_a_task_without_query_data_is_not_scored_on_its_support() -> None:
    tasks = ragged_tasks(3)
    some = vm.TaskSet([vm.Task(support=tasks[0].support, name=tasks[0].name), tasks[1], tasks[2]])
    posterior = known(linear_model(vm.GaussianPrior(3.0)), tasks, vm.Joint()).adapt(some)
    assert list(posterior.score(num_samples=5).index) == ["sine 1", "sine 2", "all"]
    assert list(posterior.score(some, num_samples=5).index) == ["sine 1", "sine 2", "all"]


def test_a_task_called_all_keeps_its_row() -> None:
    tasks = ragged_tasks(2)
    named = vm.TaskSet([vm.Task(tasks[0].support, tasks[0].query, "all"), tasks[1]])
    table = (
        known(linear_model(vm.GaussianPrior(3.0)), named, vm.Joint())
        .adapt(named)
        .score(num_samples=5)
    )
    assert list(table.index) == ["all", "sine 1", "all"] and table["n"].tolist() == [2, 3, 5]


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        (lambda tasks: tasks[:2], ValueError, "query has 2 tasks, but the posterior has 3"),
        (
            lambda tasks: tasks[[1, 0, 2]],
            ValueError,
            "lists task 'sine 1' where the posterior has 'sine 0'",
        ),
        (lambda tasks: [tasks[1], tasks[0], tasks[2]], ValueError, "lists task 'sine 1' where"),
        (
            lambda tasks: [(np.zeros((2, 1)), np.zeros(3))] * 3,
            ValueError,
            "task 'sine 0': support x has 2 rows but y has 3",
        ),
        (lambda tasks: [(np.zeros((2, 1)), [0.0, np.nan])] * 3, ValueError, "task 'sine 0'.*row 1"),
        (
            lambda tasks: [(np.zeros(2), np.zeros(2))] * 3,
            ValueError,
            "query x of task 'sine 0': a row has shape",
        ),
        (lambda tasks: [None] * 3, ValueError, "nothing to score"),
        (lambda tasks: 3, TypeError, "query must be a TaskSet or a list"),
    ],
)
def test_score_refuses(query: Any, error: type[Exception], message: str) -> None:
    tasks = ragged_tasks(3)
    posterior = known(linear_model(vm.GaussianPrior(3.0)), tasks, vm.Joint()).posterior()
    with pytest.raises(error, match=message):
        posterior.score(query(tasks))


def test_score_without_query_data_says_so() -> None:
    tasks = vm.TaskSet([vm.Task(task.support, name=task.name) for task in ragged_tasks(2)])
    posterior = known(linear_model(vm.GaussianPrior(3.0)), tasks, vm.Joint()).posterior()
    with pytest.raises(ValueError, match="no query data: pass score"):
        posterior.score()


def test_score_refuses_observations_outside_the_support() -> None:
    """Pyro's checks are off while scoring, so they are made before."""
    tasks = tasks_with(lambda rng, x: rng.integers(2, size=len(x)))
    posterior = known(net(1, vm.likelihoods.Bernoulli()), tasks, vm.Implicit("normal")).adapt(tasks)
    with pytest.raises(ValueError, match="task 't0', row 1: y = 2"):
        posterior.score([(np.zeros((2, 1)), [0, 2])] * 3)


# -- adapt -----------------------------------------------------------------------------------------


def test_adapt_refuses_other_columns_and_other_things() -> None:
    tasks = ragged_tasks(2)
    fit = known(linear_model(vm.GaussianPrior(3.0)), tasks, vm.Joint())
    with pytest.raises(ValueError, match=r"x has shape \(\), but \(1,\) in the training tasks"):
        fit.adapt(vm.TaskSet([vm.Task(support=([0.0, 1.0], [0.0, 1.0]))]))
    with pytest.raises(TypeError, match="adapt takes a TaskSet, not a list"):
        fit.adapt([vm.Task()])  # type: ignore[arg-type]


def test_adapt_follows_the_dtype_of_the_fit() -> None:
    tasks = ragged_tasks(2)
    fit = known(linear_model(vm.GaussianPrior(3.0)), tasks, vm.Joint())
    assert fit.adapt(tasks.to(dtype=torch.float32)).mean["weight"].dtype == torch.float64


def test_adaptation_that_breaks_off_says_so() -> None:
    def program(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
        return pyro.sample("y", dist.Normal(params["w"].exp().exp() * x, 1.0), obs=y)

    model = TaskModel.from_pyro(program, {"w": torch.zeros((), dtype=torch.float64)})
    tasks = vm.TaskSet([vm.Task(support=(np.ones(2), np.ones(2)), name="calm")])
    wild = vm.TaskSet([*tasks, vm.Task(support=(np.full(2, 1e200), np.ones(2)), name="wild")])
    fit = known(model, tasks, vm.Joint("delta"))
    with pytest.warns(
        RuntimeWarning,
        match="did not end well for 1 of 2 tasks, 'wild' first: a loss or gradient is not finite "
        "on the way.*not its posterior",
    ):
        fit.adapt(wild)


def test_a_guide_of_the_users_own_that_is_a_point() -> None:
    """AutoDelta is a delta guide whatever its class: no spread, no bound."""
    tasks = ragged_tasks(2)
    model = linear_model(vm.GaussianPrior(3.0))
    own, built_in = (
        vm.fit(model, tasks, vm.Joint(guide), optimizer=None) for guide in (AutoDelta, "delta")
    )
    assert own.loss == pytest.approx(built_in.loss, rel=1e-9)
    assert own.loss_name == built_in.loss_name == "penalised loss (MAP; no bound)"
    posterior = own.posterior()
    assert posterior.is_point and not any(value.any() for value in posterior.sd.values())
    torch.testing.assert_close(posterior.mean, built_in.posterior().mean, rtol=1e-6, atol=1e-6)
