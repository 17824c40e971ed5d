"""Parts of a user's own, written from docs/extend.md alone, fit and give the right values.

Nothing here is imported from below `varmeta`: what the page does not say or `vm.` does not hold
would be missed.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import varmeta as vm
from tests.printed import blocks

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extend.md"


@cache
def problem(precision: str | None = "shared") -> tuple[vm.TaskModel, vm.TaskSet]:
    """A line per task, with tasks of unlike lengths."""
    whole = vm.datasets.lines(8, num_support=6, num_query=5, noise=0.3, dtype=torch.float64)
    tasks = vm.TaskSet(
        [
            vm.Task(
                (task.support[0][: 3 + i % 4], task.support[1][: 3 + i % 4]),
                (task.query[0][: 2 + i % 3], task.query[1][: 2 + i % 3]),
            )
            for i, task in enumerate(whole)
        ]
    )
    prior = vm.GaussianPrior(2.0, learn_precision=precision)
    return vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian(0.5), prior), tasks


def eta_of(model: vm.TaskModel, shift: float = 0.0) -> dict[str, Tensor]:
    """Numbers away from the start, as a step on the way would meet them."""
    start = model.init(torch.zeros((), dtype=torch.float64))
    return {name: value + 0.3 + 0.1 * k + shift for k, (name, value) in enumerate(start.items())}


def same(one: dict[str, Tensor], other: dict[str, Tensor], atol: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0.0, atol=atol)


def test_page_and_tests_import_from_the_door_only() -> None:
    texts = [b.body for b in blocks(PAGE.read_text()) if b.language == "python"]
    for text in (*texts, Path(__file__).read_text()):
        for node in ast.walk(ast.parse(text)):
            named = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("varmeta.") or name == "varmeta" for name in named) or (
                named == ["varmeta"] and isinstance(node, ast.Import)
            ), f"{named} is not said by the page"


# -- a linear solver -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConjugateResiduals(vm.LinearSolver):
    """|b - A x| minimised over the Krylov space (Stiefel 1955), as many steps as it is told."""

    num_steps: int = 6

    def solve(self, matvec: Any, b: Any) -> vm.Solution:
        names, shapes = list(b), [value.shape for value in b.values()]
        sizes = [value[0].numel() for value in b.values()]

        def rows(tree: Any) -> Tensor:
            return torch.cat([tree[name].flatten(1) for name in names], 1)

        def product(v: Tensor) -> Tensor:
            parts = zip(names, v.split(sizes, 1), shapes, strict=True)
            return rows(matvec({name: part.reshape(shape) for name, part, shape in parts}))

        right = rows(b)
        x, r = torch.zeros_like(right), right
        p, ar = r, product(r)
        ap, curvature = ar, torch.full_like(right[:, 0], torch.inf)
        for _ in range(self.num_steps):
            size = (ap * ap).sum(1, keepdim=True)
            on = size > 1e-28
            bent = (p * ap).sum(1) / (p * p).sum(1)
            curvature = torch.where(on[:, 0], torch.minimum(curvature, bent), curvature)
            length = torch.where(on, (r * ar).sum(1, keepdim=True) / size, 0.0)
            x, before = x + length * p, (r * ar).sum(1, keepdim=True)
            r = r - length * ap
            ar = product(r)
            share = torch.where(on, (r * ar).sum(1, keepdim=True) / before, 0.0)
            p, ap = r + share * p, ar + share * ap
        left = (right - product(x)).norm(dim=1)
        stats = {
            "residual": torch.where(left > 0, left / right.norm(dim=1), 0.0),
            "curvature": curvature,
            "products": torch.full_like(left, self.num_steps + 2.0),
        }
        short = (stats["residual"] > 1e-9) * int(vm.Result.STEP_LIMIT)
        parts = zip(names, x.split(sizes, 1), shapes, strict=True)
        value = {name: part.reshape(shape) for name, part, shape in parts}
        return vm.Solution(value, short, stats)


@pytest.mark.parametrize("guide", ["delta", "normal"])
def test_a_linear_solver_gives_the_gradient_of_a_dense_solve(guide: str) -> None:
    model, tasks = problem()
    own, exact = (
        vm.meta_gradient(
            model, tasks, vm.Implicit(guide, "query", linear_solver=solver), eta=eta_of(model)
        )
        for solver in (ConjugateResiduals(), vm.Direct())
    )
    same(own.grads, exact.grads, 1e-8)
    assert own.certificate is not None and own.certificate.ok
    fits = [
        vm.fit(
            model,
            tasks,
            vm.Implicit(guide, "query", linear_solver=solver),
            5,
            lambda params: torch.optim.Adam(params, lr=0.05),
        )
        for solver in (ConjugateResiduals(), vm.Direct())
    ]
    assert abs(fits[0].loss - fits[1].loss) < 1e-7


def test_a_linear_solve_that_is_cut_short_is_not_certified() -> None:
    model, tasks = problem()
    strategy = vm.Implicit("normal", "query", linear_solver=ConjugateResiduals(1))
    with pytest.warns(RuntimeWarning, match="not certified"):
        vm.meta_gradient(model, tasks, strategy, eta=eta_of(model))


# -- minimisers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Downhill(vm.FirstOrderMinimizer):
    """Gradient descent, written again."""

    lr: float = 0.01

    def init(self, phi: Any) -> Any:
        return {}

    def update(self, phi: Any, gradient: Any, state: Any, lr_scale: Any = 1.0) -> Any:
        def moved(x: Tensor, g: Tensor) -> Tensor:
            return x - (g.transpose(0, -1) * (self.lr * lr_scale)).transpose(0, -1)

        return {name: moved(x, gradient[name]) for name, x in phi.items()}, state


@dataclass(frozen=True)
class Backtracking(vm.Minimizer):
    """Steepest descent, each step halved until every task's loss falls enough (Armijo)."""

    def solve(
        self,
        fn: Any,
        phi: Any,
        *,
        steps: int | None,
        tolerance: float,
        max_steps: int,
        create_graph: bool,
    ) -> vm.Solution:
        limit = max_steps if steps is None else steps
        evaluations, first = 0, None
        while True:
            phi = {name: x.detach().requires_grad_() for name, x in phi.items()}
            with torch.enable_grad():
                losses = fn(phi)
                found = torch.autograd.grad(losses.sum(), list(phi.values()))
            norm = torch.cat([g.flatten(1) for g in found], 1).norm(dim=1)
            first = norm if first is None else first
            done = norm <= tolerance * (1 + first)
            if bool(done.all()) or evaluations >= limit:
                break
            length = torch.where(done, 0.0, 1.0).to(norm)
            for _ in range(40):
                trial = {
                    name: (x - (g.transpose(0, -1) * length).transpose(0, -1)).detach()
                    for (name, x), g in zip(phi.items(), found, strict=True)
                }
                good = fn(trial).detach() <= losses.detach() - 0.1 * length * norm**2
                length = torch.where(good, length, 0.5 * length)
            phi, evaluations = trial, evaluations + 1
        result = torch.where(done, int(vm.Result.CONVERGED), int(vm.Result.STEP_LIMIT))
        value = {name: x.detach() for name, x in phi.items()}
        return vm.Solution(value, result, {"evaluations": torch.full_like(norm, evaluations)})


@pytest.mark.parametrize("per_point", [False, True])
def test_a_first_order_rule_is_the_shipped_one(per_point: bool) -> None:
    model, tasks = problem()
    own = type("PerPoint", (Downhill,), {"per_point": True})(0.02) if per_point else Downhill(0.02)
    rules = own, vm.GradientDescent(0.02, per_point=per_point)
    for make in (
        lambda rule: vm.Unrolled("normal", inner_steps=4, minimizer=rule),
        lambda rule: vm.Implicit("delta", "query", 3, rule, on_unconverged="ignore"),
    ):
        found = [vm.meta_gradient(model, tasks, make(rule), eta=eta_of(model)) for rule in rules]
        assert found[0].value == found[1].value
        same(found[0].grads, found[1].grads, 1e-12)


def test_a_first_order_rule_serves_a_whole_fit() -> None:
    model, tasks = problem()
    losses = [
        vm.fit(
            model,
            tasks,
            vm.Joint("normal", minimizer=rule),
            20,
            lambda params: torch.optim.Adam(params, lr=0.05),
        ).loss
        for rule in (Downhill(0.01), vm.GradientDescent(0.01))
    ]
    assert losses[0] == losses[1]


def test_any_minimiser_ends_where_newtons_method_does() -> None:
    model, tasks = problem()
    fits = [
        vm.meta_gradient(model, tasks, vm.Implicit("delta", "query", minimizer=rule))
        for rule in (Backtracking(), vm.NewtonCG())
    ]
    same(fits[0].grads, fits[1].grads, 1e-6)
    assert fits[0].certificate is not None and fits[0].certificate.ok


class Careless(ConjugateResiduals):
    """Says nothing of the curvature."""

    def solve(self, matvec: Any, b: Any) -> vm.Solution:
        found = super().solve(matvec, b)
        stats = {name: value for name, value in found.stats.items() if name != "curvature"}
        return found._replace(stats=stats)


class Bare(Backtracking):
    """Returns the tree alone."""

    def solve(self, fn: Any, phi: Any, **how: Any) -> Any:
        return super().solve(fn, phi, **how).value


@pytest.mark.parametrize(
    ("part", "kind", "message"),
    [
        (
            {"linear_solver": Careless()},
            ValueError,
            "Careless.solve returns a Solution without 'curvature' in its stats, which must hold "
            "'residual', 'curvature', 'products'",
        ),
        (
            {"minimizer": Bare()},
            TypeError,
            r"Bare.solve returns a dict, expected vm.Solution\(value, result, stats\)",
        ),
    ],
)
def test_what_a_part_does_not_say_is_asked_for(
    part: dict[str, Any], kind: Any, message: str
) -> None:
    model, tasks = problem()
    with pytest.raises(kind, match=message):
        vm.meta_gradient(model, tasks, vm.Implicit("delta", "query", **part))


# -- guides ----------------------------------------------------------------------------------------


class Rows(pyro.nn.PyroModule):  # type: ignore[misc]
    """Mean-field as a Pyro guide: a location and a log sd, a row per task."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.loc, self.log_sd = model, None, None

    def forward(self, eta: Any, data: Any) -> Tensor:
        if self.loc is None:
            prior = self.model.prior_distribution(eta)
            self.loc = torch.nn.Parameter(prior.mean.repeat(len(data), 1, 1))
            self.log_sd = torch.nn.Parameter(prior.stddev.log().repeat(len(data), 1, 1))
        with pyro.plate("tasks", len(data), dim=-2):
            return pyro.sample("theta", dist.Normal(self.loc, self.log_sd.exp()).to_event(1))


@dataclass(frozen=True, repr=False)
class Factor(vm.guides.Guide):
    """A dense Gaussian, N(m, C C') with C = diag(exp(c_jj)) U, under names of its own."""

    name = "factor"

    def init(self, model: Any, eta: Any, data: Any) -> Any:
        prior = model.prior_distribution(eta)
        factor = torch.diag_embed(prior.stddev.log())  # the log of the diagonal, beside the rest
        return {
            "m": prior.mean.repeat(len(data), 1),
            "c": factor.flatten().repeat(len(data), 1),
        }

    def __call__(self, phi: Any, eta: Any, data: Any) -> Tensor:
        size = phi["m"].shape[-1]
        c = phi["c"].unflatten(-1, (size, size))
        unit = torch.eye(size, dtype=c.dtype) + c.tril(-1)
        factor = c.diagonal(dim1=-2, dim2=-1).exp().unsqueeze(-1) * unit
        q = dist.MultivariateNormal(phi["m"].unsqueeze(-2), scale_tril=factor.unsqueeze(-3))
        with pyro.plate("tasks", len(data), dim=-2):
            return pyro.sample("theta", q)


@pytest.mark.parametrize(("own", "shipped"), [(Rows, "normal"), (Factor(), "multivariate_normal")])
def test_a_guide_fits_as_the_shipped_one(own: Any, shipped: str) -> None:
    model, tasks = problem()
    fits = [vm.fit(model, tasks, vm.Joint(guide)) for guide in (own, shipped)]
    assert abs(fits[0].loss - fits[1].loss) < 1e-8
    same(fits[0].eta, fits[1].eta, 1e-5)
    means = [fit.posterior().frame()["mean"].to_numpy() for fit in fits]
    assert abs(means[0] - means[1]).max() < 1e-5


def test_a_guide_that_starts_at_the_prior_can_be_unrolled_and_is_found_by_draws() -> None:
    model, tasks = problem()
    found = [
        vm.meta_gradient(
            model,
            tasks,
            vm.Unrolled(guide, "query_elbo", 4, vm.GradientDescent(0.01)),
            eta=eta_of(model),
        )
        for guide in (Factor(), "multivariate_normal")
    ]
    assert abs(found[0].value - found[1].value) < 1e-9  # the same steps
    same(found[0].grads, found[1].grads, 1e-9)
    drawn = vm.Joint(Factor(), expectation="monte_carlo", adapt_steps=20)
    fit = vm.fit(model, tasks, drawn, 5)
    assert torch.isfinite(fit.adapt(tasks).draws(10)).all()


# -- a likelihood ----------------------------------------------------------------------------------


class Noise(vm.likelihoods.Likelihood):
    """Gaussian noise, written again: its precision is what is learned."""

    def init(self, like: Tensor) -> dict[str, Tensor]:
        return {"log_noise_precision": like.new_tensor(4.0).log()}

    def learned(self, eta: Any) -> dict[str, Tensor]:
        return {"my noise": (-0.5 * eta["log_noise_precision"]).exp()}

    def distribution(self, out: Tensor, eta: Any, y: Tensor | None = None) -> Any:
        return dist.Normal(out, (-0.5 * eta["log_noise_precision"]).exp())


def test_a_likelihood_fits_as_the_shipped_one() -> None:
    shipped, tasks = problem()
    own = vm.TaskModel(
        vm.LinearPredictor(["x"]), Noise(), vm.GaussianPrior(2.0, learn_precision="shared")
    )
    fits = [vm.fit(model, tasks, vm.Joint("multivariate_normal")) for model in (own, shipped)]
    assert abs(fits[0].loss - fits[1].loss) < 1e-6
    assert (
        abs(float(fits[0].eta["log_noise_precision"]) + 2 * float(fits[1].eta["log_scale"])) < 1e-4
    )
    assert "my noise" in str(fits[0])


# -- an outer objective ----------------------------------------------------------------------------


def squared_error(objective: Any, phi: Any, eta: Any, batch: Any, noise: Any) -> Tensor:
    query = batch.require_query()
    error = objective.observations(phi, eta, query, noise, batch.support).mean - query.y
    return objective.mean((error.square() * query.mask).sum(-1) / query.num_points)


def two_thirds(objective: Any, phi: Any, eta: Any, batch: Any, noise: Any) -> Tensor:
    known = objective(phi, eta, batch, noise)
    return (2.0 * known + objective.query(phi, eta, batch, noise)) / 3.0


def ridge_error(tasks: vm.TaskSet, eta: dict[str, Tensor]) -> Tensor:
    """The mean squared query error at each task's ridge regression, summed: a closed form."""
    theta0 = torch.cat([eta[name].reshape(-1) for name in eta if name in ("intercept", "x")])
    total = torch.zeros((), dtype=torch.float64)
    precision, variance = eta["log_precision"].exp(), (2 * eta["log_scale"]).exp()
    for task in tasks:
        (x, y), (new, target) = task.support, task.query
        a, b = (torch.stack([torch.ones(len(z)).double(), z[:, 0]], 1) for z in (x, new))
        hessian = a.T @ a / variance + precision * torch.eye(2, dtype=torch.float64)
        theta = theta0 + torch.linalg.solve(hessian, a.T @ (y - a @ theta0) / variance)
        total = total + (b @ theta - target).square().mean()
    return total


def test_an_outer_objective_has_the_value_and_gradient_of_a_closed_form() -> None:
    model, tasks = problem()
    eta = eta_of(model)
    found = vm.meta_gradient(model, tasks, vm.Implicit("delta", squared_error), eta=eta)
    known = {name: value.clone().requires_grad_() for name, value in eta.items()}
    expected = ridge_error(tasks, known)
    assert abs(found.value - float(expected.detach())) < 1e-9
    gradient = torch.autograd.grad(expected, list(known.values()))
    same(found.grads, dict(zip(known, gradient, strict=True)), 1e-8)
    assert found.certificate is not None and found.certificate.ok


def test_a_weighted_sum_has_the_gradient_of_differences() -> None:
    model, tasks = problem()
    eta = eta_of(model)
    parts = {
        outer: vm.meta_gradient(model, tasks, vm.Implicit("normal", outer), eta=eta)
        for outer in ("elbo", "query", two_thirds)
    }
    found = parts[two_thirds]
    assert abs(found.value - (2 * parts["elbo"].value + parts["query"].value) / 3) < 1e-9
    for name, gradient in found.grads.items():
        flat = gradient.reshape(-1)
        for k in range(len(flat)):
            step = torch.zeros_like(flat)
            step[k] = 1e-5
            high, low = (
                vm.meta_gradient(
                    model,
                    tasks,
                    vm.Implicit("normal", two_thirds),
                    eta=eta | {name: eta[name] + sign * step.reshape(eta[name].shape)},
                ).value
                for sign in (1, -1)
            )
            assert abs((high - low) / 2e-5 - float(flat[k])) < 1e-5


@pytest.mark.parametrize(
    "make",
    [
        lambda outer: vm.Implicit("delta", outer),
        lambda outer: vm.Unrolled("normal", outer, 3, vm.GradientDescent(0.01)),
        lambda outer: vm.FirstOrder("normal", outer, 3, vm.GradientDescent(0.01)),
    ],
)
def test_chunks_and_compiled_steps_serve_it(make: Any) -> None:
    model, tasks = problem()

    def query(objective: Any, phi: Any, eta: Any, batch: Any, noise: Any) -> Tensor:
        """One of the four, written again."""
        losses = objective.terms(phi, eta, batch.require_query(), noise, batch.support)[1]
        return objective.mean(losses)

    eta = eta_of(model)
    exact = vm.meta_gradient(model, tasks, make("query"), eta=eta)
    for options in ({}, {"task_chunk_size": 3}, {"compile": True}):
        found = vm.meta_gradient(model, tasks, make(query), eta=eta, **options)
        assert abs(found.value - exact.value) < 1e-9
        same(found.grads, exact.grads, 1e-9)


def test_a_fit_calls_it_by_its_name_and_is_loaded_with_it(tmp_path: Path) -> None:
    model, tasks = problem()
    strategy = vm.Implicit("delta", squared_error)
    fit = vm.fit(model, tasks, strategy)
    assert fit.converged
    head, value, *_ = str(fit).splitlines()
    assert head.startswith("Implicit(delta, outer=squared_error)")
    assert value == f"squared_error: {fit.loss:.4f}"
    # no other eta does better, the value being that of the closed form
    assert abs(fit.loss - float(ridge_error(tasks, fit.eta))) < 1e-8
    for name in fit.eta:
        for step in (1e-2, -1e-2):
            assert float(ridge_error(tasks, fit.eta | {name: fit.eta[name] + step})) > fit.loss
    fit.save(tmp_path / "own.fit")
    with pytest.raises(ValueError, match="'squared_error', which is code"):
        vm.load(tmp_path / "own.fit", model)
    again = vm.load(tmp_path / "own.fit", model, strategy=strategy)
    assert again.loss == fit.loss and again.loss_name == "squared_error"


def _summed(objective: Any, phi: Any, eta: Any, batch: Any, noise: Any) -> Tensor:
    return squared_error(objective, phi, eta, batch, noise).sum()


def _padded(objective: Any, phi: Any, eta: Any, batch: Any, noise: Any) -> Tensor:
    query = batch.query
    error = objective.observations(phi, eta, query, noise, batch.support).mean - query.y
    return objective.mean(error.square().mean(-1))  # over padding too


def _centred(objective: Any, phi: Any, eta: Any, batch: Any, noise: Any) -> Tensor:
    losses = squared_error(objective, phi, eta, batch, noise)
    return losses - losses.mean()


@pytest.mark.parametrize(
    ("outer", "kind", "message"),
    [
        (_summed, ValueError, r"'_summed' must return one loss per task.*shape \(2,\), not shape"),
        (
            _padded,
            ValueError,
            r"'_padded' gives task .* alone and .* leave out rows where data.mask",
        ),
        (_centred, ValueError, r"'_centred' gives task .* no task's loss depend on another"),
        (lambda *parts: 1.0, ValueError, "must return one loss per task.*not a float"),
        ("mse", ValueError, r"unknown outer objective 'mse': choose one of .* or give a function"),
        (3, TypeError, "outer must be one of .* or a function"),
    ],
)
def test_what_is_no_outer_objective_is_refused(outer: Any, kind: Any, message: str) -> None:
    model, tasks = problem()
    with pytest.raises(kind, match=message):
        vm.fit(model, tasks, vm.Implicit("delta", outer))


def test_query_rows_that_are_missing_are_named() -> None:
    model, tasks = problem()
    alone = vm.TaskSet([vm.Task(task.support) for task in tasks])
    with pytest.raises(ValueError, match="these tasks have no query data"):
        vm.fit(model, alone, vm.Implicit("delta", squared_error))


# -- a strategy ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frozen(vm.Strategy):
    """Each task's phi at its minimum, and the outer loss there, phi held fixed."""

    guide: Any = "normal"
    outer: Any = "query"

    def traits(self, problem: Any) -> vm.Traits:
        return vm.Traits(noisy=not problem.deterministic, line_search=False)

    def init(self, problem: Any, batch: Any, eta: Any) -> vm.State:
        return vm.State()

    def loss(
        self, problem: Any, batch: Any, eta: Any, state: vm.State
    ) -> tuple[Tensor, vm.State, vm.Stats]:
        solution = self.adapt(problem, batch, eta)
        losses = problem.losses(self.outer, batch, state.step)(solution.value, eta)
        stats = vm.Stats(losses.detach(), solution.stats["evaluations"].mean() + 1.0)
        return self.total(problem, batch, eta, losses), replace(state, step=state.step + 1), stats

    def adapt(self, problem: Any, batch: Any, eta: Any) -> vm.Solution:
        return problem.minimize(batch, eta, vm.NewtonCG())


def test_a_strategy_has_the_value_of_the_implicit_one() -> None:
    model, tasks = problem()
    for outer in ("query", two_thirds):
        own, exact = (
            vm.meta_gradient(model, tasks, strategy, eta=eta_of(model))
            for strategy in (Frozen(outer=outer), vm.Implicit("normal", outer))
        )
        assert abs(own.value - exact.value) < 1e-7
    fit = vm.fit(model, tasks, Frozen(outer=two_thirds), 5, lambda p: torch.optim.Adam(p, lr=1e-2))
    assert fit.history["loss"].iloc[-1] < fit.history["loss"].iloc[0]
    means = [
        answer.frame()["mean"].to_numpy()
        for answer in (fit.adapt(tasks), vm.fit(model, tasks, vm.Joint("normal")).adapt(tasks))
    ]
    assert means[0].shape == means[1].shape


@dataclass(frozen=True)
class Together(vm.Strategy):
    """`Joint` with gradient descent, written again: every task's phi is kept."""

    lr: float = 0.01

    def traits(self, problem: Any) -> vm.Traits:
        return vm.Traits(noisy=not problem.deterministic, stored=True)

    def init(self, problem: Any, batch: Any, eta: Any) -> vm.State:
        return vm.State({name: x.detach() for name, x in problem.start(batch, eta).items()})

    def loss(
        self, problem: Any, batch: Any, eta: Any, state: vm.State
    ) -> tuple[Tensor, vm.State, vm.Stats]:
        phi = {n: x.detach().requires_grad_() for n, x in batch.of(state.phi).items()}
        losses = problem.losses("elbo", batch, state.step)(phi, eta)
        found = torch.autograd.grad(losses.sum(), list(phi.values()), retain_graph=True)
        rate = self.lr * state.lr_scale
        new = {
            name: (x - rate * g).detach() for (name, x), g in zip(phi.items(), found, strict=True)
        }
        assert state.phi is not None
        after = replace(state, phi=batch.into(state.phi, new), step=state.step + 1)
        stats = vm.Stats(losses.detach(), 1.0)
        return self.total(problem, batch, eta, losses), after, stats

    def adapt(self, problem: Any, batch: Any, eta: Any) -> vm.Solution:
        return problem.minimize(batch, eta, vm.NewtonCG())


@pytest.mark.parametrize("batch_size", [None, 3])
def test_a_strategy_that_stores_phi_goes_the_way_of_joint(batch_size: int | None) -> None:
    model, tasks = problem()
    own, shipped = (
        vm.fit(
            model,
            tasks,
            strategy,
            12,
            lambda params: torch.optim.Adam(params, lr=0.05),
            batch_size,
            schedule="constant",
        )
        for strategy in (
            Together("normal"),
            vm.Joint("normal", minimizer=vm.GradientDescent(0.01)),
        )
    )
    same(own.eta, shipped.eta, 1e-9)
    means = [fit.posterior().frame()["mean"].to_numpy() for fit in (own, shipped)]
    assert abs(means[0] - means[1]).max() < 1e-9
