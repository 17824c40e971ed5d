"""Guides: one factor per task, nothing shared, nothing aliased; a user's own Pyro guide; what mixes
tasks is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import autoguide
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

import varmeta as vm
from tests.cases import GUIDES, linear_model, net_model, ragged_tasks, seeded
from tests.common import F64, moved, problem, start, with_grad
from varmeta.guides.delta import Delta
from varmeta.guides.dense import Dense
from varmeta.guides.kl import location, scale
from varmeta.guides.make import make_guide
from varmeta.guides.mean_field import MeanField
from varmeta.guides.pyro_guide import PyroGuide


class Own(PyroModule):
    """A guide as a user writes it: parameters made in the first call, one row per task."""

    def __init__(self, model: vm.TaskModel) -> None:
        super().__init__()
        self.model, self.ready = model, False

    def setup(self, start: Tensor, eye: Tensor) -> None:
        self.loc = nn.Parameter(start.clone())

    def q(self) -> Any:
        return dist.Delta(self.loc, event_dim=1)

    def forward(self, eta: dict[str, Tensor], data: Any) -> Tensor:
        if not self.ready:
            mean = self.model.prior_distribution(eta).mean
            size = len(mean)
            self.setup(
                mean.expand(len(data), 1, size),
                torch.eye(size, dtype=mean.dtype).expand(len(data), 1, -1, -1),
            )
            self.ready = True
        with pyro.plate("tasks", len(data), dim=-2):
            return pyro.sample("theta", self.q())


class OwnNormal(Own):
    def setup(self, start: Tensor, eye: Tensor) -> None:
        super().setup(start, eye)
        self.sd = PyroParam(0.3 * torch.ones_like(start), constraints.positive, event_dim=1)

    def q(self) -> Any:
        return dist.Normal(self.loc, self.sd).to_event(1)


class OwnDense(Own):
    def setup(self, start: Tensor, eye: Tensor) -> None:
        super().setup(start, eye)
        self.tril = PyroParam(0.3 * eye.clone(), constraints.lower_cholesky, event_dim=2)

    def q(self) -> Any:
        return dist.MultivariateNormal(self.loc, scale_tril=self.tril)


def at_mean(kind: Callable[..., Any]) -> Callable[[Any], Any]:
    return lambda model: kind(model, init_loc_fn=autoguide.init_to_mean)


PER_TASK: dict[str, Any] = {
    "own delta": Own, "own normal": OwnNormal, "own dense": OwnDense,
    "AutoNormal": at_mean(autoguide.AutoNormal), "AutoDelta": at_mean(autoguide.AutoDelta),
}  # fmt: skip
EVERY: dict[str, Any] = {str(guide): guide for guide in GUIDES} | PER_TASK
LEARNED = vm.GaussianPrior(2.0, "shared")


def moments(made: Any, phi: Any, eta: Any, batch: Any) -> tuple[Tensor, Tensor | None]:
    q = made.guide.distribution(phi, eta, batch.support)
    return location(q), scale(q)


def same(a: Any, b: Any, tolerance: float = 0.0) -> None:
    for one, other in zip(a, b, strict=True):
        if one is None:
            assert other is None
        else:
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "prior",
    [LEARNED, vm.GaussianPrior(learn_precision="full", covariance=[[2.0, 0.5], [0.5, 1.0]])],
)
def test_built_in_guides_start_at_the_prior_and_stay_differentiable(
    prior: vm.GaussianPrior,
) -> None:
    model, batch = linear_model(prior), ragged_tasks(3).batch()
    eta = with_grad(moved(start(model)))
    p = model.prior_distribution(eta)
    for guide in (Delta(), MeanField(), Dense()):
        phi = guide.init(model, eta, batch.support)
        q = guide.distribution(phi, eta, batch.support)
        torch.testing.assert_close(location(q).squeeze(-2), p.mean.expand(3, -1), rtol=0, atol=0)
        if not isinstance(guide, Delta):
            torch.testing.assert_close(q.stddev.squeeze(-2), p.stddev.expand(3, -1))
        if isinstance(guide, Dense):
            covariance = p.covariance_matrix if prior.dense else torch.diag(p.variance)
            torch.testing.assert_close(
                q.covariance_matrix.squeeze(-3), covariance.expand(3, -1, -1)
            )
        gradient = torch.autograd.grad(phi["loc"].sum(), [eta["weight"], eta["bias"]])
        assert [float(g) for g in gradient] == [3.0, 3.0]


@pytest.mark.parametrize("name", EVERY)
def test_guides_do_not_alias_the_prior_nor_each_other(name: str) -> None:
    """Autoguides' init_to_mean hands out the prior's own memory, so that a step on the guide moves
    the prior.
    """
    model, batch = linear_model(LEARNED), ragged_tasks(3).batch()
    eta = start(model)
    kept = {key: value.clone() for key, value in eta.items()}
    made = problem(model, EVERY[name])
    phi, other = made.start(batch, eta), problem(model, EVERY[name]).start(batch, eta)
    again = made.start(batch, eta)
    before = {key: value.clone() for key, value in other.items()}
    for value in phi.values():
        value += 1.0
        assert not torch.equal(value[0], value[0] - 1.0)
    for tree, old in (
        (eta, kept),
        (other, before),
        (again, before),
        (made.start(batch, eta), before),
    ):
        assert all(torch.equal(tree[key], old[key]) for key in old)
    rows = {key: value.clone() for key, value in other.items()}
    rows_of_first = {key: value[0].clone() for key, value in rows.items()}
    for value in rows.values():
        value[1:] += 1.0  # one task's row is not another's
    assert all(torch.equal(rows[key][0], rows_of_first[key]) for key in rows)


@pytest.mark.parametrize("name", EVERY)
def test_no_random_number_is_drawn(name: str) -> None:
    model, batch = linear_model(LEARNED), ragged_tasks(3).batch()
    state = torch.get_rng_state()
    made, eta = problem(model, EVERY[name]), start(model)
    made.losses("elbo", batch, 0)(made.start(batch, eta), eta)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", EVERY)
def test_a_subset_of_tasks_uses_exactly_its_own_rows(name: str) -> None:
    """https://github.com/pyro-ppl/pyro/issues/3468: an autoguide given a subsample silently used
    the first rows.
    """
    model, tasks = linear_model(LEARNED), ragged_tasks(5)
    made, eta, whole = problem(model, EVERY[name]), moved(start(model)), tasks.batch()
    phi = moved(made.start(whole, eta), seed=4)
    whole_losses = made.losses("elbo", whole, 0)(phi, eta)
    for rows in ([3, 1], [4], [0, 2, 4], [2, 1]):
        batch = tasks.batch(rows)
        part = {key: value[rows] for key, value in phi.items()}
        # a minibatch of a size that was never started: as Joint takes it from its stored phi.
        # Vector units round the last rows of an array, which fill none, otherwise than those
        # before; other rows would be off by the rows themselves
        own = [m if m is None else m[rows] for m in moments(made, phi, eta, whole)]
        same(moments(made, part, eta, batch), own, tolerance=1e-14)
        torch.testing.assert_close(
            made.losses("elbo", batch, 0)(part, eta), whole_losses[rows], rtol=1e-12, atol=1e-12
        )
        alone = tasks[rows].batch()
        torch.testing.assert_close(
            made.losses("elbo", alone, 0)(part, eta), whole_losses[rows], rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(
    ("own", "built_in"),
    [
        ("own delta", "delta"),
        ("AutoDelta", "delta"),
        ("own normal", "normal"),
        ("AutoNormal", "normal"),
        ("own dense", "multivariate_normal"),
    ],
)
def test_own_guides_have_the_loss_of_the_built_in_family(own: str, built_in: str) -> None:
    model, batch = net_model(LEARNED), ragged_tasks(4).batch()
    eta = moved(start(model))
    mine, theirs = problem(model, PER_TASK[own]), problem(model, built_in)
    phi = mine.start(batch, eta)
    place, spread = moments(mine, phi, eta, batch)
    same_phi = {"loc": place.squeeze(-2)}
    if spread is not None:
        spread = spread.squeeze(1)
        diagonal = spread if spread.dim() == 2 else spread.diagonal(dim1=-2, dim2=-1)
        same_phi["log_scale"] = diagonal.log()
    if built_in == "multivariate_normal":
        same_phi["tril"] = torch.zeros(4, spread.shape[-1] * (spread.shape[-1] - 1) // 2, dtype=F64)
    for name in ("elbo", "query", "query_elbo", "query_predictive"):
        a = mine.losses(name, batch, 0)(phi, eta)
        b = theirs.losses(name, batch, 0)(same_phi, eta)
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert mine.is_point(batch, eta) == (built_in == "delta")


def test_own_guides_start_where_eta_is_now() -> None:
    """Reinit and new tasks go to the present prior, not to that of the first call."""
    model, batch = linear_model(LEARNED), ragged_tasks(3).batch()
    for factory in (Own, PER_TASK["AutoNormal"], PER_TASK["AutoDelta"]):
        made = problem(model, factory)
        for seed in (1, 2):
            eta = moved(start(model), seed=seed)
            place, _ = moments(made, made.start(batch, eta), eta, batch)
            torch.testing.assert_close(place[0, 0], model.weights.flatten(eta), rtol=0, atol=0)


def test_a_random_start_is_the_same_every_time() -> None:
    model, batch = linear_model(LEARNED), ragged_tasks(3).batch()
    eta = start(model)
    phis = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made = problem(
            model, lambda m: autoguide.AutoDelta(m, init_loc_fn=autoguide.init_to_sample)
        )
        phis.append(next(iter(made.start(batch, eta).values())))
    assert torch.equal(*phis)
    assert not torch.equal(phis[0][0], phis[0][1])


@pytest.mark.parametrize(
    "name", ["own normal", "own dense", "own delta", "AutoNormal", "AutoDelta"]
)
def test_own_guides_through_fit_and_meta_gradient(name: str) -> None:
    """Also in minibatches, whose last one is smaller."""
    tasks = ragged_tasks(5)
    model = linear_model(vm.GaussianPrior(2.0))
    fit = vm.fit(
        model, tasks, vm.Joint(PER_TASK[name]), num_steps=6, batch_size=2,
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-2),
    )  # fmt: skip
    assert fit.history["loss"].notna().all()
    assert fit.posterior().draws(3).shape == (3, 5, 2)
    assert fit.adapt(tasks[[0, 1]]).draws(3).shape == (3, 2, 2)
    strategy = vm.Implicit(PER_TASK[name], "query")
    built_in = {
        "own normal": "normal",
        "AutoNormal": "normal",
        "own dense": "multivariate_normal",
    }.get(name, "delta")
    mine, theirs = (
        vm.meta_gradient(model, tasks, s) for s in (strategy, vm.Implicit(built_in, "query"))
    )
    # the minimum does not know how the guide is parametrised
    assert mine.value == pytest.approx(theirs.value, rel=1e-6)
    for key, gradient in theirs.grads.items():
        torch.testing.assert_close(mine.grads[key], gradient, rtol=1e-5, atol=1e-6)


def test_one_own_guide_for_two_models() -> None:
    tasks, guide = ragged_tasks(3), PyroGuide(OwnNormal)
    small, large = linear_model(LEARNED), net_model(LEARNED)
    values = []
    for model in (small, large, small):  # interleaved
        made = problem(model, guide)
        phi = made.start(tasks.batch(), start(model))
        values.append(
            (made, phi, start(model), made.losses("elbo", tasks.batch(), 0)(phi, start(model)))
        )
    for made, phi, eta, losses in values:
        assert torch.equal(made.losses("elbo", tasks.batch(), 0)(phi, eta), losses)
    guide.init(small, start(small), tasks.batch().support)
    with pytest.raises(ValueError, match="serves another model already"):
        guide.init(large, start(large), tasks.batch().support)


# -- what is refused -------------------------------------------------------------------------------


class NoTaskAxis(Own):
    def setup(self, start: Tensor, eye: Tensor) -> None:
        self.row = nn.Parameter(start[0, 0].clone())

    def q(self) -> Any:
        return dist.Normal(self.row, 1.0).to_event(1)


class Mixing(Own):
    def q(self) -> Any:
        return dist.Delta(self.loc + self.loc.mean(0), event_dim=1)


class Transformed(Own):
    def q(self) -> Any:
        z = pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))
        return dist.Delta(2.0 * z, event_dim=1)


class NoEvent(Own):
    def q(self) -> Any:
        return dist.Normal(self.loc.squeeze(-2), 1.0).to_event(0)


class WrongSize(Own):
    def q(self) -> Any:
        return dist.Delta(self.loc[..., :1], event_dim=1)


class TwoSites(Own):
    def q(self) -> Any:
        pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))
        return dist.Normal(self.loc, 1.0).to_event(1)


class StoresParams(nn.Module):
    def __init__(self, model: vm.TaskModel) -> None:
        super().__init__()
        self.size = model.weights.size

    def forward(self, eta: dict[str, Tensor], data: Any) -> Tensor:
        loc = pyro.param("loc", torch.zeros(len(data), 1, self.size, dtype=F64))
        with pyro.plate("tasks", len(data), dim=-2):
            return pyro.sample("theta", dist.Delta(loc, event_dim=1))


class WrongName(Own):
    def forward(self, eta: dict[str, Tensor], data: Any) -> Tensor:
        if not self.ready:
            self.loc, self.ready = nn.Parameter(torch.zeros(len(data), 1, 2, dtype=F64)), True
        with pyro.plate("tasks", len(data), dim=-2):
            return pyro.sample("phi", dist.Delta(self.loc, event_dim=1))


class FixedSize(Own):
    """Made for three tasks, whatever the data."""

    def setup(self, start: Tensor, eye: Tensor) -> None:
        self.loc = nn.Parameter(start[:3].clone())

    def q(self) -> Any:
        return dist.Delta(self.loc.mean(0, keepdim=True).expand(4, 1, 2), event_dim=1)


REFUSED: list[tuple[Any, str]] = [
    (autoguide.AutoDiagonalNormal, "mixes them"),
    (autoguide.AutoMultivariateNormal, "mixes them"),
    (autoguide.AutoLowRankMultivariateNormal, "mixes them"),
    (autoguide.AutoIAFNormal, "mixes them"),
    (autoguide.AutoLaplaceApproximation, "mixes them"),
    (autoguide.AutoStructured, "mixes them"),
    (autoguide.AutoGuideList, "mixes them"),
    (NoTaskAxis, "task axis|mixes the tasks"),
    (FixedSize, "task axis|Shape mismatch"),
    (Mixing, "mixes the tasks"),
    (Transformed, "transforms an auxiliary draw"),
    (WrongSize, "has 1 entries, but a task 2 weights"),
    (TwoSites, "one random site"),
    (StoresParams, "global parameter store"),
    (WrongName, "must sample the site 'theta'"),
]


@pytest.mark.parametrize(("factory", "match"), REFUSED)
@pytest.mark.parametrize("num_tasks", [1, 2, 3])  # 2: D parameters look like one per task
def test_guides_that_are_refused(factory: Any, match: str, num_tasks: int) -> None:
    model, batch = linear_model(LEARNED), ragged_tasks(num_tasks).batch()
    with pytest.raises(ValueError, match=match):
        problem(model, factory).start(batch, start(model))


class Heavy(Own):
    def q(self) -> Any:
        return dist.StudentT(5.0, self.loc, 1.0).to_event(1)


class Flat(Own):
    def q(self) -> Any:
        return dist.Normal(self.loc, 1.0)


@pytest.mark.parametrize("factory", [Heavy, Flat])
def test_a_kl_without_closed_form_raises_instead_of_being_sampled(factory: Any) -> None:
    model, batch = linear_model(LEARNED), ragged_tasks(3).batch()
    with pytest.raises(TypeError, match="Delta, Normal or MultivariateNormal"):
        problem(model, factory).start(batch, start(model))


def test_what_is_no_guide() -> None:
    with pytest.raises(ValueError, match="unknown guide 'norm'"):
        make_guide("norm")
    with pytest.raises(TypeError, match="name or a callable"):
        make_guide(3)  # type: ignore[arg-type]
    model, batch = linear_model(LEARNED), ragged_tasks(2).batch()
    with pytest.raises(TypeError, match="must return a Pyro guide .*not a function"):
        problem(model, lambda m: lambda eta, data: None).start(batch, start(model))
    with pytest.raises(RuntimeError, match="call init"):
        PyroGuide(Own)({}, {}, batch.support)


def test_a_guide_that_looks_at_data_sees_the_support_and_never_the_query() -> None:
    class Looking(Own):
        def forward(self, eta: dict[str, Tensor], data: Any) -> Tensor:
            widths.add(data.mask.shape[1])
            return super().forward(eta, data)

    widths: set[int] = set()
    model = vm.TaskModel(seeded(lambda: nn.Linear(1, 1)), vm.likelihoods.Gaussian())
    batch = ragged_tasks(3).batch()
    assert batch.query is not None
    assert batch.query.mask.shape[1] != batch.support.mask.shape[1]
    made, eta = problem(model, Looking), start(model)
    phi = made.start(batch, eta)
    for name in ("elbo", "query", "query_elbo", "query_predictive"):
        made.losses(name, batch, 0)(phi, eta)
    assert widths == {batch.support.mask.shape[1]}
