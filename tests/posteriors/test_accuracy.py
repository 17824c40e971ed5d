"""Accuracy and calibration of classes: against numpy loops over tasks and rows, and scipy's t."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import varmeta as vm
from tests.cases import known, seeded
from varmeta.posteriors.accuracy import Accuracy

L = vm.likelihoods
MODELS = {
    "categorical": lambda: net(3, L.Categorical(3)),
    "least squares": lambda: net(3, L.LeastSquaresClasses(3, learn_temperature=False)),
    "binary": lambda: net(1, L.Bernoulli()),
    "ordinal": lambda: net(1, L.Ordinal(3)),
    "binary program": lambda: vm.TaskModel.from_pyro(program, {"a": (), "b": ()}),
}


def program(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    return pyro.sample("y", dist.Bernoulli(logits=params["a"] + params["b"] * x[..., 0]), obs=y)


def counts(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    return pyro.sample("y", dist.Poisson((params["a"] + 0 * x[..., 0]).exp()), obs=y)


def net(outputs: int, likelihood: Any) -> vm.TaskModel:
    return vm.TaskModel(seeded(lambda: nn.Linear(2, outputs)), likelihood, vm.GaussianPrior(0.5))


def ragged(num_tasks: int = 7, classes: int = 2, kind: Any = int) -> vm.TaskSet:
    """Clouds of 4 rows each, and 3 to 6 query rows."""
    rng = np.random.default_rng(0)

    def part(centres: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        y = rng.integers(classes, size=n)
        return centres[y] + rng.normal(size=(n, 2)), y.astype(kind)

    centres = [2.0 * rng.normal(size=(classes, 2)) for _ in range(num_tasks)]
    return vm.TaskSet(
        [
            vm.Task(support=part(one, 4), query=part(one, 3 + i % 4), name=f"cloud {i}")
            for i, one in enumerate(centres)
        ]
    )


def posterior_of(name: str, guide: str, tasks: vm.TaskSet) -> vm.Posterior:
    return known(MODELS[name](), tasks, vm.Implicit(guide)).adapt(tasks)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("guide", ["delta", "normal"])
def test_accuracy_by_a_loop(name: str, guide: str) -> None:
    classes = 3 if name in ("categorical", "least squares") else 2
    tasks = ragged(classes=classes, kind=float if "program" in name else int)
    posterior = posterior_of(name, guide, tasks)
    found = posterior.accuracy(num_samples=40, seed=3)
    xs = [task.query[0] for task in tasks if task.query is not None]
    expected = posterior.expected(xs, num_samples=40, seed=3)
    shares, confident, right = [], [], []
    for index, task in enumerate(tasks):
        assert task.query is not None
        wins = []
        for row, y in enumerate(task.query[1].tolist()):
            probs = expected.samples[:, index, row].mean(0)
            # of two classes the probability of 1 alone is there
            probs = torch.stack([1 - probs, probs]) if probs.dim() == 0 else probs
            wins.append(float(int(probs.argmax()) == int(y)))
            confident.append(float(probs.max()))
        shares.append(np.mean(wins))
        right += wins
    assert found.by_task.to_dict() == pytest.approx(
        dict(zip(tasks.names, shares, strict=True)), abs=1e-12
    )
    mean, error = np.mean(shares), stats.sem(shares)
    low, high = stats.t.interval(0.95, len(shares) - 1, mean, error)
    assert (found.value, found.low, found.high) == pytest.approx(
        (mean, max(low, 0.0), min(high, 1.0)), abs=1e-12
    )
    assert found.confidence.tolist() == pytest.approx(confident, abs=1e-10)
    assert found.correct.tolist() == right
    table = posterior.score(num_samples=40, seed=3)
    assert table.loc["all", "error_rate"] == pytest.approx(1 - np.mean(right), abs=1e-12)
    assert (1 - table["error_rate"][:-1]).to_dict() == pytest.approx(found.by_task.to_dict())


def test_the_sentence_and_its_interval() -> None:
    posterior = posterior_of("binary", "delta", ragged(40))
    found = posterior.accuracy()
    low, high = 100 * found.low, 100 * found.high
    assert str(found) == f"{100 * float(found):.1f} % ({low:.1f} to {high:.1f} over 40 tasks)"
    assert repr(found) == f"<Accuracy: {found}>"
    narrow = posterior.accuracy(level=0.5)
    assert found.low < narrow.low < narrow.high < found.high and narrow.value == found.value


def test_ends_lie_within_0_and_1_and_one_task_has_none() -> None:
    tasks = ragged(3)
    posterior = posterior_of("binary", "delta", tasks)
    query = [task.query for task in tasks]
    found = posterior.accuracy([query[0], query[1], None])
    assert list(found.by_task.index) == ["cloud 0", "cloud 1"]
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0
    alone = posterior.accuracy([query[0], None, None])
    assert np.isnan(alone.low) and np.isnan(alone.high)
    assert str(alone) == f"{100 * alone.value:.1f} % (of 1 task)"


def test_a_task_without_probabilities_is_not_left_out() -> None:
    """A network may overflow in one task: what is not known of it is not known of the mean."""
    by_task = pd.Series([1.0, np.nan, 0.5], ["a", "b", "c"])
    found = Accuracy(by_task, 0.95, torch.ones(3), torch.ones(3))
    assert np.isnan([found.value, found.low, found.high]).all()
    assert str(found) == "nan % (of 3 tasks)"


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_the_reliability_table_by_a_loop(bins: int) -> None:
    posterior = posterior_of("categorical", "normal", ragged(30, 3))
    found = posterior.accuracy(num_samples=30)
    table = found.calibration(bins)
    rows = []
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        inside = [
            (p, c)
            for p, c in zip(found.confidence.tolist(), found.correct.tolist(), strict=True)
            if low < p <= high
        ]
        if inside:
            p, c = np.mean(inside, axis=0)
            rows.append((low, high, len(inside), p, c))
    assert list(table.columns) == ["low", "high", "n", "confidence", "accuracy"]
    assert table.to_numpy(float) == pytest.approx(np.array(rows), abs=1e-12)
    if bins == 15:
        gap = (table["n"] * (table["accuracy"] - table["confidence"]).abs()).sum() / table[
            "n"
        ].sum()
        score = posterior.score(num_samples=30)
        assert score.loc["all", "calibration_error"] == pytest.approx(gap, abs=1e-10)


@pytest.mark.parametrize(
    ("model", "y"),
    [
        (lambda: net(1, L.Gaussian()), torch.randn(4, dtype=torch.float64)),
        (lambda: net(1, L.Poisson()), torch.tensor([0, 1, 2, 1])),
        (lambda: net(1, L.Binomial(3)), torch.tensor([0, 1, 2, 1])),
        (lambda: vm.TaskModel.from_pyro(counts, {"a": ()}), torch.arange(4.0, dtype=torch.float64)),
    ],
)
def test_what_is_no_class_has_no_accuracy(model: Any, y: Tensor) -> None:
    x = torch.randn(4, 2, dtype=torch.float64)
    tasks = vm.TaskSet([vm.Task(support=(x, y), query=(x, y))])
    posterior = known(model(), tasks, vm.Implicit("delta")).adapt(tasks)
    with pytest.raises(
        ValueError, match=r"accuracy is of classes, and what .* are none: use score"
    ):
        posterior.accuracy()


def test_accuracy_refuses_before_any_work() -> None:
    posterior = posterior_of("binary", "delta", ragged(2))
    with pytest.raises(ValueError, match="level must be a probability between 0 and 1.* not 95"):
        posterior.accuracy(level=95)
    with pytest.raises(ValueError, match="nothing to score"):
        posterior.accuracy([None, None])
    with pytest.raises(ValueError, match="num_bins must be a whole number of at least 1, not 0"):
        posterior.accuracy().calibration(0)


class Made(TorchDispatchMode):
    """How many numbers operations within it put out in all."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numbers += out.numel() if isinstance(out, Tensor) else 0
        return out


@pytest.mark.parametrize("name", ["binary", "gaussian"])
def test_the_work_of_a_score_grows_as_the_number_of_tasks(name: str) -> None:
    """A row of the table once looked at every task's mask: 16 times the work for 4 times the
    tasks.
    """

    def work(number: int) -> int:
        tasks = ragged(number)
        if name == "binary":
            posterior = posterior_of(name, "delta", tasks)
        else:
            posterior = known(net(1, L.Gaussian()), tasks, vm.Implicit("delta")).adapt(tasks)
        with Made() as made:
            posterior.score(num_samples=2)
        return made.numbers

    assert work(400) < 4.5 * work(100)
