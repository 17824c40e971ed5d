"""Alg as a distribution: the estimators against exact smoothed objectives, computed by quadrature
and by enumeration.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyro
import pytest
import torch

import varmeta as vm
from experiments.stochastic import (
    LAMBDA,
    LR,
    STEPS,
    TEMPERATURE,
    central,
    estimate,
    kinds,
    one_function,
)
from tests.cases import adam, linear_model, ragged_tasks
from varmeta.results import load, storage

ANCHORS = (-1.6, 0.1, 2.1)  # all twenty: python -m experiments.stochastic


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds(1000))
def test_the_gradient_is_that_of_the_smoothed_objective(kind):
    # 10^5 draws in few blocks: a block costs its steps, whatever its draws; 3 errors are stricter
    # under t with 19 degrees
    strategy, objective = kinds(5000)[kind]
    model, tasks = one_function()
    for anchor in ANCHORS:
        exact = central(objective, anchor)
        mean, error, moving = estimate(model, tasks, strategy, anchor, blocks=20)
        assert abs(mean - exact) < 3.0 * error, (anchor, mean, exact, error)
        # the part through the moving minima is not all of it
        assert abs(moving - exact) > 0.1 * abs(exact)
        if strategy.alg.uses_score:
            assert error < 0.05 * abs(exact)


def program_of_rows(params, x, y):
    """f as a sum over rows, each with its own phase: what a minibatch of rows changes."""
    t = params["theta"]
    pyro.factor("f", -(0.5 * torch.sin(3 * t + x[..., 0]) + 0.05 * t**2))


def test_minibatches_equal_all_their_sequences():
    """Every sequence of minibatches enumerated: value and gradient of their mean, for a walk short
    enough for that.
    """
    phases, batch_size, steps, anchor = np.array([0.0, 0.7, 1.5, -0.8]), 2, 3, 0.4
    x = torch.tensor(phases).unsqueeze(-1)
    part = (x, torch.zeros(4, dtype=torch.float64))
    tasks = vm.TaskSet([vm.Task(support=part, query=part, name="f")])
    model = vm.TaskModel.from_pyro(
        program_of_rows, {"theta": torch.zeros((), dtype=torch.float64)}, vm.GaussianPrior(LAMBDA)
    )
    subsets = list(itertools.combinations(range(4), batch_size))

    def mean_over_sequences(anchor):
        ends = []
        for sequence in itertools.product(subsets, repeat=steps):
            t = anchor
            for rows in sequence:
                gradient = (
                    (1.5 * np.cos(3 * t + phases[list(rows)]) + 0.1 * t).sum() * 4 / batch_size
                )
                t = t - LR * (gradient + LAMBDA * (t - anchor))
            ends.append((0.5 * np.sin(3 * t + phases) + 0.05 * t**2).sum())
        return np.mean(ends)

    strategy = vm.Stochastic(
        vm.Unrolled("delta", "query"),
        vm.StochasticAlg(steps, LR, batch_size=batch_size, num_draws=2000),
    )
    mean, error, _ = estimate(model, tasks, strategy, anchor, blocks=20)
    assert abs(mean - central(mean_over_sequences, anchor)) < 3.0 * error
    assert error < 0.1 * abs(mean)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["score", "pathwise"])
def test_every_entry_of_eta_in_a_linear_model(estimator):
    """Gaussian tasks: mean and covariance of the end of the walk follow recursions, so E g has a
    closed form.
    """
    steps, lr, temperature, start = 6, 0.02, 0.7, 0.8
    generator = torch.Generator().manual_seed(0)
    parts = [
        tuple(
            torch.randn(n, *shape, generator=generator, dtype=torch.float64) for shape in ((2,), ())
        )
        for n in (5, 4)
    ]
    tasks = vm.TaskSet([vm.Task(support=parts[0], query=parts[1], name="t")])
    model = vm.TaskModel(
        torch.nn.Linear(2, 1).double(),
        vm.likelihoods.Gaussian(0.8),
        vm.GaussianPrior(2.0, "per_parameter"),
    )
    eta = model.init(torch.zeros((), dtype=torch.float64))

    def design(x):
        return torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)

    def smoothed(eta):
        theta0 = torch.cat([eta["weight"].reshape(-1), eta["bias"]])
        precision = torch.cat(
            [eta["log_precision.weight"].reshape(-1), eta["log_precision.bias"]]
        ).exp()
        variance = (2 * eta["log_scale"]).exp()
        (x, y), (xq, yq) = ((design(p[0]), p[1]) for p in parts)
        a = x.T @ x / variance + torch.diag(precision)
        b = x.T @ y / variance + precision * theta0
        mean, cov = theta0, start**2 * torch.diag(1 / precision)
        for k in range(steps):
            shrink = torch.eye(3, dtype=torch.float64) - lr * a
            mean, cov = shrink @ mean + lr * b, shrink @ cov @ shrink.T
            cov = cov + 2 * lr * temperature * (1 - k / steps) * torch.eye(3, dtype=torch.float64)
        squares = (yq - xq @ mean).square().sum() + (xq @ cov @ xq.T).trace()
        return 0.5 * squares / variance + len(yq) * (eta["log_scale"] + 0.5 * math.log(2 * math.pi))

    leaves = {name: value.clone().requires_grad_() for name, value in eta.items()}
    exact_value = smoothed(leaves)
    exact = dict(zip(leaves, torch.autograd.grad(exact_value, list(leaves.values())), strict=True))
    alg = vm.StochasticAlg(
        steps, lr, start_scale=start, temperature=temperature, num_draws=4000, estimator=estimator
    )
    results = [
        vm.meta_gradient(model, tasks, vm.Stochastic(vm.Unrolled("delta", "query"), alg), seed)
        for seed in range(25)
    ]
    values = torch.tensor([result.value for result in results])
    assert abs(values.mean() - exact_value) < 4 * values.std() / 5
    for name, want in exact.items():
        got = torch.stack([result.grads[name] for result in results])
        error = got.std(0) / 5
        # 25 blocks: Student's t with 24 degrees of freedom, seven entries
        assert bool(((got.mean(0) - want).abs() < 3.8 * error).all()), (
            name,
            got.mean(0),
            want,
            error,
        )
        assert bool((error < 0.1 * max(1.0, float(want.abs().max()))).all())


def test_a_minibatch_of_tasks_sees_the_same_draws():
    """The noise follows a task's name: the gradient of a set is the sum over its tasks, each on its
    own.
    """
    tasks, model = ragged_tasks(3), linear_model(vm.GaussianPrior(2.0))
    alg = vm.StochasticAlg(4, 0.02, start_scale=0.5, temperature=0.3, batch_size=2, num_draws=3)
    for strategy in (
        vm.Stochastic(vm.Unrolled("delta", "query"), alg),
        vm.Stochastic(vm.Implicit("delta", "query"), alg),
    ):
        whole = vm.meta_gradient(model, tasks, strategy)
        alone = [vm.meta_gradient(model, tasks[[i]], strategy) for i in range(3)]
        for name, gradient in whole.grads.items():
            assert torch.allclose(
                gradient, sum(part.grads[name] for part in alone), rtol=1e-10, atol=1e-12
            )
        again = vm.meta_gradient(model, tasks, strategy)
        assert all(torch.equal(again.grads[name], whole.grads[name]) for name in whole.grads)


def test_fit_adapt_resume_and_store(tmp_path):
    tasks, model = ragged_tasks(3), linear_model(vm.GaussianPrior(2.0))
    strategy = vm.Stochastic(
        vm.Unrolled("delta", "query"), vm.StochasticAlg(5, 0.02, start_scale=1.0, num_draws=4)
    )
    whole = vm.fit(model, tasks, strategy, 6, adam, schedule="constant")
    half = vm.fit(model, tasks, strategy, 3, adam, schedule="constant")
    half.save(tmp_path / "half.fit")
    loaded = vm.load(tmp_path / "half.fit", model)
    assert loaded.strategy == strategy
    rest = vm.fit(model, tasks, loaded.strategy, 6, adam, schedule="constant", resume=loaded)
    assert all(torch.equal(rest.eta[name], whole.eta[name]) for name in whole.eta)
    # adaptation is one draw of Alg: noisy, but the same each time
    first, second = (whole.adapt(tasks).mean["bias"] for _ in range(2))
    plain = vm.Unrolled("delta", "query", inner_steps=5, minimizer=vm.GradientDescent(0.02))
    assert torch.equal(first, second)
    assert not torch.allclose(
        first, vm.fit(model, tasks, plain, 6, adam).adapt(tasks).mean["bias"], atol=1e-2
    )


@pytest.mark.parametrize("strategy", [vm.Unrolled, vm.Implicit])
def test_a_fit_by_the_score(strategy):
    """Its value, for which no derivative is taken, is that of the pathwise estimator on the same
    draws.
    """
    model, tasks = linear_model(vm.GaussianPrior(1.0)), ragged_tasks(3)

    def fitted(estimator):
        alg = vm.StochasticAlg(4, 0.01, temperature=0.5, num_draws=3, estimator=estimator)
        still = lambda params: torch.optim.SGD(params, lr=1e-30)  # noqa: E731
        return vm.fit(
            model, tasks, vm.Stochastic(strategy("delta", "query"), alg), 1, still, compile=False
        )

    found = fitted("score")
    assert math.isfinite(found.loss)
    if strategy is vm.Unrolled:  # Implicit takes the score alone
        assert found.loss == pytest.approx(fitted("pathwise").loss, rel=1e-12)


def test_a_ridge_is_called_out():
    """Warm noise up to the last step: some draws end between two basins, where the score is not all
    of the change.
    """
    model, tasks = one_function()
    alg = vm.StochasticAlg(STEPS, LR, temperature=TEMPERATURE, cooling=False, num_draws=200)
    with pytest.warns(
        RuntimeWarning, match=r"% of the draws of alg ended on a ridge.*cooling=True"
    ):
        vm.meta_gradient(
            model,
            tasks,
            vm.Stochastic(vm.Implicit("delta", "query"), alg),
            eta={"theta": torch.tensor(0.7)},
        )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: vm.StochasticAlg(), ValueError, "nothing is random here"),
        (
            lambda: vm.StochasticAlg(0, temperature=1.0),
            ValueError,
            "num_steps must be a whole number of at least 1",
        ),
        (
            lambda: vm.StochasticAlg(temperature=-1.0),
            ValueError,
            "temperature must be a finite number of at least 0",
        ),
        (
            lambda: vm.StochasticAlg(lr=0.0, temperature=1.0),
            ValueError,
            "lr must be a positive number",
        ),
        (
            lambda: vm.StochasticAlg(start_scale=1.0, estimator="score"),
            ValueError,
            "needs the density of Langevin",
        ),
        (
            lambda: vm.StochasticAlg(temperature=1.0, estimator="x"),
            ValueError,
            "estimator must be one of",
        ),
        (
            lambda: vm.StochasticAlg(temperature=1.0, num_draws=1),
            ValueError,
            "num_draws of at least 2",
        ),
        (lambda: vm.StochasticAlg(batch_size=1.5), ValueError, "batch_size must be a whole number"),
    ],
)
def test_bad_choices(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: vm.Stochastic(vm.Implicit("delta", "query"), vm.StochasticAlg(start_scale=1.0)),
            ValueError,
            "temperature > 0",
        ),
        (
            lambda: vm.Stochastic(
                vm.Unrolled("normal", "query"), vm.StochasticAlg(start_scale=1.0)
            ),
            ValueError,
            "guide='delta'",
        ),
        (
            lambda: vm.Stochastic(
                vm.FirstOrder("delta", "query"), vm.StochasticAlg(start_scale=1.0)
            ),
            TypeError,
            r"takes vm.Unrolled\(...\) or vm.Implicit\(...\).*not an? FirstOrder",
        ),
        (
            lambda: vm.Stochastic(vm.Unrolled("delta", "query"), "langevin"),
            TypeError,
            "alg must be a StochasticAlg, not ",
        ),
        (
            lambda: vm.Stochastic(
                vm.Implicit("delta", "query", warm_start=True), vm.StochasticAlg(temperature=1.0)
            ),
            ValueError,
            "exclude each other",
        ),
        (  # as it was spelled before
            lambda: vm.Unrolled("delta", "query", alg=vm.StochasticAlg(start_scale=1.0)),
            TypeError,
            r"takes no alg: vm.Stochastic\(vm.Unrolled\(...\), alg\)",
        ),
    ],
)
def test_strategies_that_do_not_go_with_it(make, error, message):
    with pytest.raises(error, match=message):
        vm.fit(linear_model(vm.GaussianPrior(1.0)), ragged_tasks(2), make())


def test_a_file_of_the_time_when_alg_was_an_option_loads_as_the_wrapper() -> None:
    model, tasks = linear_model(vm.GaussianPrior(2.0)), ragged_tasks(2)
    plain = vm.Unrolled("delta", "query", inner_steps=3)
    alg = vm.StochasticAlg(5, 0.02, start_scale=1.0, num_draws=4)
    for given, expected in ((None, plain), (alg, vm.Stochastic(plain, alg))):
        described = storage._describe(plain) | {"alg": storage._describe(given)}
        assert load._strategy(described, "old.fit", model, tasks, None) == expected
