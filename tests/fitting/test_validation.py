"""Validation tasks: what is looked at, when a run ends, and that the best state is what is kept."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.cases import linear_model, seeded

PRIOR = vm.GaussianPrior(learn_precision="per_module")


def adam(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=3e-2)


def noisy_tasks(number: int, seed: int) -> vm.TaskSet:
    """Sinusoids of few noisy rows, which a network soon fits too well."""
    generator = torch.Generator().manual_seed(seed)

    def rows(phase: Tensor) -> tuple[Tensor, Tensor]:
        x = 4 * torch.rand(6, 1, generator=generator, dtype=torch.float64) - 2
        noise = 0.5 * torch.randn(6, generator=generator, dtype=torch.float64)
        return x, torch.sin(2 * x[:, 0] + phase) + noise

    tasks = []
    for k in range(number):
        phase = torch.rand((), generator=generator, dtype=torch.float64)
        tasks.append(vm.Task(rows(phase), rows(phase), name=f"{seed}-{k}"))
    return vm.TaskSet(tasks)


def head_model() -> vm.TaskModel:
    net = seeded(lambda: nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)))
    return vm.TaskModel(net, vm.likelihoods.Gaussian(), PRIOR, shared=["0.*"])


TRAIN, HELD_OUT = noisy_tasks(5, 0), noisy_tasks(10, 1)
HEAD = vm.Joint("multivariate_normal")


def watched(steps: int = 200, **options: Any) -> vm.Fit:
    validation = vm.Validation(HELD_OUT, **({"every": 10, "patience": None} | options))
    return vm.fit(head_model(), TRAIN, HEAD, steps, adam, schedule="constant", validate=validation)


def test_the_best_state_is_what_is_returned() -> None:
    fit = watched()
    curve = fit.history.dropna()["validation"]
    steps = fit.history.dropna()["step"]
    assert list(steps) == list(range(10, 201, 10))
    best = int(steps[curve.idxmax()])
    assert 0 < best < 200 and fit.run.step == best, "the case must overfit"
    assert fit.stop.startswith("stopped after 200 steps; kept is step ")
    # the state is that of a run of so many steps, and the curve what adapt and score say of it
    short = vm.fit(head_model(), TRAIN, HEAD, best, adam, schedule="constant")
    for name, value in short.eta.items():
        assert torch.equal(fit.eta[name], value)
    assert fit.loss == short.loss
    score = fit.adapt(HELD_OUT).score().loc["all", "log_density"]
    assert curve.max() == pytest.approx(score, rel=1e-12)


def test_patience_ends_a_run_that_gets_no_better() -> None:
    whole, fit = watched(), watched(patience=3)
    assert fit.run.step == whole.run.step  # the same best one
    assert len(fit.history) == fit.run.step + 30
    assert f"stopped after {len(fit.history)} steps, 3 looks without a better" in fit.stop


@pytest.mark.parametrize("metric", ["rmse", "log_density"])
def test_the_metric_decides_and_its_sense_is_known(metric: Any) -> None:
    fit = watched(metric=metric)
    curve = fit.history.dropna()["validation"]
    best = curve.idxmin() if metric == "rmse" else curve.idxmax()
    assert fit.run.step == int(fit.history["step"][best])
    score = fit.adapt(HELD_OUT).score().loc["all", metric]
    assert score == pytest.approx(curve[best], rel=1e-12)


def test_a_start_that_is_best_is_kept() -> None:
    fit = vm.fit(
        head_model(), TRAIN, HEAD, 5, lambda p: torch.optim.SGD(p, lr=0.3),
        validate=vm.Validation(HELD_OUT, every=1),
    )  # fmt: skip
    start = head_model().init(torch.zeros((), dtype=torch.float64))
    if fit.run.step == 0:
        for name, value in start.items():
            assert torch.equal(fit.eta[name], value)
    assert "kept is step 0 of 5" in fit.stop


def test_stored_guides_are_kept_too() -> None:
    """phi and the optimiser's state go back with eta, so that a resumed run is the run itself."""
    model = linear_model(vm.GaussianPrior(1.0))
    tasks = noisy_tasks(5, 2)
    options: dict[str, Any] = {"optimizer": adam, "schedule": "constant"}
    validation = vm.Validation(noisy_tasks(5, 3), every=5, patience=None)
    fit = vm.fit(model, tasks, vm.Joint("normal"), 60, validate=validation, **options)
    kept = fit.run.step
    assert fit.run.state.step == kept < 60
    on = vm.fit(model, tasks, vm.Joint("normal"), 80, resume=fit, **options)
    whole = vm.fit(model, tasks, vm.Joint("normal"), 80, **options)
    assert len(on.history) == 80 and on.run.kept is None
    for name, value in whole.eta.items():
        torch.testing.assert_close(on.eta[name], value, rtol=1e-12, atol=1e-12)


def test_going_on_from_a_kept_step_is_no_matter_of_where_the_last_one_was() -> None:
    """The cosine had fallen to zero by the last step, not by the one that was kept."""
    options: dict[str, Any] = {"validate": vm.Validation(HELD_OUT, every=10, patience=None)}
    fit = vm.fit(head_model(), TRAIN, HEAD, 200, adam, **options)
    assert fit.run.step < 200
    vm.fit(head_model(), TRAIN, HEAD, 220, adam, resume=fit)  # a warning would be an error


def test_going_on_from_a_kept_last_step_warns_where_the_cosine_had_fallen() -> None:
    options: dict[str, Any] = {"validate": vm.Validation(HELD_OUT, every=5, patience=None)}
    fit = vm.fit(head_model(), TRAIN, HEAD, 10, adam, **options)
    assert fit.run.kept == 10, "the case must learn to its end"
    with pytest.warns(RuntimeWarning, match="had fallen to zero by its last step, 10"):
        vm.fit(head_model(), TRAIN, HEAD, 20, adam, resume=fit)


def test_a_kept_state_comes_back_from_a_file(tmp_path: Path) -> None:
    fit = watched(30)
    fit.save(tmp_path / "fit.pt")
    back = vm.load(tmp_path / "fit.pt", head_model())
    assert back.run.step == fit.run.step and back.stop == fit.stop
    assert back.history.equals(fit.history)


def test_an_interrupted_run_keeps_its_best() -> None:
    def stop(row: dict[str, float]) -> None:
        if row["step"] == 45:
            raise KeyboardInterrupt

    fit = vm.fit(
        head_model(), TRAIN, HEAD, 200, adam, callback=stop,
        validate=vm.Validation(HELD_OUT, every=10),
    )  # fmt: skip
    assert fit.run.step in (0, 10, 20, 30, 40)
    assert fit.stop.startswith("interrupted after 45 steps")


def test_classes_are_judged_by_their_errors() -> None:
    generator = torch.Generator().manual_seed(0)

    def task() -> vm.Task:
        x = torch.randn(8, 2, generator=generator)
        y = (x[:, 0] + torch.randn(8, generator=generator) > 0).long()
        return vm.Task((x[:4], y[:4]), (x[4:], y[4:]))

    tasks = vm.TaskSet([task() for _ in range(6)])
    model = vm.TaskModel(
        seeded(lambda: nn.Linear(2, 2)), vm.likelihoods.Categorical(2), vm.GaussianPrior(1.0)
    )
    validation = vm.Validation(tasks, "error_rate", every=5)
    fit = vm.fit(model, tasks, vm.Implicit("delta"), 20, adam, validate=validation)
    assert 0 <= fit.history["validation"].min() <= 1
    with pytest.raises(ValueError, match="metric='rmse' does not judge"):
        vm.fit(model, tasks, vm.Implicit("delta"), 20, adam, validate=vm.Validation(tasks, "rmse"))


def test_a_look_that_is_not_finite_is_never_best() -> None:
    from varmeta.fitting.validation import Watch
    from varmeta.strategies.strategy import State

    values = iter([math.nan, 1.0, math.inf, 0.5, math.nan])
    watch = Watch(vm.Validation(HELD_OUT), lambda eta: next(values))
    optimizer = adam([torch.zeros(1, requires_grad=True)])
    for step in range(5):
        watch.look(step, {"a": torch.zeros(1)}, State(), optimizer.state_dict)
    assert watch.best is not None and watch.best.step == 1 and watch.worse == 3


def test_what_it_cannot_use_is_refused() -> None:
    model, tasks = linear_model(vm.GaussianPrior(1.0)), noisy_tasks(3, 4)
    bare = vm.TaskSet([vm.Task(task.support) for task in tasks])
    with pytest.raises(ValueError, match="no query data to be scored on"):
        vm.fit(model, tasks, validate=bare)
    with pytest.raises(TypeError, match="validate takes a TaskSet"):
        vm.fit(model, tasks, validate=[1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="metric"):
        vm.Validation(tasks, "loss")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="accuracy is 1 - error_rate: use metric='error_rate'"):
        vm.Validation(tasks, "accuracy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every"):
        vm.Validation(tasks, every=0)
    with pytest.raises(ValueError, match="leave out optimizer, batch_size, budget and validate"):
        vm.fit(model, tasks, vm.Joint("normal"), hyperguide="normal", validate=tasks)
    other = vm.TaskSet(
        [vm.Task((torch.zeros(2, 3), torch.zeros(2)), (torch.zeros(2, 3), torch.zeros(2)))]
    )
    with pytest.raises(ValueError, match="3"):
        vm.fit(model, tasks, validate=other)


def test_a_noise_scale_that_lags_behind_is_moved_to_where_it_predicts_best() -> None:
    """Adam moves its logarithm by 0.003 a step at most; 20 steps leave it where it started."""

    def slow(params: Iterable[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=3e-3)

    def fitted(calibrate: bool) -> vm.Fit:
        net = seeded(lambda: nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)))
        noise = vm.likelihoods.Gaussian(scale=5.0)
        model = vm.TaskModel(net, noise, PRIOR, shared=["0.*"])
        watch = vm.Validation(HELD_OUT, calibrate=calibrate)
        return vm.fit(model, noisy_tasks(30, 5), HEAD, 20, slow, validate=watch)

    plain, moved = fitted(False), fitted(True)
    for name in plain.eta.keys() - {"log_scale"}:
        assert torch.equal(plain.eta[name], moved.eta[name])
    assert float(plain.eta["log_scale"].exp()) > 4.5
    assert 0.4 < float(moved.eta["log_scale"].exp()) < 1.0  # 0.5 and what so few steps miss
    scores = []
    for by in (-0.05, 0.0, 0.05):
        near = vm.Fit(moved.model, moved.tasks, HEAD, 0, type(moved.run)({}, moved.run.state))
        near.run.eta = {**moved.eta, "log_scale": moved.eta["log_scale"] + by}
        scores.append(float(near.adapt(HELD_OUT).score().loc["all", "log_density"]))
    assert scores[1] == max(scores)
    assert "times the noise scale found" in moved.stop and "times" not in plain.stop
    assert moved.loss == pytest.approx(
        vm.meta_gradient(moved.model, moved.tasks, HEAD, eta=moved.eta).value
    )


def test_what_has_no_noise_scale_to_move_is_refused() -> None:
    tasks = noisy_tasks(4, 6)
    watch = vm.Validation(tasks, calibrate=True)
    known = vm.TaskModel(
        seeded(lambda: nn.Linear(1, 1)), vm.likelihoods.Gaussian(0.5, learn_scale=False), PRIOR
    )
    with pytest.raises(ValueError, match="has none"):
        vm.fit(known, tasks, HEAD, 5, adam, validate=watch)
    with pytest.raises(ValueError, match="leaves the tasks' stored posteriors behind"):
        vm.fit(
            linear_model(vm.GaussianPrior(1.0)), tasks, vm.Joint("normal"), 5, adam, validate=watch
        )
    with pytest.raises(ValueError, match="not by the RMSE"):
        vm.Validation(tasks, "rmse", calibrate=True)
