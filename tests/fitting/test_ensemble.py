"""Ensembles: each member is the fit that it would be alone, and what they say is their mixture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.cases import seeded
from tests.fitting.test_validation import HELD_OUT, TRAIN
from varmeta.models.ensemble import Ensemble, starts

HEAD = vm.Joint("multivariate_normal")


def adam(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=3e-2)


def body(width: int = 8) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1)))


def model_of(net: nn.Module, **options: Any) -> vm.TaskModel:
    prior = vm.GaussianPrior(learn_precision="full", **options)
    return vm.TaskModel(net, vm.likelihoods.Gaussian(), prior, shared=["0.*"])


def members(fit: vm.Fit) -> Ensemble:
    assert fit.members is not None and fit.hyper is None
    return fit.members


def placed(start: dict[str, Tensor]) -> nn.Module:
    net = body()
    net.load_state_dict({name: start[name] for name in net.state_dict()})
    return net


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"compile": True}])
def test_each_member_is_the_fit_that_it_would_be_alone(options: dict[str, Any]) -> None:
    model = model_of(body())
    fit = vm.fit(model, TRAIN, HEAD, 30, adam, ensemble=3, seed=5, **options)
    begun = starts(model, 3, 5, TRAIN.support_rows.x.new_zeros(()))
    assert torch.equal(begun["0.weight"][0], model.start["0.weight"].double())
    assert not torch.equal(begun["0.weight"][1], begun["0.weight"][2])
    losses = []
    for k in range(3):
        own = model_of(placed({name: value[k] for name, value in begun.items()}))
        alone = vm.fit(own, TRAIN, HEAD, 30, adam, seed=5, **options)
        for name, value in alone.eta.items():
            torch.testing.assert_close(members(fit).points[name][k], value, rtol=1e-6, atol=1e-8)
        losses.append(alone.loss)
    torch.testing.assert_close(members(fit).losses.tolist(), losses, rtol=1e-8, atol=1e-8)
    best = min(range(3), key=losses.__getitem__)
    assert torch.equal(fit.eta["0.weight"], members(fit).points["0.weight"][best])
    assert fit.loss == pytest.approx(sum(losses) / 3)


def test_predictions_are_the_mixture_of_the_members() -> None:
    fit = vm.fit(model_of(body()), TRAIN, HEAD, 30, adam, ensemble=3)
    densities, means = [], []
    for k in range(3):
        net = placed({name: value[k] for name, value in members(fit).points.items()})
        alone = vm.fit(model_of(net), TRAIN, HEAD, 1, lambda p: torch.optim.SGD(p, 0.0))
        alone.run.eta = {name: value[k] for name, value in members(fit).points.items()}
        found = alone.adapt(HELD_OUT)
        task = HELD_OUT[0]
        assert task.query is not None
        y = task.query[1]
        mean = found.predict([task.query[0] for task in HELD_OUT]).mean[0]
        sd = found.predict([task.query[0] for task in HELD_OUT]).sd[0]
        means.append(mean)
        densities.append(torch.distributions.Normal(mean, sd).log_prob(y))
    mixture = fit.adapt(HELD_OUT)
    predicted = mixture.predict([task.query[0] for task in HELD_OUT])
    torch.testing.assert_close(predicted.mean[0], torch.stack(means).mean(0))
    want = torch.stack(densities).exp().mean(0).log().mean()
    table = mixture.score()
    assert table.loc[HELD_OUT[0].name, "log_density"] == pytest.approx(float(want))
    assert table.attrs["log_density_se"]["all"] == 0.0  # its members are no draws of something


def test_a_fit_of_members_says_what_it_is_and_comes_back(tmp_path: Path) -> None:
    fit = vm.fit(model_of(body()), TRAIN, HEAD, 20, adam, ensemble=4)
    assert "mean of 4 members" in str(fit) and "the prior of the best of 4 members" in str(fit)
    assert fit.standard_errors is None and fit.log_likelihood is None
    fit.save(tmp_path / "fit.pt")
    back = vm.load(tmp_path / "fit.pt", model_of(body()))
    assert torch.equal(members(back).points["0.weight"], members(fit).points["0.weight"])
    here, there = fit.adapt(HELD_OUT).score(), back.adapt(HELD_OUT).score()
    assert here.equals(there)


def test_it_goes_on_as_if_it_had_never_stopped() -> None:
    options: dict[str, Any] = {"schedule": "constant", "ensemble": 2}
    half = vm.fit(model_of(body()), TRAIN, HEAD, 10, adam, **options)
    on = vm.fit(model_of(body()), TRAIN, HEAD, 20, adam, resume=half, **options)
    whole = vm.fit(model_of(body()), TRAIN, HEAD, 20, adam, **options)
    for name, value in members(whole).points.items():
        torch.testing.assert_close(members(on).points[name], value, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="resume is a fit with ensemble=2, not 3"):
        vm.fit(model_of(body()), TRAIN, HEAD, 20, adam, resume=half, ensemble=3)
    with pytest.raises(ValueError, match="resume is a fit with ensemble=2, not None"):
        vm.fit(model_of(body()), TRAIN, HEAD, 20, adam, resume=half)


def test_the_mixture_is_what_validation_judges() -> None:
    watch = vm.Validation(HELD_OUT, every=10, patience=None)
    fit = vm.fit(
        model_of(body()), TRAIN, HEAD, 100, adam, ensemble=3, validate=watch, schedule="constant"
    )
    score = fit.adapt(HELD_OUT).score().loc["all", "log_density"]
    assert fit.history["validation"].max() == pytest.approx(score, rel=1e-12)


def test_theta0_that_the_prior_places_is_not_drawn() -> None:
    model = model_of(body(), loc={"2.bias": 3.0})
    begun = starts(model, 2, 0, torch.zeros((), dtype=torch.float64))
    assert begun["2.bias"].tolist() == [[3.0], [3.0]]
    assert not torch.equal(begun["2.weight"][0], begun["2.weight"][1])


def test_the_global_random_state_stays() -> None:
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    starts(model_of(body()), 3, 0, torch.zeros(()))
    assert torch.equal(torch.rand(3), want)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.scale * x))


def test_what_it_does_not_serve_is_refused() -> None:
    model = vm.TaskModel(Own(), vm.likelihoods.Gaussian(), vm.GaussianPrior(1.0), shared=["scale"])
    strategy = vm.Joint("multivariate_normal")
    if strategy.traits(strategy.problem(model, TRAIN, 0)).closed_form:
        with pytest.raises(ValueError, match=r"reset_parameters\(\)"):
            vm.fit(model, TRAIN, strategy, 5, ensemble=2)
    whole = vm.TaskModel(body(), vm.likelihoods.Gaussian(), vm.GaussianPrior(1.0))
    with pytest.raises(ValueError, match="ensemble= fits networks whose last layer"):
        vm.fit(whole, TRAIN, vm.Joint("normal"), 5, ensemble=2)
    line = vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian(), vm.GaussianPrior(1.0))
    with pytest.raises((ValueError, TypeError), match=r"ensemble|reset_parameters"):
        vm.fit(line, TRAIN, HEAD, 5, ensemble=2)
    with pytest.raises(ValueError, match="ensemble"):
        vm.fit(model_of(body()), TRAIN, HEAD, 5, ensemble=1)


def test_float32_data_are_served() -> None:
    """What is worked out in float64 at many eta ran the float32 body on float64 parameters."""
    watch = vm.Validation(HELD_OUT.to(torch.float32), every=10, calibrate=True)
    train = TRAIN.to(torch.float32)
    narrow = vm.fit(model_of(body()), train, HEAD, 20, adam, ensemble=2, validate=watch)
    wide = vm.fit(
        model_of(body()), TRAIN, HEAD, 20, adam, ensemble=2,
        validate=vm.Validation(HELD_OUT, every=10, calibrate=True),
    )  # fmt: skip
    assert members(narrow).points["0.weight"].dtype == torch.float32
    assert narrow.run.step == wide.run.step
    one, other = (f.adapt(HELD_OUT).score().loc["all"] for f in (narrow, wide))
    assert one["log_density"] == pytest.approx(other["log_density"], abs=1e-2)
    assert narrow.posterior().score(TRAIN).notna().to_numpy().all()


def test_lbfgs_steps_all_members() -> None:
    """It asks for gradients in one piece of memory, which those of several members are not."""

    def lbfgs(params: Iterable[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(params, line_search_fn="strong_wolfe")

    begun = vm.fit(model_of(body()), TRAIN, HEAD, 1, adam, ensemble=2)
    fit = vm.fit(model_of(body()), TRAIN, HEAD, 3, lbfgs, ensemble=2)
    assert bool((members(fit).losses < members(begun).losses).all())
