"""Meta-gradients against central differences of the problem solved anew: the claim that the package
rests on.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.cases import (
    GUIDES,
    MODELS,
    OUTERS,
    large_model,
    linear_model,
    net_model,
    ragged_tasks,
    seeded,
)
from varmeta.fitting import chunks
from varmeta.numerics.adjoint import ImplicitAdjoint
from varmeta.numerics.minimize import minimize
from varmeta.numerics.tree import Tree
from varmeta.strategies.problem import Problem

# A query loss is first order in the error of phi, and a difference quotient divides that error by
# STEP.
TIGHT = {"tolerance": 1e-13, "linear_solver": vm.CG(rtol=1e-13)}
STEP = 1e-4


def strategies(guide: Any, outer: str, lr: float = 0.02) -> dict[str, vm.Implicit | vm.Unrolled]:
    return {
        "implicit": vm.Implicit(
            guide, outer, minimizer=vm.NewtonCG(), on_unconverged="ignore", **TIGHT
        ),
        "unrolled": vm.Unrolled(guide, outer, inner_steps=4, minimizer=vm.GradientDescent(lr)),
    }


Minima = dict[tuple[str, float], Tree]


@pytest.fixture(scope="module")
def minima() -> defaultdict[tuple[str, ...], Minima]:
    """The minima of a case, by direction and step; the outer objectives share them, since they all
    have the same inner one.
    """
    return defaultdict(dict)


def directional_errors(
    model: vm.TaskModel,
    tasks: vm.TaskSet,
    strategy: vm.Implicit | vm.Unrolled,
    directions: dict[str, dict[str, Tensor]],
    minima: Minima | None = None,
    warm: bool = True,
) -> dict[str, float]:
    """|analytic - central difference| / |central difference| along each of several directions of
    eta.

    minima: those of this model, guide and these tasks that are known already; new ones are added.
    warm: solve from the minimum at `here`, a step or two away.  Not with many weights: Newton's
        last step overshoots the tolerance by far, a truncated one does not.
    """
    start = model.init(torch.zeros((), dtype=torch.float64))
    problem, batch = strategy.problem(model, tasks, 0), tasks.batch()
    known = {} if minima is None else minima

    def value(part: str, step: float) -> float:
        way = directions.get(part, {})
        eta = {name: x + step * way.get(name, torch.zeros_like(x)) for name, x in start.items()}
        if isinstance(strategy, vm.Unrolled):
            return chunks.value(strategy, problem, batch, eta, strategy.init(problem, batch, eta))
        if (part, step) not in known:
            inner = problem.losses("inner", batch, 0)
            phi = (
                known["here", 0.0] if warm and ("here", 0.0) in known else problem.start(batch, eta)
            )
            found = minimize(
                lambda x: inner(x, eta), phi, strategy.rule, tolerance=strategy.tolerance
            )
            known[part, step] = found.value
        losses = problem.losses(strategy.outer, batch, 0)(known[part, step], eta)
        return float(losses.sum() + model.penalty(eta))

    result = vm.meta_gradient(model, tasks, strategy)
    assert result.value == pytest.approx(value("here", 0.0), rel=1e-10, abs=1e-10)
    errors = {}
    for part, direction in directions.items():
        # fourth-order differences: the plain quotient's own error would reach 1e-6 on the curved
        # directions
        near, far = (value(part, k * STEP) - value(part, -k * STEP) for k in (1, 2))
        numeric = (8 * near - far) / (12 * STEP)
        analytic = sum(float((result.grads[name] * d).sum()) for name, d in direction.items())
        errors[part] = abs(analytic - numeric) / max(abs(numeric), 1e-2)
    return errors


def directions(model: vm.TaskModel, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """theta0 at random; the precision alone; the noise scale alone."""
    generator = torch.Generator().manual_seed(seed)
    start = model.init(torch.zeros((), dtype=torch.float64))
    own = {
        n: torch.randn(x.shape, generator=generator, dtype=x.dtype)
        for n, x in start.items()
        if n in model.weights.names
    }
    out = {"theta0": own}
    for name in ("log_precision", "log_scale", "log_sd", "log_concentration", "log_gaps"):
        if name in start:
            out[name] = {name: torch.ones_like(start[name])}
    return out


# with one or two weights the structured guides are those that stand above
CASES = [
    (name, guide) for name in MODELS for guide in GUIDES if name == "net" or isinstance(guide, str)
]


@pytest.mark.parametrize("outer", OUTERS)
@pytest.mark.parametrize(("name", "guide"), CASES, ids=str)
@pytest.mark.parametrize("adjoint", ["implicit", "unrolled"])
def test_equals_central_differences(
    adjoint: str, name: str, guide: Any, outer: str, minima: dict[tuple[str, ...], Minima]
) -> None:
    model = MODELS[name](vm.GaussianPrior(3.0, "shared"))
    strategy = strategies(guide, outer)[adjoint]
    errors = directional_errors(
        model, ragged_tasks(3), strategy, directions(model), minima[name, str(guide)]
    )
    assert max(errors.values()) <= 1e-6, errors


def test_equals_central_differences_under_three_correlated_directions() -> None:
    """A guide of rank 3 has several minima within 1e-4 nats here, so the problem is solved anew
    from the one at hand.
    """
    tasks, model = ragged_tasks(3), MODELS["net"](vm.GaussianPrior(3.0, "shared"))
    strategy = strategies("low_rank", "elbo")["implicit"]
    problem, batch = strategy.problem(model, tasks, 0), tasks.batch()
    start = model.init(torch.zeros((), dtype=torch.float64))
    phi = strategy.adapt(problem, batch, start).value
    assert "factor" in phi
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    inner = problem.losses("inner", batch, 0)
    goals = {"elbo": inner} | {
        outer: problem.losses(outer, batch, 0) for outer in ("query", "query_predictive")
    }
    grads = {}
    for outer, goal in goals.items():
        losses, _ = ImplicitAdjoint()(inner, goal, phi, leaves)
        grads[outer] = dict(
            zip(leaves, torch.autograd.grad(losses.sum(), list(leaves.values())), strict=True)
        )

    def values(step: float, direction: dict[str, Tensor]) -> Tensor:
        eta = {
            name: x + step * direction.get(name, torch.zeros_like(x)) for name, x in start.items()
        }
        found = minimize(lambda point: inner(point, eta), phi, vm.NewtonCG(), tolerance=1e-13)
        return torch.stack([goal(found.value, eta).sum() for goal in goals.values()])

    for part, direction in directions(model).items():
        numeric = 8 * (values(STEP, direction) - values(-STEP, direction))
        numeric = (numeric - values(2 * STEP, direction) + values(-2 * STEP, direction)) / (
            12 * STEP
        )
        for outer, difference in zip(goals, numeric.tolist(), strict=True):
            analytic = sum(float((grads[outer][name] * d).sum()) for name, d in direction.items())
            assert abs(analytic - difference) <= 1e-6 * max(abs(difference), 1e-2), (outer, part)


@pytest.mark.parametrize("outer", OUTERS)
@pytest.mark.parametrize("guide", ["delta", "normal"])
@pytest.mark.parametrize("adjoint", ["implicit", "unrolled"])
def test_equals_central_differences_with_two_thousand_weights(
    adjoint: str, guide: str, outer: str, minima: dict[tuple[str, ...], Minima]
) -> None:
    model = large_model(vm.GaussianPrior(30.0, "shared"))
    strategy = strategies(guide, outer, lr=0.005)[adjoint]
    errors = directional_errors(
        model, ragged_tasks(2), strategy, directions(model), minima["large", guide], warm=False
    )
    assert max(errors.values()) <= 1e-6, errors


@pytest.mark.parametrize("outer", OUTERS)
@pytest.mark.parametrize("adjoint", ["implicit", "unrolled"])
def test_equals_central_differences_with_a_dense_guide_over_28_weights(
    adjoint: str, outer: str, minima: dict[tuple[str, ...], Minima]
) -> None:
    """434 variational parameters per task."""
    model = net_model(vm.GaussianPrior(10.0, "shared"), width=9)
    strategy = replace(
        strategies("multivariate_normal", outer, lr=0.005)[adjoint], expectation="monte_carlo"
    )
    errors = directional_errors(
        model, ragged_tasks(2), strategy, directions(model), minima["28 weights", "dense"]
    )
    assert max(errors.values()) <= 1e-6, errors


def observed(kind: str) -> tuple[vm.TaskModel, vm.TaskSet]:
    """A small network under each likelihood, with data that suit it."""
    tasks = ragged_tasks(3)
    likelihood, of = {
        "StudentT": (vm.likelihoods.StudentT(df=5.0, scale=0.5), lambda y: y),
        "Bernoulli": (vm.likelihoods.Bernoulli(), lambda y: (y > 0.2).long()),
        "Categorical": (
            vm.likelihoods.Categorical(3),
            lambda y: (2 * y + 1).round().clamp(0, 2).long(),
        ),
        "Poisson": (vm.likelihoods.Poisson(), lambda y: (y.exp()).round().long()),
        "LogNormal": (vm.likelihoods.LogNormal(0.5), lambda y: y.exp()),
        "NegativeBinomial": (
            vm.likelihoods.NegativeBinomial(2.0),
            lambda y: y.exp().round().long(),
        ),
        "Ordinal": (vm.likelihoods.Ordinal(4), lambda y: (2 * y + 1).round().clamp(0, 3).long()),
        "Binomial": (vm.likelihoods.Binomial(5), lambda y: (2 * y + 2).round().clamp(0, 5).long()),
    }[kind]
    outputs = 3 if kind == "Categorical" else 1
    net = seeded(lambda: nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, outputs)))
    parts = [[(x, of(y)) for x, y in (task.support, task.query)] for task in tasks]  # type: ignore[misc]
    tasks = vm.TaskSet(
        [vm.Task(*part, name=task.name) for part, task in zip(parts, tasks, strict=True)]
    )
    return vm.TaskModel(net, likelihood, vm.GaussianPrior(4.0, "per_module")), tasks


@pytest.mark.parametrize(
    "kind",
    [
        "StudentT",
        "Bernoulli",
        "Categorical",
        "Poisson",
        "Binomial",
        "LogNormal",
        "NegativeBinomial",
        "Ordinal",
    ],
)
@pytest.mark.parametrize("adjoint", ["implicit", "unrolled"])
def test_equals_central_differences_under_every_likelihood(adjoint: str, kind: str) -> None:
    model, tasks = observed(kind)
    errors = directional_errors(
        model, tasks, strategies("normal", "query_elbo")[adjoint], directions(model)
    )
    assert max(errors.values()) <= 1e-6, errors


def test_equals_central_differences_through_adam() -> None:
    """Adam's first step is the sign of the gradient, so the steps are small enough to cross no
    kink.
    """
    tasks, model = ragged_tasks(3), MODELS["net"](vm.GaussianPrior(3.0, "shared"))
    strategy = vm.Unrolled("normal", "query", inner_steps=4, minimizer=vm.Adam(lr=0.02))
    small = {
        part: {name: 0.1 * value for name, value in d.items()}
        for part, d in directions(model).items()
    }
    errors = directional_errors(model, tasks, strategy, small)
    assert max(errors.values()) <= 1e-6, errors


@pytest.mark.parametrize("learn", ["per_module", "per_parameter", "full"])
@pytest.mark.parametrize("guide", GUIDES, ids=str)
def test_every_way_of_learning_the_precision(learn: str, guide: Any) -> None:
    tasks = ragged_tasks(3)
    model = MODELS["net"](vm.GaussianPrior(3.0, learn))
    start = model.init(torch.zeros((), dtype=torch.float64))
    generator = torch.Generator().manual_seed(1)
    entries = [name for name in start if name.startswith("log_precision") or name == "prior_tril"]
    direction = {
        name: torch.randn(start[name].shape, generator=generator, dtype=torch.float64)
        for name in entries
    }
    errors = directional_errors(
        model, tasks, strategies(guide, "query")["implicit"], {"precision": direction}
    )
    assert errors["precision"] <= 1e-6


def test_sixteen_steps_at_a_small_precision_are_not_certified() -> None:
    """The setting in which every peer that was run returned a wrong gradient without a word."""
    tasks = ragged_tasks(3)
    model = MODELS["net"](vm.GaussianPrior(0.1))
    short = {"inner_steps": 16, "minimizer": vm.GradientDescent(lr=0.01), "outer": "query"}
    with pytest.warns(RuntimeWarning, match="not certified for .* of 3 tasks; the worst, 'sine"):
        warned = vm.meta_gradient(model, tasks, vm.Implicit("delta", **short))
    assert warned.certificate is not None and not warned.certificate.ok
    with pytest.raises(RuntimeError, match="nats above its minimum"):
        vm.meta_gradient(model, tasks, vm.Implicit("delta", on_unconverged="raise", **short))
    true = vm.meta_gradient(model, tasks, vm.Implicit("delta", outer="query"))
    assert true.certificate is not None and true.certificate.ok
    error = sum(float((warned.grads[n] - g).square().sum()) for n, g in true.grads.items()) ** 0.5
    assert error > 0.1 * sum(float(g.square().sum()) for g in true.grads.values()) ** 0.5


def test_keys_are_the_names_users_see() -> None:
    model = MODELS["net"](vm.GaussianPrior(2.0, "per_module"))
    grads = vm.meta_gradient(model, ragged_tasks(2), vm.Implicit("delta", outer="query")).grads
    assert set(grads) == {
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
        "log_precision.0",
        "log_precision.2",
        "log_scale",
    }


def test_a_warm_linear_system_takes_fewer_products_to_the_same_gradient() -> None:
    model, tasks = large_model(vm.GaussianPrior(3.0)), ragged_tasks(3)
    batch = tasks.batch()
    eta = {n: v.requires_grad_() for n, v in model.init(batch.support.x.new_zeros(())).items()}
    found = []
    for warm in (False, True):
        strategy = vm.Implicit("delta", "query", on_unconverged="ignore", warm_start=warm)
        problem = strategy.problem(model, tasks, 0)
        state = strategy.init(problem, batch, eta)
        for _ in range(2):  # as if eta had hardly moved
            total, state, stats = strategy.loss(problem, batch, eta, state)
        gradient = torch.autograd.grad(
            total, list(eta.values()), allow_unused=True, materialize_grads=True
        )
        found.append((float(stats.evaluations), torch.cat([g.reshape(-1) for g in gradient])))
    assert found[1][0] <= 0.3 * found[0][0]
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("guide", ["delta", "normal"])
def test_a_prior_with_several_precisions_costs_no_more_than_its_units(
    guide: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inner solve and linear system of 1,761 weights are taken in the prior's sds: fewer products,
    the same gradient.
    """
    model, tasks = (
        large_model(vm.GaussianPrior({"0": 1.0, "2": 30.0, "4": 1000.0})),
        ragged_tasks(3),
    )
    batch = tasks.batch()
    eta = {n: v.requires_grad_() for n, v in model.init(batch.support.x.new_zeros(())).items()}
    strategy = vm.Implicit(guide, "query", on_unconverged="ignore")
    problem = strategy.problem(model, tasks, 0)
    found = []
    for known in (True, False):
        if not known:
            monkeypatch.setattr(Problem, "units", lambda *args: None)
        total, _, stats = strategy.loss(problem, batch, eta, strategy.init(problem, batch, eta))
        gradient = torch.autograd.grad(
            total, list(eta.values()), allow_unused=True, materialize_grads=True
        )
        found.append((float(stats.evaluations), torch.cat([g.reshape(-1) for g in gradient])))
    assert found[0][0] <= 0.6 * found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


def test_units_are_the_priors_sds_of_locations_where_a_task_has_few_rows() -> None:
    tasks = ragged_tasks(3)
    batch = tasks.batch()
    modules = {"0": 1.0, "2": 25.0, "4": 1e4}
    for guide in ("delta", "normal"):
        for prior in (vm.GaussianPrior(4.0), vm.GaussianPrior(modules)):
            model = large_model(prior)
            problem = vm.Implicit(guide).problem(model, tasks, 0)
            eta = model.init(batch.support.x.new_zeros(()))
            phi = problem.start(batch, eta)
            units = problem.units(batch, phi, eta)
            if guide == "delta" and prior.uniform:
                assert units is None
                continue
            assert units is not None and units.keys() == phi.keys()
            assert all((value == 1).all() for name, value in units.items() if name != "loc")
            parts = model.weights.unflatten(units["loc"])
            for name, part in parts.items():
                sd = 0.5 if prior.uniform else modules[name[0]] ** -0.5
                assert part.shape == (3, *model.weights.shapes[name]) and torch.allclose(
                    part, torch.full_like(part, sd)
                )
    # two weights and more rows: the data say how large changes are
    small = linear_model(vm.GaussianPrior({"weight": 4.0, "bias": 9.0}))
    problem, eta = (
        vm.Implicit("normal").problem(small, tasks, 0),
        small.init(batch.support.x.new_zeros(())),
    )
    assert problem.units(batch, problem.start(batch, eta), eta) is None


@pytest.mark.parametrize(
    ("dtype", "least", "error"), [(torch.float64, -6.0, 1e-7), (torch.float32, -2.0, 1e-4)]
)
@pytest.mark.parametrize("rows", [20, 200])
def test_precisions_far_apart_do_not_spoil_the_gradient(
    rows: int, dtype: torch.dtype, least: float, error: float
) -> None:
    """80 weights with precisions of 10^least to 10^4, beside a dense solve in float64: whether data
    or prior say more.

    Without units 20 rows give a gradient that is off by 1.9 times its size in float64, by 2e-3 in
    float32.
    """
    generator = torch.Generator().manual_seed(0)

    def part(number: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(number, 80, generator=generator, dtype=torch.float64)
        y = x @ torch.randn(80, generator=generator, dtype=torch.float64) / 9
        return x, y + 0.1 * torch.randn(number, generator=generator, dtype=torch.float64)

    tasks = vm.TaskSet([vm.Task(part(rows), part(5)) for _ in range(3)])
    prior = vm.GaussianPrior({"weight": torch.logspace(least, 4.0, 80, dtype=torch.float64)[None]})

    def gradient(dtype: torch.dtype, *solvers: Any) -> Tensor:
        net = seeded(lambda: nn.Linear(80, 1, bias=False)).to(dtype)
        model = vm.TaskModel(net, vm.likelihoods.Gaussian(scale=0.5), prior)
        strategy = vm.Implicit("delta", "query", None, *solvers, on_unconverged="ignore")
        found = vm.meta_gradient(model, tasks.to(dtype=dtype), strategy)
        return found.grads["weight"].double()

    exact = gradient(torch.float64, vm.NewtonCG(dense_size=80), vm.Direct())
    assert float((gradient(dtype) - exact).norm() / exact.norm()) < error
