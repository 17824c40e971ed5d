"""A density with a kink has no curvature that a second derivative sees: found, descended by Adam,
refused where it cannot be.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import varmeta as vm
from varmeta.models.kinks import kinked


def line(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    return pyro.sample(
        "y", dist.Laplace(params["a"] + params["b"] * x, params["log_b"].exp()), obs=y
    )


def tasks() -> vm.TaskSet:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = []
    for _ in range(10):
        x, size = draw(8), torch.rand(8, generator=generator, dtype=torch.float64).log()
        noise = 0.1 * torch.sign(draw(8)) * size
        found.append(vm.Task((x, 1.0 + 0.5 * draw(1) + (2.0 + 0.5 * draw(1)) * x + noise)))
    return vm.TaskSet(found)


def model() -> vm.TaskModel:
    prior = vm.GaussianPrior(learn_precision="per_parameter")
    return vm.TaskModel.from_pyro(line, {"a": (), "b": (), "log_b": ()}, prior, shared=["log_b"])


@pytest.mark.parametrize(
    ("density", "kink"),
    [
        (dist.Laplace, True),
        (lambda m, s: dist.AsymmetricLaplace(m, s, torch.tensor(2.0)), True),
        (lambda m, s: dist.Laplace(m.unsqueeze(-1), s.unsqueeze(-1)).to_event(1), True),
        (dist.Normal, False),
        (dist.Cauchy, False),
        (lambda m, s: dist.StudentT(3.0, m, s), False),
        (dist.Gumbel, False),
        (lambda m, s: dist.SoftLaplace(m, s), False),
        (lambda m, s: dist.LogNormal(m, s), False),
        (lambda m, s: dist.Poisson(s.expand_as(m)), False),
    ],
)
def test_which_densities_have_one(density: object, kink: bool) -> None:
    def program(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
        fn = density(params["a"] + x, torch.tensor(0.3, dtype=torch.float64))  # type: ignore[operator]
        return pyro.sample("y", fn, obs=y.unsqueeze(-1) if y is not None and fn.event_shape else y)

    one = vm.TaskModel.from_pyro(program, {"a": ()})
    data = vm.TaskSet(
        [
            vm.Task(
                (torch.linspace(0, 1, 5, dtype=torch.float64), torch.ones(5, dtype=torch.float64))
            )
        ]
    )
    found = kinked(one, data.batch(), one.init(torch.zeros((), dtype=torch.float64)))
    assert (found is not None) == kink


@pytest.mark.parametrize("guide", ["normal", "multivariate_normal"])
def test_the_default_descends_where_newton_stands_still(guide: str) -> None:
    """Newton's method ended 80 nats above this, at a noise scale of 0.86; the noise has 0.1."""
    fit = vm.fit(model(), tasks(), vm.Joint(guide), num_steps=1000, compile=False)
    assert fit.loss < 2.0
    assert abs(float(fit.eta["log_b"].exp()) - 0.1) < 0.02
    again = fit.adapt(tasks()[:2])  # by the same steps, not by Newton's
    assert torch.allclose(again.mean["b"], fit.posterior().mean["b"][:2], atol=0.03)


@pytest.mark.parametrize(
    "strategy", [vm.Implicit("laplace"), vm.Implicit("normal"), vm.Implicit("delta")]
)
def test_what_rests_on_the_curvature_is_refused(strategy: vm.Implicit) -> None:
    learned = (
        model()
        if strategy.guide != "delta"
        else vm.TaskModel.from_pyro(line, {"a": (), "b": (), "log_b": ()}, shared=["log_b"])
    )
    with pytest.raises(ValueError, match=r"Laplace, has a kink.*vm\.Joint\('normal'\)"):
        vm.fit(learned, tasks(), strategy)


def test_the_posterior_of_the_prior_is_refused() -> None:
    with pytest.raises(ValueError, match="Laplace, has its own in a kink"):
        vm.fit(model(), tasks(), hyperguide="multivariate_normal")
