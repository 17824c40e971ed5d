"""Saved without the tasks: as small as what was learned, and good for all but the tasks' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

import varmeta as vm
from tests.cases import adam, linear_model, net_model, ragged_tasks, seeded

PRIOR = vm.GaussianPrior(3.0)
MAML = vm.Unrolled("delta", "query", 2, vm.GradientDescent(0.01))


def saved(fit: vm.Fit, folder: Path, data: bool = False) -> vm.Fit:
    fit.save(folder / "fit.vm", data=data)
    return vm.load(folder / "fit.vm", fit.model)


def images(number: int = 40) -> vm.TaskSet:
    x = torch.rand(number, 10, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    y = torch.arange(10) % 2
    return vm.TaskSet([vm.Task((one[:4], y[:4]), (one[4:], y[4:])) for one in x])


def test_a_file_without_data_is_as_small_as_what_was_learned(tmp_path: Path) -> None:
    net = seeded(lambda: nn.Sequential(nn.AvgPool2d(7), nn.Flatten(), nn.Linear(16, 2))).float()
    model = vm.TaskModel(net, vm.likelihoods.Categorical(2), PRIOR)
    tasks = images()
    fit = vm.fit(model, tasks, MAML, 2, adam, batch_size=4, progress=False)
    sizes = {}
    for data in (True, False):
        back = saved(fit, tmp_path, data)
        sizes[data] = (tmp_path / "fit.vm").stat().st_size
        assert back.adapt(tasks[:3]).score().equals(fit.adapt(tasks[:3]).score())
        assert (
            repr(back)
            == repr(fit)
            == "<Fit: Unrolled(delta, outer=query), 40 tasks, not converged>"
        )
    assert sizes[True] > 40 * 10 * 28 * 28 * 4 and sizes[False] < sizes[True] / 20


def test_it_goes_on_with_the_same_tasks_and_with_no_others(tmp_path: Path) -> None:
    model, tasks = net_model(PRIOR), ragged_tasks(6)
    options: dict[str, Any] = {"optimizer": adam, "batch_size": 3, "schedule": "constant"}
    whole = vm.fit(model, tasks, MAML, 9, **options)
    half = saved(vm.fit(model, tasks, MAML, 5, **options), tmp_path)
    on = vm.fit(model, tasks, MAML, 9, resume=half, **options)
    for name, value in whole.eta.items():
        assert torch.equal(on.eta[name], value)
    assert on.posterior().names == tasks.names  # the tasks are there again
    assert saved(on, tmp_path, data=True).tasks.first_difference(tasks) is None
    others = ragged_tasks(6, seed=1)
    named = [vm.Task(task.support, task.query, f"{task.name}'") for task in tasks]
    shorter = [
        vm.Task(task.support, (task.query[0][:1], task.query[1][:1]), task.name)
        for task in tasks[:5]
    ]
    known = [vm.Task(task.support, task.query, task.name, {"z": 1.0}) for task in tasks]
    for other in (others, vm.TaskSet(named), vm.TaskSet([*shorter, tasks[5]]), vm.TaskSet(known)):
        with pytest.raises(ValueError, match="resume is a fit of other tasks"):
            vm.fit(model, other, MAML, 9, resume=half, **options)
    # twice without them is once
    assert vm.fit(model, tasks, MAML, 9, resume=saved(half, tmp_path), **options).loss == on.loss


def test_what_is_of_the_tasks_is_refused(tmp_path: Path) -> None:
    model, tasks = linear_model(PRIOR), ragged_tasks(5)
    for strategy in (vm.Joint("multivariate_normal"), vm.Joint("normal"), MAML):
        fit = vm.fit(model, tasks, strategy)
        back = saved(fit, tmp_path)
        for ask in (back.posterior, back.leave_one_task_out, back.to_arviz):
            with pytest.raises(ValueError, match=r"saved without its tasks: give.* fit.adapt"):
                ask()
        for look in (vm.reachability, vm.Landscape.of_fit, vm.plot.plot_shrinkage):
            with pytest.raises(ValueError, match=r"without its tasks|a width beside its location"):
                look(back)
        assert back.standard_errors is None and back.log_likelihood is None
        with pytest.raises(ValueError, match="saved without its tasks: save it with data=True"):
            vm.compare_models(back, fit)
        assert back.loss == fit.loss and "5 tasks\n" in str(back)
        new = ragged_tasks(3, seed=2)
        assert back.adapt(new).score().equals(fit.adapt(new).score())
        assert back.run.state.phi is None


def test_a_prior_that_features_move_is_drawn_where_their_mean_is_known(tmp_path: Path) -> None:
    tasks = vm.TaskSet(
        [
            vm.Task(task.support, None, task.name, {"z": float(i)})
            for i, task in enumerate(ragged_tasks(5))
        ]
    )
    fit = vm.fit(linear_model(vm.GaussianPrior(3.0, covariates=["z"])), tasks)
    plt.close(vm.plot.plot_prior_curves(fit, [0.0, 1.0]).figure)
    with pytest.raises(ValueError, match="without its tasks"):
        vm.plot.plot_prior_curves(saved(fit, tmp_path), [0.0, 1.0])
    plain = saved(vm.fit(linear_model(PRIOR), ragged_tasks(3)), tmp_path)
    plt.close(vm.plot.plot_prior_curves(plain, [0.0, 1.0]).figure)


def test_stored_posteriors_are_not_kept_so_that_it_cannot_go_on(tmp_path: Path) -> None:
    model, tasks = linear_model(PRIOR), ragged_tasks(5)
    half = saved(vm.fit(model, tasks, vm.Joint("normal"), 3, adam), tmp_path)
    with pytest.raises(ValueError, match="saved without its tasks' posteriors, .*data=True"):
        vm.fit(model, tasks, vm.Joint("normal"), 5, adam, resume=half)


def test_a_posterior_of_eta_and_an_ensemble_come_back(tmp_path: Path) -> None:
    tasks = ragged_tasks(8)
    prior = vm.GaussianPrior(learn_precision="shared")
    model = linear_model(prior)
    fit = vm.fit(model, tasks, vm.Joint("multivariate_normal"), hyperguide="normal")
    back = saved(fit, tmp_path)
    assert back.hyperparameters().equals(fit.hyperparameters())
    net = seeded(lambda: nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)))
    model = vm.TaskModel(net, vm.likelihoods.Gaussian(), prior, shared=["0.*"])
    fit = vm.fit(model, tasks, vm.Joint("multivariate_normal"), 3, adam, ensemble=2)
    back = saved(fit, tmp_path)
    assert back.adapt(tasks).score().equals(fit.adapt(tasks).score())


def test_a_stream_is_saved_without_data_anyhow(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(1, 2))
    episodes = vm.episodes(torch.randn(40, 1), torch.arange(40) // 4, 2, 1, 2)
    model = vm.TaskModel(net, vm.likelihoods.Categorical(2), PRIOR)
    fit = vm.fit(model, episodes, MAML, 2, adam, batch_size=2, progress=False)
    for data in (True, False):
        assert repr(saved(fit, tmp_path, data)) == repr(fit)
    with pytest.raises(TypeError, match="data must be True or False"):
        fit.save(tmp_path / "fit.vm", data="no")  # type: ignore[arg-type]
