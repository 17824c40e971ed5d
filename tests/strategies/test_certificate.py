"""What the certificate says is true: bounds where f_i is convex by construction, estimates in the
energy norm elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import varmeta as vm
from varmeta.graphs import capture
from varmeta.graphs.pieces import at
from varmeta.numerics.adjoint import ImplicitAdjoint
from varmeta.numerics.linear_solve import CG
from varmeta.numerics.minimize import minimize
from varmeta.numerics.newton import NewtonCG

F64 = torch.float64
# Half of the curvatures are next to nothing, and so is the gradient along them, where nearly all is
# to be gained.
CURVATURE = torch.cat([torch.ones(20, dtype=F64), torch.full((20,), 1e-8, dtype=F64)]).unsqueeze(0)
SLOPE = torch.cat(
    [torch.full((20,), 2e-6, dtype=F64), torch.full((20,), 1e-7, dtype=F64)]
).unsqueeze(0)


def bowl(phi, eta):
    return (0.5 * CURVATURE * phi["w"].square()).sum(-1) + 0.0 * eta["a"]


def along(phi, eta):
    return (SLOPE * phi["w"]).sum(-1) + 0.0 * eta["a"]


def weakest(v):
    """v' v / 1e-8, which v' H^-1 v is nowhere above."""
    return v["w"].square().sum(-1) / 1e-8


def eta() -> dict[str, torch.Tensor]:
    return {"a": torch.zeros((), dtype=F64, requires_grad=True)}


def test_the_decrement_is_not_read_off_a_small_residual() -> None:
    """A residual of a tenth is met after one step, with 4e-11 of the 1e-5 nats."""
    phi = {"w": SLOPE / CURVATURE}
    exact = 0.5 * float((SLOPE.square() / CURVATURE).sum())
    assert exact == pytest.approx(1.000004e-5, rel=1e-6)
    _, stats = ImplicitAdjoint()(bowl, along, phi, eta())
    assert float(stats["decrement"]) == pytest.approx(exact, rel=0.1)
    assert bool(stats["decrement_bound"].isnan())
    _, stats = ImplicitAdjoint()(bowl, along, phi, eta(), ceiling=weakest)
    assert float(stats["decrement_bound"]) >= exact


def test_under_a_ceiling_the_linear_error_is_a_bound() -> None:
    """The solve ends after one step; by the curvature that it met, 1, its error would be a
    ten-thousandth of what it is.
    """
    exact = SLOPE / CURVATURE
    found = CG(rtol=0.1).solve(lambda v: {"w": CURVATURE * v["w"]}, {"w": SLOPE}).value["w"]
    true = float(
        (CURVATURE * (found - exact).square()).sum().sqrt()
        / (CURVATURE * exact.square()).sum().sqrt()
    )
    phi = {"w": torch.zeros_like(SLOPE)}
    _, guessed = ImplicitAdjoint(CG(rtol=0.1))(bowl, along, phi, eta())
    assert true > 0.99 and float(guessed["linear_error"]) < true  # an estimate, and a poor one here
    _, stats = ImplicitAdjoint(CG(rtol=0.1))(bowl, along, phi, eta(), ceiling=weakest)
    assert float(stats["linear_bound"]) >= true > float(stats["linear_error"])


def counts() -> tuple[vm.TaskModel, vm.TaskSet]:
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for k in range(5):
        x = torch.randn(12, 2, generator=generator, dtype=F64)
        y = torch.poisson((0.5 + x.sum(-1)).clamp(max=3).exp(), generator=generator)
        tasks.append(vm.Task(support=(x[:6], y[:6]), query=(x[6:], y[6:]), name=f"task {k}"))
    net = nn.Linear(2, 1).double()
    return vm.TaskModel(net, vm.likelihoods.Poisson(), vm.GaussianPrior(precision=0.5)), vm.TaskSet(
        tasks
    )


@pytest.mark.parametrize("steps", [0, 1, 2, 4, None])
def test_a_convex_task_lies_no_higher_than_the_bound(steps: int | None) -> None:
    """Poisson counts are far from quadratic, so that the decrement by the Hessian at hand falls
    short of the truth.
    """
    model, tasks = counts()
    batch = tasks.batch()
    descent = vm.GradientDescent(lr=1e-3)
    strategy = (
        vm.Implicit("delta", "query", inner_steps=steps, minimizer=descent, on_unconverged="ignore")
        if steps
        else None
    )
    strategy = vm.Implicit("delta", "query", on_unconverged="ignore") if steps is None else strategy
    if strategy is None:  # the start itself
        strategy = vm.Implicit(
            "delta",
            "query",
            inner_steps=1,
            minimizer=vm.GradientDescent(lr=1e-12),
            on_unconverged="ignore",
        )
    start = model.init(batch.support.x.new_zeros(()))
    problem = strategy.problem(model, tasks, 0)
    inner = at(problem.losses("inner", batch, 0), start)
    lowest = inner(minimize(inner, problem.start(batch, start), NewtonCG(), tolerance=1e-12).value)
    here = inner(strategy.adapt(problem, batch, start).value)
    certificate = vm.meta_gradient(model, tasks, strategy).certificate
    assert bool((certificate.decrement_bound >= here - lowest - 1e-12).all())
    assert certificate.ok == (steps is None)
    words = str(certificate)
    assert ("at most" if steps is None else "an estimated") in words and (
        "linear error at most" in words
    )


def test_elsewhere_it_is_called_an_estimate() -> None:
    tasks = vm.datasets.sinusoids(3, num_support=8, num_query=8, dtype=F64)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    gaussian = vm.likelihoods.Gaussian(0.3, learn_scale=False)
    curved = vm.meta_gradient(
        vm.TaskModel(net, gaussian, vm.GaussianPrior(10.0)), tasks, vm.Implicit("delta", "query")
    )
    assert curved.certificate.ok and bool(curved.certificate.decrement_bound.isnan().all())
    assert "an estimated" in str(curved.certificate) and "linear error about" in str(
        curved.certificate
    )
    # with the body shared, the last layer's weights enter linearly
    head = vm.TaskModel(net, gaussian, vm.GaussianPrior(10.0), shared=["0.*"])
    convex = vm.meta_gradient(head, tasks, vm.Implicit("delta", "query")).certificate
    assert convex.ok and float(convex.decrement_bound.max()) <= 1e-10
    heavy = vm.TaskModel(net, vm.likelihoods.StudentT(4.0), vm.GaussianPrior(10.0), shared=["0.*"])
    found = vm.meta_gradient(
        heavy, tasks, vm.Implicit("delta", "query", on_unconverged="ignore")
    ).certificate
    assert bool(found.decrement_bound.isnan().all())


COVARIANCE = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 4.0]], dtype=F64)
UNITS = torch.tensor([1e-5, 1.0, 1e3], dtype=F64)
PRIORS = {
    "one": (vm.GaussianPrior(precision=0.5), 2.0 * torch.eye(3, dtype=F64)),
    "diagonal": (
        vm.GaussianPrior(
            precision={"weight": UNITS[:2].pow(-2).reshape(1, 2), "bias": UNITS[2:].pow(-2)}
        ),
        UNITS.square().diag(),
    ),
    "dense": (vm.GaussianPrior(covariance=COVARIANCE), COVARIANCE),
}


@pytest.mark.parametrize(
    ("name", "compile"), [*((name, False) for name in PRIORS), ("dense", True)]
)
def test_the_bound_is_in_the_metric_of_the_prior(
    name: str, compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1/2 g' Lambda^-1 g, whichever the units: one number for all weights would be off by the
    square of their ratio.
    """
    monkeypatch.setattr(
        capture, "compile_graph", lambda graph, examples: graph
    )  # traced; the compiler has its own tests
    prior, covariance = PRIORS[name]
    _, tasks = counts()
    model = vm.TaskModel(nn.Linear(2, 1).double(), vm.likelihoods.Poisson(), prior)
    descent = vm.GradientDescent(lr=1e-20)
    strategy = vm.Implicit(
        "delta", "query", inner_steps=3, minimizer=descent, on_unconverged="ignore"
    )
    found = vm.meta_gradient(model, tasks, strategy, compile=compile).certificate
    gradient = []
    for task in tasks:  # by hand, at the start: the steps are next to nothing
        x, y = task.support
        weight, bias = model.init(x.new_zeros(())).values()
        error = (x @ weight[0] + bias).exp() - y
        gradient.append(torch.cat([error @ x, error.sum().reshape(1)]))
    g = torch.stack(gradient)
    assert torch.allclose(found.inner_gradient, g.norm(dim=-1), rtol=1e-5)
    assert torch.allclose(found.decrement_bound, 0.5 * ((g @ covariance) * g).sum(-1), rtol=1e-5)


def test_weights_in_units_apart_by_orders_are_certified() -> None:
    """Precisions of 1e-8 and 1e12: by the smallest of them the linear error was at most 8e-6, with
    nothing wrong.
    """
    generator = torch.Generator().manual_seed(1)
    units = torch.tensor([1.0, 1e6], dtype=F64)
    tasks = []
    for _ in range(6):
        x = torch.randn(20, 2, generator=generator, dtype=F64) * units
        y = (x / units).sum(-1) + torch.randn(20, generator=generator, dtype=F64)
        tasks.append(vm.Task(support=(x[:10], y[:10]), query=(x[10:], y[10:])))
    prior = vm.GaussianPrior(precision={"weight": units.square().reshape(1, 2), "bias": 1e-8})
    net, gaussian = nn.Linear(2, 1).double(), vm.likelihoods.Gaussian(1.0, learn_scale=False)
    model = vm.TaskModel(net, gaussian, prior)
    found = vm.meta_gradient(model, vm.TaskSet(tasks), vm.Implicit("delta", "query")).certificate
    assert found.ok and float(found.linear_bound.max()) < 1e-9, str(found)


def test_a_bound_that_is_far_too_large_is_no_alarm() -> None:
    """Eighty rows weigh 1e8 times what a precision of 1e-6 does, so the bound in the prior's metric
    is 1e4 times too large.
    """
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for _ in range(3):
        x = torch.randn(100, 40, generator=generator, dtype=F64)
        y = x.sum(-1) + 0.1 * torch.randn(100, generator=generator, dtype=F64)
        tasks.append(vm.Task(support=(x[:80], y[:80]), query=(x[80:], y[80:])))
    gaussian = vm.likelihoods.Gaussian(0.1, learn_scale=False)
    model = vm.TaskModel(nn.Linear(40, 1).double(), gaussian, vm.GaussianPrior(precision=1e-6))
    found = vm.meta_gradient(model, vm.TaskSet(tasks), vm.Implicit("delta", "query")).certificate
    assert float(found.linear_bound.max()) > 1e-6 > float(found.linear_error.max())
    assert found.ok and "linear error about" in str(found)


class Wrong(vm.LinearSolver):
    """Conjugate gradients whose x is changed at the end, and which tell of the x before."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.change = change

    def solve(self, matvec: Any, b: Any) -> vm.Solution:
        right = vm.CG().solve(matvec, b)
        stats = right.stats | {"curvature": torch.full_like(right.stats["curvature"], torch.inf)}
        changed = {name: self.change(value) for name, value in right.value.items()}
        return vm.Solution(changed, right.result, stats)


@pytest.mark.parametrize(
    ("change", "certified"),
    [
        (lambda x: x, True),
        (lambda x: 1.3 * x, False),
        (lambda x: 0.5 * x, False),
        (lambda x: -x, False),
        (torch.zeros_like, False),
        (lambda x: x + 0.1 * torch.cos(torch.arange(x.numel()).reshape(x.shape)).to(x), False),
        (lambda x: x.float().double(), True),  # 1e-7 off, within tolerance, and told
    ],
)
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.filterwarnings("ignore:the implicit gradient is not certified")
def test_a_solver_is_not_believed(
    change: Callable[[torch.Tensor], torch.Tensor], certified: bool, linear: bool
) -> None:
    tasks = vm.datasets.lines(6, 5, 5, noise=0.1, dtype=torch.float64)
    torch.manual_seed(0)
    hidden = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    net = vm.LinearPredictor(["x"]) if linear else hidden.double()
    model = vm.TaskModel(net, vm.likelihoods.Gaussian(), vm.GaussianPrior(5.0))
    exact, own = (
        vm.meta_gradient(model, tasks, vm.Implicit("delta", "query", linear_solver=solver))
        for solver in (vm.Direct(), Wrong(change))
    )
    assert exact.certificate.ok
    off = max(float((own.grads[name] - exact.grads[name]).abs().max()) for name in exact.grads)
    assert own.certificate.ok is certified
    assert (off < 1e-5) is certified
    # what is certified says how far off it is
    if certified and off > 1e-9:
        assert float(own.certificate.linear_error.max()) > 1e-9
