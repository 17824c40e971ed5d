"""`fit`: repeatable to the last bit, resumable, without side effects, and plain about how it
ended.
"""

from __future__ import annotations

import io
import itertools
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import varmeta as vm
from tests.cases import adam, known, linear_model, net_model, ragged_tasks, scalar_model, seeded
from varmeta.fitting.run import Run
from varmeta.results.doubts import doubts
from varmeta.strategies.strategy import Strategy
from varmeta.tasks.source import minibatch

PRIOR = vm.GaussianPrior(3.0)
SHORT = vm.GradientDescent(lr=0.01)
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "joint": lambda: vm.Joint("normal"),
    "joint by draws": lambda: vm.Joint("normal", expectation="monte_carlo", adapt_steps=20),
    "reinit": lambda: vm.Reinit("normal", every=5),
    "implicit": lambda: vm.Implicit("delta", "query", 3, SHORT, on_unconverged="ignore"),
    "implicit, warm": lambda: vm.Implicit(
        "delta", "elbo", 3, SHORT, on_unconverged="ignore", warm_start=True
    ),
    "unrolled": lambda: vm.Unrolled("delta", inner_steps=2),
    "first order": lambda: vm.FirstOrder("normal", inner_steps=2, expectation="monte_carlo"),
    "reptile": lambda: vm.Reptile(inner_steps=2),
}


def assert_same_fit(a: vm.Fit, b: vm.Fit) -> None:
    """Equal to the last bit in all but time."""
    for name, value in a.eta.items():
        assert torch.equal(value, b.eta[name]), name
    assert (a.run.state.phi is None) == (b.run.state.phi is None)
    for name, value in (a.run.state.phi or {}).items():
        assert b.run.state.phi is not None and torch.equal(value, b.run.state.phi[name]), name
    assert a.history.drop(columns="seconds").equals(b.history.drop(columns="seconds"))


def stop_at(step: int) -> Callable[[dict[str, float]], None]:
    """Ctrl-C after so many steps."""

    def callback(row: dict[str, float]) -> None:
        if row["step"] == step:
            raise KeyboardInterrupt

    return callback


# -- the same seed, the same result ----------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_same_seed_gives_the_same_fit(name: str) -> None:
    tasks = ragged_tasks(5)
    runs = [
        vm.fit(linear_model(PRIOR), tasks, STRATEGIES[name](), 4, adam, batch_size=2, seed=seed)
        for seed in (3, 3, 4)
    ]
    assert_same_fit(runs[0], runs[1])
    assert not torch.equal(runs[0].eta["weight"], runs[2].eta["weight"])  # other minibatches
    posteriors = [fit.posterior().score(num_samples=10) for fit in runs[:2]]
    assert posteriors[0].equals(posteriors[1])


def test_newton_gives_the_same_fit_twice() -> None:
    tasks = ragged_tasks(5)
    assert_same_fit(
        *(vm.fit(linear_model(PRIOR), tasks, vm.Joint("multivariate_normal")) for _ in range(2))
    )


# -- 100 steps and 100 more are 200 steps ----------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("name", STRATEGIES)
def test_resumed_equals_uninterrupted(name: str, batch_size: int | None) -> None:
    tasks, model, total = ragged_tasks(5), linear_model(PRIOR), 8
    options: dict[str, Any] = {"optimizer": adam, "batch_size": batch_size, "seed": 1}
    whole = vm.fit(model, tasks, STRATEGIES[name](), total, schedule="constant", **options)
    half = vm.fit(model, tasks, STRATEGIES[name](), total // 2, schedule="constant", **options)
    before = {key: value.clone() for key, value in half.eta.items()}
    rest = vm.fit(
        model, tasks, STRATEGIES[name](), total, schedule="constant", resume=half, **options
    )
    assert_same_fit(rest, whole)
    assert (np.diff(rest.history["seconds"]) >= 0).all()
    # the first half is still what it was
    assert len(half.history) == total // 2
    assert all(torch.equal(value, before[key]) for key, value in half.eta.items())


@pytest.mark.filterwarnings(
    "ignore:the learned noise scale"
)  # which a strong prior and a mean-field guide leave there
@pytest.mark.parametrize(
    ("name", "steps"), [("joint", 200), ("reinit", 200), ("implicit", 20), ("unrolled", 20)]
)
def test_two_halves_are_a_whole(name: str, steps: int) -> None:
    tasks, model = ragged_tasks(3), linear_model(PRIOR)
    whole = vm.fit(model, tasks, STRATEGIES[name](), steps, adam, schedule="constant")
    half = vm.fit(model, tasks, STRATEGIES[name](), steps // 2, adam, schedule="constant")
    assert_same_fit(
        vm.fit(model, tasks, STRATEGIES[name](), steps, adam, schedule="constant", resume=half),
        whole,
    )


@pytest.mark.parametrize("name", ["joint", "reinit", "implicit", "unrolled"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(name: str, tmp_path: Path) -> None:
    """Also under the cosine schedule, and through a file."""
    tasks, model = ragged_tasks(3), linear_model(PRIOR)
    whole = vm.fit(model, tasks, STRATEGIES[name](), 24, adam)
    broken = vm.fit(model, tasks, STRATEGIES[name](), 24, adam, callback=stop_at(11))
    assert broken.stop == "interrupted after 11 steps: go on with fit(..., resume=this fit)"
    assert not broken.converged and len(broken.history) == 11
    assert_same_fit(vm.fit(model, tasks, STRATEGIES[name](), 24, adam, resume=broken), whole)
    broken.save(tmp_path / "fit.pt")
    loaded = vm.load(tmp_path / "fit.pt", model)
    assert_same_fit(vm.fit(model, tasks, loaded.strategy, 24, adam, resume=loaded), whole)


def test_an_interrupted_newton_run_goes_on() -> None:
    tasks, model = ragged_tasks(5), linear_model(PRIOR)
    whole = vm.fit(model, tasks, vm.Joint("multivariate_normal"))
    assert whole.converged
    broken = vm.fit(model, tasks, vm.Joint("multivariate_normal"), callback=stop_at(2))
    assert "interrupted after" in broken.stop and not broken.converged
    rest = vm.fit(model, tasks, vm.Joint("multivariate_normal"), resume=broken)
    assert rest.converged and rest.loss == pytest.approx(whole.loss, rel=1e-9)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": net_model(PRIOR)}, ValueError, "a fit of another model"),
        ({"tasks": ragged_tasks(2)}, ValueError, "a fit of other tasks"),
        (
            {"tasks": ragged_tasks(3, seed=1)},
            ValueError,
            "the support of 'sine 0' has other numbers",
        ),
        ({"strategy": vm.Joint("normal")}, ValueError, "a fit by Implicit, not Joint"),
        (
            {"strategy": vm.Implicit("normal", "query")},
            ValueError,
            r"Implicit\(guide='delta'\), not Implicit\(guide='normal'\)",
        ),
        ({"seed": 1}, ValueError, "was run with seed=0"),
        ({"num_steps": 3}, ValueError, "has taken 3 steps already"),
        ({"resume": 3}, TypeError, "resume must be a Fit or a path, not int: a folder of"),
        ({"resume": "no.pt"}, FileNotFoundError, "there are no checkpoints here"),
        (
            {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1)},
            ValueError,
            "another kind of optimizer",
        ),
        ({"optimizer": None}, ValueError, "another kind of optimizer"),  # by default L-BFGS
        (
            {"schedule": partial(torch.optim.lr_scheduler.StepLR, step_size=2)},
            ValueError,
            r"or of scheduler: give fit\(optimizer=\.\.\., schedule=\.\.\.\) the same again",
        ),
    ],
)
def test_what_cannot_be_resumed(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    first = {
        "model": linear_model(PRIOR),
        "tasks": ragged_tasks(3),
        "strategy": vm.Implicit("delta", "query"),
        "optimizer": adam,
        "schedule": "constant",
    }
    fit = vm.fit(**first, num_steps=3)
    with pytest.raises(error, match=message):
        vm.fit(**{**first, "num_steps": 6, "resume": fit, **change})


# -- no side effects -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_models_in_one_process_do_not_touch(name: str) -> None:
    """Interleaved step by step, each comes to what it comes to alone."""
    tasks, others = ragged_tasks(3), ragged_tasks(4, seed=1)
    alone = vm.fit(linear_model(PRIOR), tasks, STRATEGIES[name](), 5, adam)
    other_alone = vm.fit(net_model(PRIOR), others, STRATEGIES[name](), 5, adam)
    assert len(pyro.get_param_store()) == 0

    fits: list[vm.Fit] = []

    def other_runs_now(row: dict[str, float]) -> None:
        if row["step"] == 3:
            fits.append(vm.fit(net_model(PRIOR), others, STRATEGIES[name](), 5, adam))

    assert_same_fit(
        vm.fit(linear_model(PRIOR), tasks, STRATEGIES[name](), 5, adam, callback=other_runs_now),
        alone,
    )
    assert_same_fit(fits[0], other_alone)
    assert len(pyro.get_param_store()) == 0


def test_two_autoguides_do_not_share_parameters() -> None:
    """Two guides of one class share parameters in Pyro's global store, if they are let into it."""
    tasks, others = ragged_tasks(3), ragged_tasks(3, seed=7)
    alone = vm.fit(linear_model(PRIOR), tasks, vm.Joint(AutoNormal), 8, adam)
    vm.fit(linear_model(PRIOR), others, vm.Joint(AutoNormal), 8, adam)
    again = vm.fit(linear_model(PRIOR), tasks, vm.Joint(AutoNormal), 8, adam)
    assert_same_fit(again, alone)
    assert len(pyro.get_param_store()) == 0


def test_a_fit_leaves_the_model_and_the_data_as_they_were() -> None:
    tasks, model = ragged_tasks(3), linear_model(PRIOR)
    start = {name: value.clone() for name, value in model.start.items()}
    data = [task.support[1].clone() for task in tasks if task.support is not None]
    vm.fit(model, tasks, vm.Joint("normal"), 10, adam)
    vm.fit(model, tasks, vm.Joint("multivariate_normal"))
    assert all(torch.equal(value, model.start[name]) for name, value in start.items())
    assert all(
        torch.equal(y, task.support[1])
        for y, task in zip(data, tasks, strict=True)
        if task.support is not None
    )


def test_global_random_states_and_the_default_dtype_stay() -> None:
    tasks = ragged_tasks(3)

    def states() -> tuple[Any, ...]:
        numpys = str(np.random.get_state())  # noqa: NPY002  (it is what must stay)
        return torch.get_rng_state().tolist(), random.getstate(), numpys, torch.get_default_dtype()

    torch.manual_seed(11)
    before = states()
    for strategy in (*(make() for make in STRATEGIES.values()), vm.Joint(AutoNormal)):
        fit = vm.fit(linear_model(PRIOR), tasks, strategy, 3, adam, batch_size=2)
        posterior = fit.adapt(tasks)
        posterior.sample(5)
        posterior.predict(np.zeros((2, 1)), 5)
        posterior.score(num_samples=5)
    fit.to_arviz(10)
    vm.fit(linear_model(PRIOR), tasks, vm.Joint("multivariate_normal"))
    vm.meta_gradient(linear_model(PRIOR), tasks, vm.Implicit(outer="query"))
    joint = vm.Joint(adapt_steps=50)
    vm.compare({"joint": joint}, net_model(PRIOR), tasks, tasks, seeds=2, budget=4, num_samples=5)
    assert states() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", STRATEGIES)
def test_dtypes_follow_the_data(name: str, dtype: torch.dtype) -> None:
    """Whatever the network's own precision."""
    tasks = ragged_tasks(3).to(dtype=dtype)
    fit = vm.fit(linear_model(PRIOR), tasks, STRATEGIES[name](), 3, adam)
    posterior = fit.adapt(tasks)
    tensors = [
        *fit.eta.values(),
        *(fit.run.state.phi or {}).values(),
        *posterior.q.phi.values(),
        *fit.prior.loc.values(),
    ]
    tensors += [
        posterior.draws(3),
        posterior.predict(np.zeros((2, 1)), 3).samples,
        fit.prior.covariance,
    ]
    assert {value.dtype for value in tensors} == {dtype}


def test_float32_and_float64_come_to_the_same() -> None:
    tasks = ragged_tasks(5)
    for strategy in (vm.Joint("multivariate_normal"), vm.Implicit("delta", "query")):
        double, single = (
            vm.fit(linear_model(PRIOR), tasks.to(dtype=d), strategy)
            for d in (torch.float64, torch.float32)
        )
        assert single.loss == pytest.approx(double.loss, rel=1e-4)
        assert single.prior.loc["weight"].item() == pytest.approx(
            double.prior.loc["weight"].item(), abs=1e-2
        )


# -- minibatches and budgets -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["joint", "implicit", "unrolled", "first order", "reptile"])
def test_minibatch_gradients_average_to_the_full_gradient(name: str, size: int) -> None:
    """Over one epoch, each batch weighted by its tasks (the last may be smaller)."""
    tasks = ragged_tasks(6)
    # a hyperprior: its gradient is no task's, and counts once per step
    learned = name not in ("reptile", "first order")
    prior = vm.GaussianPrior(3.0, "shared", hyperprior=dist.Gamma(2.0, 1.0)) if learned else PRIOR
    model, strategy = linear_model(prior), STRATEGIES[name]()
    problem = strategy.problem(model, tasks, 0)
    start = model.init(torch.zeros((), dtype=torch.float64))
    state = strategy.init(problem, tasks.batch(), start)

    def gradient(batch: Any) -> dict[str, Tensor]:
        eta = {key: value.clone().requires_grad_() for key, value in start.items()}
        scalar = strategy.loss(problem, batch, eta, state)[0]
        return dict(zip(eta, torch.autograd.grad(scalar, list(eta.values())), strict=True))

    full = gradient(tasks.batch())
    batches = [tasks.batch(minibatch(6, size, 0, step)) for step in range(-(-6 // size))]
    assert sorted(itertools.chain(*(batch.rows.tolist() for batch in batches))) == list(range(6))
    parts = [(len(batch) / 6, gradient(batch)) for batch in batches]
    for key, value in full.items():
        torch.testing.assert_close(
            sum(weight * part[key] for weight, part in parts), value, rtol=1e-10, atol=1e-10
        )


def test_epochs_are_permutations_by_seed() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return [int(i) for step in range(3) for i in minibatch(7, 3, seed, 3 * number + step)]

    assert all(
        sorted(epoch(seed, number)) == list(range(7)) for seed in range(3) for number in range(3)
    )
    assert len({tuple(epoch(seed, number)) for seed in range(3) for number in range(3)}) == 9


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_budget_is_kept(name: str) -> None:
    fit = vm.fit(linear_model(PRIOR), ragged_tasks(3), STRATEGIES[name](), budget=100)
    spent = fit.history["evaluations"]
    step = spent.diff().max()
    assert 100 <= spent.iloc[-1] < 100 + step
    assert spent.iloc[-2] < 100
    assert fit.stop.startswith(
        f"spent its budget of 100 gradient evaluations per task after {len(fit.history)} steps"
    )


# -- how it ended ----------------------------------------------------------------------------------


def exploding_program(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    return pyro.sample("y", dist.Normal(params["w"] + params["s"].exp() * x, 1.0), obs=y)


def exploding() -> tuple[vm.TaskModel, vm.TaskSet]:
    """Two tasks, the second of which takes off with s."""
    model = vm.TaskModel.from_pyro(exploding_program, {"w": (), "s": ()}, shared=["s"])
    return model, vm.TaskSet(
        [
            vm.Task((np.zeros(2), np.ones(2)), name="calm"),
            vm.Task((np.ones(2), np.zeros(2)), name="hot"),
        ]
    )


def test_a_loss_that_is_not_finite_at_the_start_names_the_task() -> None:
    model, tasks = exploding()
    wild = vm.TaskSet([tasks[0], vm.Task((np.full(2, 1e200), np.ones(2)), name="wild")])
    for strategy, optimizer in (
        (vm.Joint("delta"), None),
        (vm.Joint("delta"), adam),
        (vm.Unrolled("delta", "elbo"), adam),
    ):
        with pytest.raises(ValueError, match="loss of task 'wild' is not finite at"):
            vm.fit(model, wild, strategy, 5, optimizer)


def test_a_loss_that_stops_being_finite_gives_the_last_finite_fit() -> None:
    model, tasks = exploding()
    strategy = vm.Joint("delta")
    with pytest.warns(
        RuntimeWarning,
        match="eta is not finite at step .* loss of task 'hot' is the largest.*: standardise",
    ):
        fit = vm.fit(
            model,
            tasks,
            strategy,
            50,
            lambda p: torch.optim.SGD(p, lr=2.0, maximize=True),
            schedule="constant",
        )
    assert (
        "not finite at step" in fit.stop
        and "last step at which it was" in fit.stop
        and not fit.converged
    )
    assert 0 < len(fit.history) < 50
    # what comes back can be used: the loss there is the last of the record
    assert fit.run.state.phi is not None
    losses = fit.problem.losses("elbo", tasks.batch(), 0)(fit.run.state.phi, fit.eta)
    assert np.isfinite(fit.loss) and float(losses.sum()) == pytest.approx(fit.loss, rel=1e-12)


def test_a_run_without_learning_is_printed_too() -> None:
    def at_once(row: dict[str, float]) -> None:
        raise KeyboardInterrupt

    fit = vm.fit(linear_model(PRIOR), ragged_tasks(2), vm.Joint(), 5, adam, callback=at_once)
    assert "interrupted after 1 steps" in str(fit)
    empty = vm.Fit(fit.model, fit.tasks, fit.strategy, 0, Run(fit.eta, fit.run.state))
    assert "not run" in str(empty) and np.isnan(empty.loss) and len(empty.history) == 0


def test_the_progress_bar_is_silent_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    vm.fit(linear_model(PRIOR), ragged_tasks(2), vm.Joint(), 3, adam)
    assert capsys.readouterr() == ("", "")
    vm.fit(linear_model(PRIOR), ragged_tasks(2), vm.Joint(), 3, adam, progress=True)
    assert "0/3" in capsys.readouterr().err


def test_the_progress_bar_shows_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    vm.fit(linear_model(PRIOR), ragged_tasks(2), vm.Joint(), 3, adam)
    assert "0/3" in terminal.getvalue()
    terminal.truncate(0)
    vm.fit(linear_model(PRIOR), ragged_tasks(2), vm.Joint(), 3, adam, progress=False)
    assert not terminal.getvalue().strip("\0")


def test_the_callback_sees_every_step() -> None:
    rows: list[dict[str, float]] = []
    fit = vm.fit(linear_model(PRIOR), ragged_tasks(2), vm.Joint(), 4, adam, callback=rows.append)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert (
        set(rows[0])
        == {"step", "loss", "gradient_norm", "lr", "evaluations", "seconds"}
        == set(fit.history.columns)
    )
    assert fit.history["loss"].tolist() == [row["loss"] for row in rows]


def test_print_says_what_was_learned() -> None:
    model = vm.TaskModel(
        seeded(lambda: nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))),
        vm.likelihoods.Gaussian(scale=0.5),
        vm.GaussianPrior(2.0, "full"),
        shared=("1.*",),
    )
    fit = vm.fit(model, ragged_tasks(4), vm.Joint("normal"), 3, adam)
    text = str(fit)
    assert text.splitlines()[0] == "Joint(normal, outer=elbo), 4 tasks, 15 support observations"
    assert f"negative ELBO: {fit.loss:.4f} nats" in text
    assert "not converged: stopped after 3 steps" in text
    for label, loc, sd in zip(
        fit.prior.labels,
        model.weights.flatten(fit.prior.loc).tolist(),
        model.weights.flatten(fit.prior.sd).tolist(),
        strict=True,
    ):
        assert f"{label:<13} {loc:>12.5g} {sd:>12.5g}" in text
    assert f"{'1.bias':<13} {float(fit.eta['1.bias']):>12.5g} {'shared':>12}" in text
    assert f"{'noise scale':<13} {'':>12} {float(fit.eta['log_scale'].exp()):>12.5g}" in text
    assert "correlations of the prior" in text and " 1.000" in text
    assert max(map(len, text.splitlines())) <= 120


def test_print_of_a_network_is_short() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 1)))
    model = vm.TaskModel(net, vm.likelihoods.Gaussian(), PRIOR)
    fit = known(model, ragged_tasks(2), vm.Unrolled(inner_steps=1))
    text = str(fit)
    own = fit.prior.loc["0.weight"].square().mean().sqrt()
    assert f"{'0.weight (40, 1)':<16} {f'rms {float(own):.5g}':>12} {1 / 3**0.5:>12.5g}" in text
    assert len(text.splitlines()) == 10 and "more" not in text


@pytest.mark.parametrize(
    "strategy",
    [
        vm.Joint("delta"),
        vm.Reinit("delta"),
        vm.Implicit("delta", "elbo"),
        vm.Implicit("delta", "query_elbo"),
        vm.Reptile(),
    ],
    ids=lambda strategy: strategy.describe(),
)
def test_a_delta_objective_is_never_called_an_elbo(strategy: Strategy) -> None:
    fit = known(linear_model(PRIOR), ragged_tasks(2), strategy)
    assert "no bound" in fit.loss_name
    assert "elbo" not in (str(fit) + repr(fit) + fit.loss_name).lower()
    assert "KL" not in fit.loss_name


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        (vm.Joint("normal"), "negative ELBO"),
        (vm.Implicit("normal", "query_elbo"), "KL + query loss"),
        (vm.Implicit("normal", "query"), "query loss"),
        (vm.Implicit("normal", "query_predictive"), "-log predictive of the query"),
        (vm.Implicit("delta", "query"), "query loss (no bound)"),
        (vm.Implicit("delta", "query_predictive"), "-log predictive of the query (no bound)"),
    ],
)
def test_the_objective_has_its_name(strategy: Strategy, name: str) -> None:
    assert known(linear_model(PRIOR), ragged_tasks(2), strategy).loss_name == name
    hyper = vm.GaussianPrior(3.0, "shared", hyperprior=dist.Gamma(2.0, 1.0))
    assert (
        known(linear_model(hyper), ragged_tasks(2), strategy).loss_name
        == f"{name} - log hyperprior"
    )


def test_a_cubature_that_is_not_exact_is_named() -> None:
    fit = known(scalar_model(PRIOR), ragged_tasks(2), vm.Joint("normal", expectation="cubature"))
    assert fit.loss_name == "negative ELBO by cubature"
    drawn = known(
        scalar_model(PRIOR), ragged_tasks(2), vm.Joint("normal", expectation="quadrature")
    )
    assert drawn.loss_name == "negative ELBO"


def test_a_precision_that_runs_away_is_called_out() -> None:
    """Tasks that do not differ: the best prior has no spread, and the fit says what that means."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 6, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    noise -= noise.mean(1, keepdim=True)
    tasks = vm.TaskSet([vm.Task((a, 1.0 + b)) for a, b in zip(x, noise, strict=True)])
    bias = vm.TaskModel(
        seeded(lambda: nn.Linear(1, 1)),
        vm.likelihoods.Gaussian(),
        vm.GaussianPrior(1.0, "shared"),
        shared=("weight",),
    )
    said = "precision of bias runs away.*centre the predictors, or give a hyperprior"
    for guide in (
        "normal",
        "multivariate_normal",
        vm.guides.Dense(),
    ):  # of one weight they are one, so none is advised
        with pytest.warns(RuntimeWarning, match=said):
            fit = vm.fit(bias, tasks, vm.Joint(guide))
        assert len(doubts(fit)) == 1
    spread = vm.TaskSet(
        [vm.Task((a, 3.0 * i + b)) for i, (a, b) in enumerate(zip(x, noise, strict=True))]
    )
    fit = vm.fit(bias, spread, vm.Joint("normal"))
    assert doubts(fit) == []
