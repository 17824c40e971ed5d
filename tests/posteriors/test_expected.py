"""The mean of an observation under the posterior, and the tables of posteriors and predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.cases import known, linear_model, ragged_tasks, seeded
from varmeta.posteriors.prediction import Prediction

X = torch.tensor([[-1.0], [0.5], [2.0]], dtype=torch.float64)


def posterior_of(
    likelihood: Any, y: Any, outputs: int = 1, guide: str = "multivariate_normal"
) -> vm.Posterior:
    x = np.linspace(-1.0, 1.0, len(y))[:, None]
    tasks = vm.TaskSet(
        [vm.Task((x, np.asarray(y)), name="a"), vm.Task((x[:2], np.asarray(y)[:2]), name="b")]
    )
    model = vm.TaskModel(seeded(lambda: nn.Linear(1, outputs)), likelihood, vm.GaussianPrior(1.0))
    return known(model, tasks, vm.Joint(guide)).adapt(tasks)


def predictor(posterior: vm.Posterior, draws: int) -> Tensor:
    """The linear predictor at X by hand, `(draws, tasks, points, outputs)`."""
    theta = posterior.sample(draws)
    return torch.einsum("stij,pj->stpi", theta["weight"], X) + theta["bias"].unsqueeze(-2)


@pytest.mark.parametrize(
    ("likelihood", "y", "mean"),
    [
        (vm.likelihoods.Gaussian(0.5), [0.1, 0.4, 1.0], lambda out: out),
        (vm.likelihoods.StudentT(4.0), [0.1, 0.4, 1.0], lambda out: out),
        (vm.likelihoods.Bernoulli(), [0, 1, 1], torch.sigmoid),
        (vm.likelihoods.Poisson(), [0, 3, 2], torch.exp),
        (vm.likelihoods.Binomial(5), [0, 3, 5], lambda out: 5 * torch.sigmoid(out)),
        (vm.likelihoods.Binomial(), [[0, 3], [2, 4], [1, 1]], torch.sigmoid),  # of one trial
    ],
    ids=["Gaussian", "StudentT", "Bernoulli", "Poisson", "Binomial of 5", "Binomial of one trial"],
)
def test_expected_is_the_mean_given_the_weights(likelihood: Any, y: Any, mean: Any) -> None:
    posterior = posterior_of(likelihood, y)
    expected = posterior.expected(X, 40)
    torch.testing.assert_close(
        expected.samples, mean(predictor(posterior, 40)).squeeze(-1), rtol=1e-12, atol=1e-12
    )
    assert expected.mask.all() and expected.names == ("a", "b")
    # the observations scatter around it
    many = posterior.predict(X, 40_000)
    torch.testing.assert_close(many.mean, posterior.expected(X, 40_000).mean, rtol=0.05, atol=0.05)
    assert bool((posterior.expected(X, 4000).sd < many.sd).all())


def test_classes_have_probabilities() -> None:
    posterior = posterior_of(vm.likelihoods.Categorical(3), [0, 2, 1], outputs=3)
    expected = posterior.expected(X, 40)
    torch.testing.assert_close(
        expected.samples, predictor(posterior, 40).softmax(-1), rtol=1e-12, atol=1e-12
    )
    drawn = posterior.predict(X, 40)
    assert drawn.samples.shape == (40, 2, 3)
    for ask in (lambda: drawn.mean, lambda: drawn.sd, drawn.interval, drawn.frame):
        with pytest.raises(ValueError, match=r"expected\(x\) has the probability of each class"):
            ask()  # it was the mean of the classes' numbers
    frame = expected.frame()
    assert (
        list(frame.columns) == ["task", "point", "response", "mean", "sd", "low", "high"]
        and len(frame) == 2 * 3 * 3
    )
    assert frame.groupby(["task", "point"])["mean"].sum().to_numpy() == pytest.approx(np.ones(6))


def test_a_point_has_one_mean() -> None:
    expected = posterior_of(vm.likelihoods.Poisson(), [0, 3, 2], guide="delta").expected(X, 5)
    assert not expected.sd.any() and torch.equal(*expected.interval(0.5))
    assert not posterior_of(vm.likelihoods.Poisson(), [0, 3, 2]).expected(X, 1).sd.any()


def test_a_distribution_without_a_mean_says_so() -> None:
    def program(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
        return pyro.sample("y", dist.Cauchy(params["a"] * x, 1.0), obs=y)

    tasks = vm.TaskSet([vm.Task((np.ones(2), np.ones(2)))])
    posterior = known(
        vm.TaskModel.from_pyro(program, {"a": ()}), tasks, vm.Joint("delta")
    ).posterior()
    with pytest.raises(ValueError, match="a Cauchy observation has no mean here: use predict"):
        posterior.expected(np.ones(2))


# -- what x may be ---------------------------------------------------------------------------------


def named(x: list[str] | str) -> vm.Posterior:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(12, 3)), columns=["age", "dose", "y"]).assign(
        g=np.arange(12) % 3
    )
    tasks = vm.TaskSet.from_frame(frame, task="g", x=x, y="y")
    model = vm.TaskModel(
        nn.Linear(1 if isinstance(x, str) else len(x), 1), vm.likelihoods.Gaussian()
    )
    return known(model, tasks, vm.Joint()).posterior()


def test_tables_are_read_by_the_names_of_their_columns() -> None:
    grid = pd.DataFrame({"dose": [0.0, 1.0], "other": ["a", "b"], "age": [2.0, 3.0]})
    posterior = named(["age", "dose"])
    by_hand = posterior.expected(np.array([[2.0, 0.0], [3.0, 1.0]]), 10).samples
    assert torch.equal(posterior.expected(grid, 10).samples, by_hand)
    assert named("dose").expected(grid, 10).samples.shape == (10, 3, 2)
    with pytest.raises(
        ValueError, match=r"the table has no columns \['age'\] .*; its columns are \['dose'\]"
    ):
        posterior.predict(grid[["dose"]])
    tasks = ragged_tasks(2)
    with pytest.raises(
        TypeError, match="x is a table, but the training tasks do not know .*from_frame"
    ):
        known(linear_model(vm.GaussianPrior()), tasks, vm.Joint()).posterior().predict(grid)


def test_a_task_without_data_knows_the_columns_of_the_training_tasks() -> None:
    tasks = ragged_tasks(2)
    fit = known(linear_model(vm.GaussianPrior()), tasks, vm.Joint())
    unseen = fit.adapt(vm.TaskSet([vm.Task(name="new")]))
    with pytest.raises(
        ValueError,
        match=r"x of task 'new': a row has shape \(2,\), but \(1,\) in the training tasks",
    ):
        unseen.predict(np.zeros((3, 2)))
    with pytest.raises(
        ValueError,
        match=r"a row of these tasks' x has shape \(\), but \(1,\) in the training tasks",
    ):
        fit.adapt(vm.TaskSet([vm.Task(query=(np.zeros(2), np.zeros(2)))]))


@pytest.mark.parametrize("ask", ["predict", "expected"])
def test_a_set_of_tasks_gives_each_its_own_rows(ask: str) -> None:
    split = ragged_tasks(3)
    tasks = vm.TaskSet([vm.Task(task.support, name=task.name) for task in split])
    posterior = known(linear_model(vm.GaussianPrior()), tasks, vm.Joint()).posterior()
    read = getattr(posterior, ask)
    own = read([task.support[0] for task in tasks])
    # in any order, by name; a task that it does not have is predicted nowhere
    for some in (tasks, tasks[[2, 0, 1]]):
        assert torch.equal(read(some).mean, own.mean) and torch.equal(read(some).mask, own.mask)
    assert read(tasks[[1]]).mask.sum(1).tolist() == [0, len(tasks[1].support[0]), 0]
    # query rows where there are any
    assert torch.equal(read(split).mean, read([task.query[0] for task in split]).mean)
    stranger = vm.TaskSet([vm.Task((np.zeros((1, 1)), np.zeros(1)), name="new")])
    with pytest.raises(ValueError, match="x has the task 'new', which this posterior is not of"):
        read(stranger)


def test_a_table_is_not_scored() -> None:
    with pytest.raises(
        TypeError, match="query is a table: make tasks of it first, by TaskSet.from_frame"
    ):
        named(["age"]).score(pd.DataFrame({"age": [1.0], "y": [1.0]}))


# -- tables ----------------------------------------------------------------------------------------


def test_a_prediction_as_a_table() -> None:
    tasks = ragged_tasks(3)
    posterior = known(linear_model(vm.GaussianPrior()), tasks, vm.Joint("normal")).posterior()
    found = posterior.predict([X, X[:1], X[:2]], 200)
    prediction = Prediction(found.samples, found.mask, found.names)  # of draws alone
    frame = prediction.frame(0.5)
    assert list(frame.columns) == ["task", "point", "mean", "sd", "low", "high"]
    assert frame["task"].tolist() == ["sine 0"] * 3 + ["sine 1"] + ["sine 2"] * 2
    assert frame["point"].tolist() == [0, 1, 2, 0, 0, 1]
    for name in posterior.names:
        draws = prediction.task(name).numpy()
        rows = frame[frame["task"] == name]
        assert rows["mean"].to_numpy() == pytest.approx(draws.mean(0))
        assert rows["sd"].to_numpy() == pytest.approx(draws.std(0, ddof=1))
        assert rows["low"].to_numpy() == pytest.approx(np.quantile(draws, 0.25, axis=0))
        assert rows["high"].to_numpy() == pytest.approx(np.quantile(draws, 0.75, axis=0))
    with pytest.raises(ValueError, match="level must be a probability between 0 and 1.* not 95"):
        prediction.frame(95)


def test_a_posterior_as_a_table() -> None:
    posterior = named(["age", "dose"])
    frame, deviations = posterior.frame(), posterior.frame(deviations=True)
    assert list(frame["mean"].columns) == list(frame["sd"].columns) == ["age", "dose", "intercept"]
    assert list(frame.index) == ["0", "1", "2"] and frame.index.name == "task"
    weights = posterior.model.weights
    assert np.allclose(frame["mean"], weights.flatten(posterior.mean))
    assert np.allclose(frame["sd"], weights.flatten(posterior.sd)) and frame["sd"].equals(
        deviations["sd"]
    )
    theta0 = weights.flatten({name: posterior.q.eta[name] for name in weights.names})
    assert np.allclose(frame["mean"] - deviations["mean"], theta0)


def test_reprs_are_one_short_line() -> None:
    posterior = named(["age", "dose"])
    assert repr(posterior) == "<Posterior: 3 tasks, 3 weights each, normal guide>"
    assert (
        repr(posterior.predict(np.zeros((2, 2)), 10))
        == "<Prediction: known by formula for 3 tasks at 2 points>"
    )
    ragged = [np.zeros((n, 2)) for n in (1, 3, 2)]
    assert (
        repr(posterior.expected(ragged, 10))
        == "<Prediction: known by formula for 3 tasks at 1 to 3 points>"
    )
    classes = Prediction(torch.zeros(2, 1, 1, 3), torch.ones(1, 1, dtype=torch.bool), ("a",))
    assert repr(classes) == "<Prediction: 2 draws for 1 task at 1 point of shape (3,)>"
