"""A saved fit knows its model: whatever a constructor takes is changed in turn, and `load` must
refuse it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.cases import adam, known, seeded
from varmeta.files.plain import difference, plain
from varmeta.files.remember import Remembers
from varmeta.likelihoods.base import Likelihood
from varmeta.results.configuration import configuration

# argument -> (the other arguments, the value that was fitted, another value)
Change = tuple[dict[str, Any], Any, Any]

LOC = torch.tensor([[0.1]], dtype=torch.float64)
PRIOR: dict[str, Change] = {
    "precision": ({}, 2.0, 3.0),
    "learn_precision": ({"precision": 2.0}, "shared", "per_module"),
    "loc": ({}, {"weight": LOC}, {"weight": 2 * LOC}),
    "covariance": ({}, torch.eye(2, dtype=torch.float64), 2 * torch.eye(2, dtype=torch.float64)),
    "hyperprior": ({"learn_precision": "shared"}, dist.Gamma(2.0, 1.0), dist.Gamma(2.0, 1.5)),
    "scale_hyperprior": ({"learn_precision": "shared"}, None, dist.HalfNormal(0.5)),
    "loc_hyperprior": ({}, {"weight": dist.Normal(0.0, 1.0)}, {"weight": dist.Normal(0.0, 2.0)}),
    "lkj": ({"learn_precision": "full"}, 1.0, 2.0),
    "covariates": ({}, {"weight": ["age"]}, {"bias": ["age"]}),
}
SCALED: dict[str, Change] = {
    "scale": ({"learn_scale": False}, 0.3, 0.4),
    "learn_scale": ({}, True, False),
    "scale_hyperprior": ({}, dist.HalfNormal(1.0), dist.HalfCauchy(1.0)),
    "per_task": ({}, False, True),
}
LIKELIHOODS: dict[str, dict[str, Change]] = {
    "Gaussian": SCALED,
    "LogNormal": SCALED,
    "StudentT": SCALED | {"df": ({}, 4.0, 5.0)},
    "Bernoulli": {},
    "Poisson": {},
    "Categorical": {"num_classes": ({}, 3, None)},
    "LeastSquaresClasses": {
        "num_classes": ({}, 3, 4),
        **{
            name: ({"num_classes": 3, **SCALED[name][0]}, *SCALED[name][1:])
            for name in SCALED
            if name != "per_task"
        },
        "temperature": ({"num_classes": 3, "learn_temperature": False}, 0.5, 0.6),
        "learn_temperature": ({"num_classes": 3}, True, False),
    },
    "Binomial": {"total_count": ({}, 5, 6)},
    "NegativeBinomial": {
        "concentration": ({"learn_concentration": False}, 1.0, 2.0),
        "learn_concentration": ({}, True, False),
    },
    "Ordinal": {"num_classes": ({}, 3, 4)},
    "Weighted": {
        "likelihood": ({}, vm.likelihoods.Gaussian(0.3), vm.likelihoods.Gaussian(0.4)),
        "precision": ({"likelihood": vm.likelihoods.Gaussian()}, False, True),
    },
}


def line(activation: Callable[[], nn.Module] = nn.Tanh, last: bool = True) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(1, 2), activation(), nn.Linear(2, 1, bias=last)))


def norm(momentum: float) -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(1, 2), nn.BatchNorm1d(2, momentum=momentum), nn.Linear(2, 1)
        )
    )


MODEL: dict[str, Change] = {
    "net": ({}, line(), line(nn.ReLU)),
    "likelihood": ({}, vm.likelihoods.Gaussian(), vm.likelihoods.StudentT()),
    "prior": ({}, None, vm.GaussianPrior(2.0)),
    "shared": ({}, ("0.*",), ("2.*",)),
    "batch_norm": ({}, "refuse", "frozen"),
}


def all_arguments(made: Any) -> set[str]:
    return set(inspect.signature(made).parameters)


def classes_of_likelihoods() -> list[str]:
    named = {name: getattr(vm.likelihoods, name) for name in vm.likelihoods.__all__}
    return [
        name
        for name, one in named.items()
        if issubclass(one, Likelihood) and not inspect.isabstract(one)
    ]


def remembered(made: Remembers, name: str) -> None:
    """An argument that has no other value in the tables above, where it belongs: at least that it
    is kept.
    """
    assert name in made.constructed_with
    assert name in configuration(made) if isinstance(made, vm.TaskModel) else name in plain(made)


@pytest.mark.parametrize("name", sorted(all_arguments(vm.GaussianPrior)))
def test_every_argument_of_the_prior_is_known_again(name: str) -> None:
    if name not in PRIOR:
        remembered(vm.GaussianPrior(), name)
        return
    others, before, after = PRIOR[name]

    def model(value: Any) -> vm.TaskModel:
        prior = vm.GaussianPrior(**others, **{name: value})
        return vm.TaskModel(seeded(lambda: nn.Linear(1, 1)), vm.likelihoods.Gaussian(), prior)

    assert (
        difference(configuration(model(before)), configuration(model(before)), model(before))
        is None
    )
    found = difference(configuration(model(before)), configuration(model(after)), model(after))
    assert found is not None and found.startswith(f"prior.{name}")


@pytest.mark.parametrize("kind", classes_of_likelihoods())
def test_every_argument_of_a_likelihood_is_known_again(kind: str) -> None:
    make, table = getattr(vm.likelihoods, kind), LIKELIHOODS[kind]
    own = all_arguments(make) if make.__init__ is not object.__init__ else set()
    for name in own:
        if name not in table:
            remembered(
                make(**{n: change[1] for n, change in table.items() if n == "num_classes"}), name
            )
            continue
        others, before, after = table[name]

        def model(value: Any, others: Any = others, name: str = name) -> vm.TaskModel:
            return vm.TaskModel(seeded(lambda: nn.Linear(1, 1)), make(**others, **{name: value}))

        assert (
            difference(configuration(model(before)), configuration(model(before)), model(before))
            is None
        )
        found = difference(configuration(model(before)), configuration(model(after)), model(after))
        assert found is not None and found.startswith(f"likelihood.{name}"), (name, found)


@pytest.mark.parametrize("name", sorted(all_arguments(vm.TaskModel)))
def test_every_argument_of_a_model_is_known_again(name: str) -> None:
    usual = {"net": line(), "likelihood": vm.likelihoods.Gaussian()}
    if name not in MODEL:
        remembered(vm.TaskModel(**usual), name)
        return
    others, before, after = MODEL[name]

    def model(value: Any) -> vm.TaskModel:
        return vm.TaskModel(**(usual | others | {name: value}))

    found = difference(configuration(model(before)), configuration(model(after)), model(after))
    assert found is not None and found.startswith(name)


def program(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    return pyro.sample("y", dist.Normal(params["a"] + params["b"] * x[..., 0], 1.0), obs=y)


@pytest.mark.parametrize("name", sorted(all_arguments(vm.TaskModel.from_pyro)))
def test_every_argument_of_a_program_is_known_again(name: str) -> None:
    changes: dict[str, Any] = {
        "program": lambda params, x, y: program(params, x, y),
        "params": {"a": (), "b": (), "c": ()},
        "prior": vm.GaussianPrior(2.0),
        "shared": ("a",),
    }
    usual = {"program": program, "params": {"a": (), "b": ()}, "prior": None, "shared": ()}
    if name not in changes:
        remembered(vm.TaskModel.from_pyro(**usual), name)
        return
    before, after = (
        vm.TaskModel.from_pyro(**each) for each in (usual, usual | {name: changes[name]})
    )
    if name == "params":  # their shapes are compared apart, where they start may differ
        assert before.weights.shapes != after.weights.shapes
        return
    found = difference(configuration(before), configuration(after), after)
    assert found is not None and found.startswith(name)


# -- the whole way, through a file -----------------------------------------------------------------


def tasks() -> vm.TaskSet:
    return vm.datasets.lines(4, num_support=5, noise=0.3)


def gaussian(prior: vm.GaussianPrior, likelihood: Likelihood | None = None) -> vm.TaskModel:
    return vm.TaskModel(nn.Linear(1, 1).double(), likelihood or vm.likelihoods.Gaussian(), prior)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            {"scale_hyperprior": dist.HalfNormal(0.1)},
            {},
            r"prior.scale_hyperprior was HalfNormal\(scale=0.1.*, but is None",
        ),
        ({}, {"lkj": 4.0}, "prior.lkj was 1.0, but is 4.0"),
        ({"lkj": 2.0}, {"lkj": 3.0}, "prior.lkj was 2.0, but is 3.0"),
    ],
)
def test_another_hyperprior_is_refused(
    before: Any, after: Any, message: str, tmp_path: Path
) -> None:
    fit = vm.fit(
        gaussian(vm.GaussianPrior(2.0, "full", **before)),
        tasks(),
        vm.Joint("multivariate_normal"),
        3,
        adam,
    )
    fit.save(tmp_path / "fit.pt")
    assert (
        vm.load(tmp_path / "fit.pt", gaussian(vm.GaussianPrior(2.0, "full", **before))).loss
        == fit.loss
    )
    with pytest.raises(ValueError, match=rf"fit.pt' is a fit of another model: {message}"):
        vm.load(tmp_path / "fit.pt", gaussian(vm.GaussianPrior(2.0, "full", **after)))


def test_another_scale_hyperprior_of_the_noise_is_refused(tmp_path: Path) -> None:
    likelihood = vm.likelihoods.Gaussian(scale_hyperprior=dist.HalfNormal(0.01))
    known(gaussian(vm.GaussianPrior(2.0), likelihood), tasks(), vm.Joint()).save(
        tmp_path / "fit.pt"
    )
    with pytest.raises(
        ValueError,
        match=r"likelihood.scale_hyperprior was HalfNormal\(scale=0.00999.*, but is None",
    ):
        vm.load(tmp_path / "fit.pt", gaussian(vm.GaussianPrior(2.0)))


def test_code_is_known_by_what_it_computes(tmp_path: Path) -> None:
    def shifted(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
        return pyro.sample("y", dist.Normal(params["a"] + params["b"] * x[..., 0], 1.1), obs=y)

    shifted.__qualname__ = program.__qualname__  # the same function, after somebody has edited it
    make = vm.TaskModel.from_pyro
    known(make(program, {"a": (), "b": ()}), tasks(), vm.Joint()).save(tmp_path / "fit.pt")
    assert vm.load(tmp_path / "fit.pt", make(program, {"a": (), "b": ()})).run.step == 1
    with pytest.raises(
        ValueError, match="of the same numbers and rows this one makes other densities"
    ):
        vm.load(tmp_path / "fit.pt", make(shifted, {"a": (), "b": ()}))


def test_where_the_weights_start_may_differ(tmp_path: Path) -> None:
    fit = vm.fit(vm.TaskModel(line(), vm.likelihoods.Gaussian()), tasks(), vm.Joint(), 3, adam)
    fit.save(tmp_path / "fit.pt")
    other = vm.TaskModel(
        line().apply(lambda m: m.reset_parameters() if isinstance(m, nn.Linear) else None),
        vm.likelihoods.Gaussian(),
    )
    assert torch.equal(vm.load(tmp_path / "fit.pt", other).eta["0.weight"], fit.eta["0.weight"])


def test_frozen_statistics_are_part_of_the_model(tmp_path: Path) -> None:
    def model(mean: float) -> vm.TaskModel:
        net = norm(0.1).eval()
        net[1].running_mean.fill_(mean)  # type: ignore[index, union-attr, operator]
        return vm.TaskModel(net, vm.likelihoods.Gaussian(), batch_norm="frozen")

    known(model(0.0), tasks(), vm.Joint()).save(tmp_path / "fit.pt")
    with pytest.raises(ValueError, match="a network with other numbers in '1.running_mean'"):
        vm.load(tmp_path / "fit.pt", model(0.5))


def test_an_argument_that_came_later_had_its_default() -> None:
    model = gaussian(vm.GaussianPrior(2.0, "full"))
    saved = configuration(model)
    del saved["prior"]["lkj"]
    assert difference(saved, configuration(model), model) is None
    other = gaussian(vm.GaussianPrior(2.0, "full", lkj=3.0))
    assert difference(saved, configuration(other), other) == "prior.lkj was 1.0, but is 3.0"
    saved["prior"]["tempered"] = 2.0
    assert (
        difference(saved, configuration(model), model) == "prior.tempered was 2.0, but is not there"
    )
