"""Learning rates of inner steps by weight: fixed ones, and those that are learned with eta."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.cases import STRUCTURED, adam, linear_model, net_model, ragged_tasks, seeded
from varmeta.numerics.learning_rates import Per

START = 0.02
PRIOR = vm.GaussianPrior(3.0)
Eta = dict[str, Tensor]


def learned(per: Per = "layer", per_step: bool = False, **more: Any) -> vm.GradientDescent:
    return vm.GradientDescent(vm.LearnedRates(START, per, per_step), **more)


def moved(model: vm.TaskModel, tasks: vm.TaskSet, strategy: vm.Strategy) -> Eta:
    """eta with unequal rates, and away from where the model starts."""
    found = vm.meta_gradient(model, tasks, strategy).grads
    begin = model.init(tasks.batch().support.x.new_zeros(()))
    generator = torch.Generator().manual_seed(1)
    draw = {
        name: 0.3 * torch.randn(g.shape, generator=generator, dtype=torch.float64)
        for name, g in found.items()
    }
    return {
        name: (begin[name] if name in begin else math.log(START)) + by for name, by in draw.items()
    }


def agrees_with_differences(
    model: vm.TaskModel, tasks: vm.TaskSet, strategy: vm.Strategy, only: str = "inner_lr"
) -> None:
    """Each entry of the gradient in the rates, to 1e-6 of the largest."""
    eta = moved(model, tasks, strategy)
    found = vm.meta_gradient(model, tasks, strategy, eta=eta).grads
    step, compared = 1e-4, 0

    def value(name: str, place: int, by: float) -> float:
        at = eta[name].clone()
        at.reshape(-1)[place] += by
        return vm.meta_gradient(model, tasks, strategy, eta=eta | {name: at}).value

    for name in (name for name in eta if name.startswith(only)):
        for place in range(min(3, eta[name].numel())):
            # five points: what is left is of the fourth power of the step
            near = value(name, place, step) - value(name, place, -step)
            far = value(name, place, 2 * step) - value(name, place, -2 * step)
            expected = (8 * near - far) / (12 * step)
            scale = max(float(found[name].abs().max()), 1e-3)
            assert float(found[name].reshape(-1)[place]) == pytest.approx(
                expected, abs=1e-6 * scale
            )
            compared += 1
    assert compared


@pytest.mark.parametrize("per", ["weight", "layer", "model"])
@pytest.mark.parametrize("per_step", [False, True])
def test_the_gradient_of_learned_rates_is_that_of_differences(per: Per, per_step: bool) -> None:
    strategy = vm.Unrolled("delta", "query", 3, learned(per, per_step))
    agrees_with_differences(net_model(PRIOR), ragged_tasks(), strategy)


DENSE = vm.GaussianPrior(learn_precision="full")
CASES: dict[str, tuple[vm.TaskModel, vm.Strategy]] = {
    "momentum": (
        net_model(PRIOR),
        vm.Unrolled("delta", "query", 3, learned("weight", True, momentum=0.6)),
    ),
    "clip": (net_model(PRIOR), vm.Unrolled("delta", "query", 3, learned("weight", clip=4.0))),
    "per point": (
        net_model(PRIOR),
        vm.Unrolled("delta", "query", 3, learned("layer", True, per_point=True)),
    ),
    "normal": (net_model(PRIOR), vm.Unrolled("normal", "query", 3, learned("weight"))),
    "dense guide": (
        linear_model(DENSE),
        vm.Unrolled("multivariate_normal", "query_elbo", 3, learned("weight", True)),
    ),
    "low rank": (
        net_model(PRIOR),
        vm.Unrolled(vm.guides.LowRank(rank=1), "query_elbo", 2, learned("weight")),
    ),
    "structured": (net_model(PRIOR), vm.Unrolled(STRUCTURED, "elbo", 2, learned("layer"))),
    "shared": (
        vm.TaskModel(
            seeded(lambda: nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))),
            vm.likelihoods.Gaussian(0.7),
            PRIOR,
            shared=["0.*"],
        ),
        vm.Unrolled("delta", "query", 3, learned("weight", True)),
    ),
    "held theta0": (
        net_model(vm.GaussianPrior(3.0, learn_loc=["0.*"])),
        vm.Unrolled("delta", "query", 2, learned("weight")),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rates_are_learned_in_every_setting(case: str) -> None:
    agrees_with_differences(CASES[case][0], ragged_tasks(), CASES[case][1])


def test_covariates_move_where_the_steps_start() -> None:
    tasks = vm.TaskSet(
        [
            vm.Task(task.support, task.query, task.name, {"size": 0.3 * index})
            for index, task in enumerate(ragged_tasks())
        ]
    )
    model = linear_model(vm.GaussianPrior(3.0, covariates={"weight": ["size"]}))
    strategy = vm.Unrolled("delta", "query", 3, learned("layer", True))
    agrees_with_differences(model, tasks, strategy, only="")


def by_hand(
    model: vm.TaskModel,
    tasks: vm.TaskSet,
    rate: Callable[[int], Tensor],
    steps: int,
    first_order: bool = False,
) -> Tensor:
    """The query loss of a line after K steps from theta0, task by task, from nothing but torch."""
    assert model.net is not None
    theta0 = torch.cat([value.detach().reshape(-1) for value in model.net.parameters()])
    scale = 0.7

    def nll(theta: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
        x, y = data
        residual = (y - x[:, 0] * theta[0] - theta[1]) / scale
        return 0.5 * residual.square().sum() + len(y) * math.log(scale * math.sqrt(2 * math.pi))

    total = torch.zeros((), dtype=torch.float64)
    for task in tasks:
        assert task.support is not None and task.query is not None
        theta = theta0.clone().requires_grad_()
        for step in range(steps):
            at = theta.detach().requires_grad_() if first_order else theta
            loss = nll(at, task.support) + 1.5 * (at - theta0).square().sum()
            (gradient,) = torch.autograd.grad(loss, at, create_graph=not first_order)
            theta = theta - rate(step) * gradient
        total = total + nll(theta, task.query)
    return total


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("kind", [vm.Unrolled, vm.FirstOrder])
def test_meta_sgd_is_the_loop_by_hand(kind: Any, per_step: bool) -> None:
    """First-order Meta-SGD: d phi_K / d rate = -gradient, that of each step held fixed."""
    model, tasks, steps = linear_model(PRIOR), ragged_tasks(), 3
    strategy = kind("delta", "query", steps, learned("weight", per_step, per_point=False))
    begin = model.init(tasks.batch().support.x.new_zeros(()))
    shape = (steps, 2) if per_step else (2,)
    logs = math.log(START) + 0.3 * torch.arange(math.prod(shape)).reshape(shape).double()
    logs.requires_grad_()

    def rate(step: int) -> Tensor:
        return (logs[step] if per_step else logs).exp()

    value = by_hand(model, tasks, rate, steps, first_order=kind is vm.FirstOrder)
    (expected,) = torch.autograd.grad(value, logs)
    eta = begin | {
        "inner_lr.weight": logs.detach()[..., 0].reshape(*shape[:-1], 1, 1),
        "inner_lr.bias": logs.detach()[..., 1].reshape(*shape[:-1], 1),
    }
    found = vm.meta_gradient(model, tasks, strategy, eta=eta)
    assert found.value == pytest.approx(float(value.detach()), rel=1e-12)
    grads = torch.cat(
        [found.grads[f"inner_lr.{name}"].reshape(*shape[:-1], 1) for name in ("weight", "bias")], -1
    )
    torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "lr", [{"we*": 0.05, "*": 0.02}, torch.tensor([0.05, 0.02], dtype=torch.float64)]
)
@pytest.mark.parametrize("kind", [vm.Unrolled, vm.FirstOrder, vm.Implicit])
def test_fixed_rates_by_weight_are_the_loop_by_hand(lr: Any, kind: Any) -> None:
    model, tasks = linear_model(PRIOR), ragged_tasks()
    options = {"on_unconverged": "ignore"} if kind is vm.Implicit else {}
    strategy = kind("delta", "query", 4, vm.GradientDescent(lr), **options)
    rates = torch.tensor([0.05, 0.02], dtype=torch.float64)
    value = by_hand(model, tasks, lambda _: rates, 4).detach()
    found = vm.meta_gradient(model, tasks, strategy).value
    assert found == pytest.approx(float(value), rel=1e-12)


def test_a_tensor_of_one_number_is_that_number() -> None:
    assert vm.GradientDescent(torch.tensor(0.25)) == vm.GradientDescent(0.25)


def test_the_first_pattern_that_matches_counts() -> None:
    rule = vm.GradientDescent({"0.weight": 0.5, "0.*": 0.2, "*": 0.1})
    model, tasks = net_model(PRIOR), ragged_tasks(2)
    strategy = vm.Unrolled("delta", "query", 1, rule)
    batch = tasks.batch()
    eta = model.init(batch.support.x.new_zeros(()))
    problem = strategy.problem(model, tasks, 0)
    rates = problem.pace(batch, rule, eta, problem.start(batch, eta)).rates
    assert rates is not None
    named = model.weights.unflatten(rates["loc"])
    found = {name: set(value.reshape(-1).tolist()) for name, value in named.items()}
    assert found == {"0.weight": {0.5}, "0.bias": {0.2}, "2.weight": {0.1}, "2.bias": {0.1}}


@pytest.mark.parametrize(
    "rule",
    [
        learned("weight", True, momentum=0.5, clip=6.0),
        vm.GradientDescent({"w*": 0.03, "*": 0.02}, per_point=True),
    ],
    ids=["learned", "fixed"],
)
def test_chunks_of_tasks_and_graphs_give_the_same_gradient(rule: vm.GradientDescent) -> None:
    model, tasks = linear_model(PRIOR), ragged_tasks(6)
    strategy = vm.Unrolled("delta", "query", 2, rule)
    eta = moved(model, tasks, strategy)
    plain, chunks, compiled = (
        vm.meta_gradient(model, tasks, strategy, eta=eta, **options)  # type: ignore[arg-type]
        for options in ({"compile": False}, {"task_chunk_size": 2}, {"compile": True})
    )
    for other in (chunks, compiled):
        for name, g in plain.grads.items():
            torch.testing.assert_close(other.grads[name], g, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", [vm.Unrolled, vm.FirstOrder])
def test_many_steps_in_compiled_pieces_give_the_same_gradient(kind: Any) -> None:
    """Beyond one graph's steps the body of the loop is a graph, of which no derivative passes."""
    model, tasks = linear_model(PRIOR), ragged_tasks(3)
    strategy = kind("delta", "query", 60, vm.GradientDescent(vm.LearnedRates(1e-3)))
    plain, compiled = (
        vm.meta_gradient(model, tasks, strategy, compile=how).grads for how in (False, True)
    )
    for name, g in plain.items():
        torch.testing.assert_close(compiled[name], g, rtol=1e-9, atol=1e-10)
    assert float(plain["inner_lr.weight"].abs()) > 1e-3


def test_a_fit_in_float32_learns_its_rates_is_saved_and_goes_on(tmp_path: Path) -> None:
    tasks, model = ragged_tasks(6).to(dtype=torch.float32), net_model(PRIOR)
    strategy = vm.Unrolled("delta", "query", 2, learned("layer", True))
    options: dict[str, Any] = {"schedule": "constant", "batch_size": 4}
    half = vm.fit(model, tasks, strategy, 5, adam, **options)
    rates = half.eta["inner_lr.2"]
    assert rates.dtype == torch.float32 and rates.shape == (2,)
    assert bool((rates.exp() - START).abs().gt(1e-4).all())
    half.save(tmp_path / "fit.vm")
    read = vm.load(tmp_path / "fit.vm", model)
    assert read.strategy == strategy
    on = vm.fit(model, tasks, num_steps=9, optimizer=adam, resume=read, **options)
    whole = vm.fit(model, tasks, strategy, 9, adam, **options)
    for name, value in whole.eta.items():
        assert torch.equal(on.eta[name], value)
    line = str(on).splitlines()[-1]
    assert "from the first step to the last" in str(on)
    assert line.split() == ["2", *(f"{float(x):.4g}" for x in on.eta["inner_lr.2"].exp())]
    # a posterior depends on the model's part of eta alone
    assert set(on.adapt(tasks).q.eta) == set(model.init(rates))  # type: ignore[attr-defined]


@pytest.mark.parametrize("per", ["weight", "model"])
def test_other_rates_are_printed_too(per: Per) -> None:
    fit = vm.fit(net_model(PRIOR), ragged_tasks(3), vm.Unrolled(minimizer=learned(per)), 1, adam)
    lines = str(fit).splitlines()
    at = lines.index("learned rates of the inner steps")
    if per == "model":
        assert lines[at + 1 :] == [f"all {float(fit.eta['inner_lr'].exp()):.4g}"]
    else:
        assert lines[at + 1].startswith("0.weight 0.0") and "median" in lines[at + 1]
        assert len(lines[at + 1 :]) == 4


def test_adaptation_takes_the_learned_rates() -> None:
    """The sharpest that there is: with rates near 0 nobody leaves theta0."""
    model, tasks = net_model(PRIOR), ragged_tasks(3)
    fit = vm.fit(model, tasks, vm.Unrolled("delta", "query", 3, learned()), 2, adam)
    theta0 = model.weights.flatten(fit.eta)
    far = fit.adapt(tasks).sample(1)["0.weight"]
    fit.run.eta |= {name: torch.tensor(-60.0) for name in ("inner_lr.0", "inner_lr.2")}
    still = fit.adapt(tasks).sample(1)["0.weight"]
    torch.testing.assert_close(
        still.reshape(3, -1), theta0[:3].expand(3, 3), rtol=1e-12, atol=1e-12
    )
    assert not torch.allclose(far, still)


def test_a_regression_by_quasi_newton_steps_learns_its_rates() -> None:
    """The pooled start and L-BFGS, which `fit` takes by itself, know rates beside theta0."""
    tasks = vm.datasets.lines(8, num_support=5, num_query=5, noise=0.3)
    noise = vm.likelihoods.Gaussian(0.3, learn_scale=False)
    model = vm.TaskModel(nn.Linear(1, 1), noise, vm.GaussianPrior())
    own = vm.fit(model, tasks, vm.Unrolled("delta", "query", 2, learned("weight")))
    fixed = vm.fit(model, tasks, vm.Unrolled("delta", "query", 2, vm.GradientDescent(START)))
    assert own.converged and own.loss < fixed.loss - 0.1


def test_the_start_of_rates_that_pooled_methods_do_not_have_compares() -> None:
    tasks = vm.datasets.lines(6, num_support=4, num_query=4, seed=1)
    model = vm.TaskModel(nn.Linear(1, 1), vm.likelihoods.Gaussian(), vm.GaussianPrior())
    methods: dict[str, vm.Strategy] = {
        "learned": vm.Unrolled("delta", "query", 2, learned()),
        "fixed": vm.Unrolled("delta", "query", 2, vm.GradientDescent(START)),
    }
    report = vm.compare(methods, model, tasks, tasks, seeds=1, budget=60)
    assert not report.runs["failed"].any()
    assert "inner_lr.bias" in report.fits["learned", 0].eta


REFUSED: dict[str, tuple[vm.Strategy, str]] = {
    "implicit": (
        vm.Implicit("delta", "query", 5, learned()),
        "Implicit cannot learn its rates: .*vm.Unrolled takes",
    ),
    "reptile": (vm.Reptile("delta", minimizer=learned()), "Reptile cannot learn its rates"),
    "joint": (vm.Joint("normal", minimizer=learned()), "Joint cannot learn its rates"),
    "reinit": (vm.Reinit("normal", minimizer=learned()), "Reinit cannot learn its rates"),
    "stochastic": (
        vm.Stochastic(vm.Unrolled(minimizer=learned()), vm.StochasticAlg(temperature=1.0)),
        "a StochasticAlg cannot learn its rates",
    ),
    "no such weight": (
        vm.Unrolled(minimizer=vm.GradientDescent({"head.*": 0.1, "*": 0.01})),
        r"lr names 'head.\*', which matches none of the weights .*'0.weight'",
    ),
    "a weight without": (
        vm.Unrolled(minimizer=vm.GradientDescent({"0.*": 0.1})),
        r"lr has no rate for the weight '2.weight': add '\*'",
    ),
    "too few": (
        vm.FirstOrder(minimizer=vm.GradientDescent(torch.ones(3))),
        "lr has 3 rates, but a task has 10 weights",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rates_that_do_not_go_together_are_refused_before_any_work(case: str) -> None:
    strategy, says = REFUSED[case]
    with pytest.raises(ValueError, match=says):
        vm.fit(net_model(PRIOR), ragged_tasks(3), strategy, 1, adam)
    with pytest.raises(ValueError, match=says):
        vm.meta_gradient(net_model(PRIOR), ragged_tasks(3), strategy)


def test_a_parameter_that_has_the_name_of_a_rate_is_refused() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner_lr = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.inner_lr

    model = vm.TaskModel(Named(), vm.likelihoods.Gaussian(), PRIOR)
    strategy = vm.Unrolled(minimizer=learned("model"))
    with pytest.raises(ValueError, match="'inner_lr' is one that varmeta uses itself"):
        vm.meta_gradient(model, ragged_tasks(2), strategy)
    vm.meta_gradient(model, ragged_tasks(2), vm.Unrolled())


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (
            lambda: vm.GradientDescent(torch.tensor(0.1, requires_grad=True)),
            TypeError,
            "lr='learned'",
        ),
        (lambda: vm.GradientDescent(torch.ones(2, 2)), ValueError, r"not of shape \(2, 2\)"),
        (lambda: vm.GradientDescent("fast"), ValueError, "or 'learned', not 'fast'"),
        (lambda: vm.GradientDescent({}), ValueError, "lr has no rate"),
        (lambda: vm.GradientDescent({"*": -0.1}), ValueError, r"lr\['\*'\] must be a positive"),
        (lambda: vm.GradientDescent({1: 0.1}), TypeError, "lr by name takes patterns"),
        (lambda: vm.GradientDescent((0.1, 0.0)), ValueError, "a rate in lr must be a positive"),
        (lambda: vm.LearnedRates(0.0), ValueError, "start must be a positive"),
        (lambda: vm.LearnedRates(torch.tensor(0.1)), TypeError, "start of LearnedRates"),
        (lambda: vm.LearnedRates(per="module"), ValueError, "per must be one of"),
        (lambda: vm.LearnedRates(per_step=3), TypeError, "per_step must be True or False"),
    ],
)
def test_what_is_no_rate_is_refused(make: Callable[[], Any], error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_a_file_is_read_with_the_rates_that_it_learned(tmp_path: Path) -> None:
    model, tasks = net_model(PRIOR), ragged_tasks(3)
    fit = vm.fit(model, tasks, vm.Unrolled(minimizer=learned("weight")), 1, adam)
    fit.save(tmp_path / "fit.vm")
    with pytest.raises(ValueError, match=r"learned .*inner_lr.0.weight.* but Unrolled"):
        vm.load(tmp_path / "fit.vm", model, vm.Unrolled(minimizer=learned("layer")))
    with pytest.raises(ValueError, match="resume is a fit by Unrolled"):
        vm.fit(model, tasks, vm.Unrolled(), 2, adam, resume=fit)
    named = vm.Unrolled(minimizer=vm.GradientDescent({"0.*": 0.1, "*": 0.01}))
    vm.fit(model, tasks, named, 1, adam).save(tmp_path / "named.vm")
    assert vm.load(tmp_path / "named.vm", model).strategy == named


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_adaptation_by_other_steps_than_the_training(steps: int) -> None:
    """Steps beyond those of the training take the rates of its last one."""
    model, tasks = linear_model(PRIOR), ragged_tasks(3)
    fit = vm.fit(model, tasks, vm.Unrolled("delta", "query", 3, learned("weight", True)), 3, adam)
    rates = torch.cat(
        [fit.eta[f"inner_lr.{n}"].reshape(3, 1) for n in ("weight", "bias")], -1
    ).exp()
    theta0, scale = model.weights.flatten(fit.eta), fit.eta["log_scale"].exp()
    found = fit.adapt(tasks, inner_steps=steps).sample(1)
    for number, task in enumerate(tasks):
        assert task.support is not None
        (x, y), theta = task.support, theta0
        for step in range(steps):
            residual = x[:, 0] * theta[0] + theta[1] - y
            slope = torch.stack([(residual * x[:, 0]).sum(), residual.sum()]) / scale**2
            theta = theta - rates[min(step, 2)] * (slope + 3.0 * (theta - theta0))
        here = torch.cat([found[n][0, number].reshape(-1) for n in ("weight", "bias")])
        torch.testing.assert_close(here, theta, rtol=1e-11, atol=1e-12)


def test_other_inner_steps_are_for_strategies_that_count_them() -> None:
    model, tasks = net_model(PRIOR), ragged_tasks(3)
    five = vm.Implicit("delta", "query", 5, vm.GradientDescent(1e-3), on_unconverged="ignore")
    fit = vm.fit(model, tasks, five, 1, adam)
    ends = [fit.adapt(tasks, inner_steps=steps).sample(1)["2.bias"] for steps in (5, 6)]
    assert torch.equal(ends[0], fit.adapt(tasks).sample(1)["2.bias"])
    assert not torch.allclose(*ends, atol=1e-6)
    with pytest.raises(ValueError, match="inner_steps must be a whole number of at least 1"):
        fit.adapt(tasks, inner_steps=0)
    for strategy in (vm.Implicit("delta", "query"), vm.Joint("normal")):
        to_tolerance = vm.Fit(model, tasks, strategy, 0, fit.run)
        with pytest.raises(ValueError, match=f"not for {type(strategy).__name__}.*leave it out"):
            to_tolerance.adapt(tasks, inner_steps=3)
