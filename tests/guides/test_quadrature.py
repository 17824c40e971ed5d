"""One weight per task under a likelihood that is not Gaussian: the evidence by quadrature, by
default, and a word elsewhere.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

import varmeta as vm
from experiments.mixed_models.generalised import GENERALISED, Generalised
from experiments.mixed_models.sets import table
from tests.conftest import shared_data
from varmeta.fitting import chunks
from varmeta.strategies.expectation import Cubature, GaussHermite, MonteCarlo, make_expectation

F64 = torch.float64


def case_of(name: str) -> Generalised:
    shared_data(name)
    return next(case for case in GENERALISED if case.data == name)


def coins(num_tasks: int = 40, tosses: int = 6, sd: float = 3.0) -> vm.TaskSet:
    rng = np.random.default_rng(0)
    chance = special.expit(0.5 + sd * rng.normal(size=num_tasks))
    return vm.TaskSet(
        [
            vm.Task(support=(np.zeros((tosses, 0)), (rng.random(tosses) < p).astype(float)))
            for p in chance
        ]
    )


def intercepts() -> vm.TaskModel:
    return vm.TaskModel(
        vm.LinearPredictor([]),
        vm.likelihoods.Bernoulli(),
        vm.GaussianPrior(learn_precision="per_parameter"),
    )


@pytest.mark.parametrize(("name", "loss"), [("toenail", 625.3977), ("cbpp", 91.98337)])
def test_lme4s_estimates_by_default(name: str, loss: float) -> None:
    """lme4 by adaptive quadrature: sd 4.0066 and -625.3973 (toenail, 50 nodes), 0.64752 and
    -50.0050 (cbpp).
    """
    case = case_of(name)
    theirs = case.references()["lme4, quadrature"]
    fit = vm.fit(case.model(), case.tasks(), progress=False)
    assert fit.strategy == vm.Implicit("quadrature") and fit.converged
    assert "negative log evidence by quadrature" in str(fit)
    assert "std. error" in str(fit) and "no standard errors" not in str(fit)
    assert float(fit.prior.sd["intercept"]) == pytest.approx(theirs["sd"], rel=1e-3)
    for column, error in zip(("intercept", *case.columns), theirs["errors"], strict=True):
        found = float((fit.prior.loc | fit.prior.shared)[column])
        assert found == pytest.approx(theirs[column], abs=5e-3 * error)
    assert fit.standard_errors is not None
    for column, error in zip(("intercept", *case.columns), theirs["errors"], strict=True):
        # glmer's are those of the joint Hessian, ours given the sd: smaller where the two go
        # together
        assert 0.8 * error < float(fit.standard_errors[column]) < 1.01 * error
    assert fit.loss == pytest.approx(loss, abs=2e-3)


def test_the_evidence_and_the_moments_are_those_of_an_integral() -> None:
    tasks = coins(6)
    fit = vm.fit(intercepts(), tasks, vm.Implicit("quadrature"), 1, compile=False, progress=False)
    loc, sd = float(fit.prior.loc["intercept"]), float(fit.prior.sd["intercept"])
    total, posterior = 0.0, fit.posterior().distribution
    for i, task in enumerate(tasks):
        ones, tosses = float(task.support[1].sum()), len(task.support[1])

        def density(z: float, power: int = 0, k: float = ones, n: int = tosses) -> float:
            theta = loc + sd * z
            return (
                theta**power
                * stats.norm.pdf(z)
                * special.expit(theta) ** k
                * special.expit(-theta) ** (n - k)
            )

        zero, one, two = (
            integrate.quad(density, -10, 10, (power,), epsabs=1e-13, limit=200)[0]
            for power in range(3)
        )
        total -= math.log(zero)
        assert float(posterior.mean[i]) == pytest.approx(one / zero, abs=1e-4)
        assert float(posterior.variance[i]) == pytest.approx(
            two / zero - (one / zero) ** 2, rel=1e-3
        )
    assert fit.loss == pytest.approx(total, abs=1e-5)


def test_its_meta_gradient_is_that_of_the_evidence() -> None:
    tasks, model = coins(5), intercepts()
    found = vm.meta_gradient(model, tasks, vm.Implicit("quadrature"))
    for name in ("intercept", "log_precision.intercept"):
        at = []
        for step in (1e-4, -1e-4):
            moved = intercepts()
            eta = model.init(torch.zeros((), dtype=F64))
            eta[name] = eta[name] + step
            strategy = vm.Implicit("quadrature")
            problem = strategy.problem(moved, tasks, 0)
            at.append(
                chunks.value(
                    strategy,
                    problem,
                    tasks.batch(),
                    eta,
                    strategy.init(problem, tasks.batch(), eta),
                )
            )
        assert float(found.grads[name]) == pytest.approx((at[0] - at[1]) / 2e-4, rel=1e-5)


def test_gauss_hermite_is_taken_where_log_p_is_no_parabola() -> None:
    for size, number in ((1, 32), (2, 12), (3, 8)):
        for frozen in (True, False):
            found = make_expectation("auto", size, 2, True, frozen, quadratic=False)
            assert found == GaussHermite(number)
        assert make_expectation("auto", size, 2, True, False, quadratic=True) == Cubature()
    assert make_expectation("auto", 4, 2, True, False, quadratic=False) == Cubature()
    assert make_expectation("auto", 2, 2, False, False, quadratic=False) == MonteCarlo(2)
    # a program's curve may mean nothing at the far nodes: chicks' ended at 1e68
    assert make_expectation("auto", 2, 2, True, False, False, straight=False) == Cubature()
    assert make_expectation("auto", 1, 2, True, False, False, straight=False) == GaussHermite(32)
    with pytest.raises(ValueError, match="up to 3 weights per task, and this has 4"):
        make_expectation("quadrature", 4, 2, True, False)
    with pytest.raises(ValueError, match="up to 3 weights per task, and this model has 4 weights"):
        vm.guides.Quadrature().bound(
            vm.TaskModel(torch.nn.Linear(3, 1), vm.likelihoods.Bernoulli())
        )


@pytest.mark.parametrize("compile", [False, True])
def test_a_gaussian_on_binary_answers_says_how_far_its_bound_is(compile: bool) -> None:
    """Evidence of the same estimates, by another quadrature, is nats above the bound."""
    options = {"num_steps": 30, "optimizer": lambda p: torch.optim.Adam(p, 1e-2)} if compile else {}
    if compile:  # weights of the points are constants of the graph
        two = [
            vm.fit(
                intercepts(), coins(4), vm.Joint("normal"), compile=how, progress=False, **options
            ).loss
            for how in (True, False)
        ]
        assert two[0] == pytest.approx(two[1], rel=1e-9)
        return
    with pytest.warns(
        RuntimeWarning,
        match=r"nats above -log evidence .*may be too small.*Implicit\('quadrature'\)",
    ):
        bound = vm.fit(intercepts(), coins(80, 4, 6.0), vm.Joint("normal"), progress=False)
    with pytest.warns(RuntimeWarning, match="nats below -log evidence .*may be too large"):
        rough = vm.fit(
            intercepts(),
            coins(80, 4, 6.0),
            vm.Joint("normal", expectation="cubature"),
            progress=False,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        exact = vm.fit(intercepts(), coins(80, 4, 6.0), progress=False)
    sds = [float(fit.prior.sd["intercept"]) for fit in (bound, exact, rough)]
    assert sds == sorted(sds) and bound.loss > exact.loss > rough.loss


@pytest.mark.parametrize("strategy", [vm.Unrolled, vm.FirstOrder])
def test_steps_that_stop_short_of_the_mode_have_no_evidence(strategy: type) -> None:
    """At theta0 Laplace's formula is off by a hundred nats, of which nothing was said."""
    for guide in ("laplace", "quadrature"):
        with pytest.raises(ValueError, match=rf"around the mode.*use vm.Implicit\('{guide}'\)"):
            vm.fit(intercepts(), coins(4), strategy(guide, "elbo"), progress=False)
    with pytest.raises(ValueError, match=r"around the mode"):
        vm.fit(intercepts(), coins(4), vm.Reptile("laplace"), progress=False)
    with pytest.raises(ValueError, match=r"around the mode"):
        vm.meta_gradient(intercepts(), coins(4), strategy("quadrature", "elbo"))


def test_nodes_that_leave_one_with_all_the_mass_have_the_hessians_covariance() -> None:
    """Where the start is far from the mode: sqrt(1 / 6), and no error from within Pyro."""
    tasks = vm.TaskSet(
        [vm.Task((np.zeros((5, 1)), np.full(5, 5e8)), name=f"t{i}") for i in range(2)]
    )
    net = torch.nn.Linear(1, 1).double()
    with torch.no_grad():
        net.weight.zero_()
        net.bias.zero_()
    model = vm.TaskModel(
        net,
        vm.likelihoods.Gaussian(1.0, learn_scale=False),
        vm.GaussianPrior(1.0),
        shared=["weight"],
    )
    short = vm.Implicit("quadrature", inner_steps=1, minimizer=vm.GradientDescent(1e-12))
    with pytest.warns(RuntimeWarning, match="not certified"):
        found = vm.fit(model, tasks, short, 1, lambda p: torch.optim.SGD(p, 1e-30), progress=False)
    posterior = found.posterior()
    # five observations of precision 1 and a prior of precision 1
    assert posterior.sd["bias"].numpy() == pytest.approx(6.0**-0.5, rel=1e-9)


def test_a_precision_that_runs_away_under_quadrature_is_not_blamed_on_the_guide() -> None:
    """Counts that do not differ between tasks: the guide is the posterior, and no other guide would
    change that.
    """
    y = torch.tensor([1, 2, 3, 2, 1, 3, 2, 2])
    tasks = vm.TaskSet(
        [vm.Task((torch.zeros(8, 0, dtype=torch.float64), y.roll(i))) for i in range(10)]
    )
    prior = vm.GaussianPrior(learn_precision="per_parameter")
    model = vm.TaskModel(vm.LinearPredictor([]).double(), vm.likelihoods.Poisson(), prior)
    with pytest.warns(RuntimeWarning, match="runs away") as said:
        fit = vm.fit(model, tasks)
    assert "quadrature" in str(fit.strategy) and "multivariate_normal" not in str(said[0].message)


# -- two and three weights -------------------------------------------------------------------------


def slopes(number: int, rows: int, sds: tuple[float, ...], seed: int = 0) -> vm.TaskSet:
    """Binary answers with as many varying weights as sds, an intercept first."""
    rng, tasks = np.random.default_rng(seed), []
    for _ in range(number):
        x = rng.normal(size=(rows, len(sds) - 1))
        theta = np.array([0.5, 1.0, -0.5][: len(sds)]) + np.array(sds) * rng.normal(size=len(sds))
        chance = special.expit(theta[0] + x @ theta[1:])
        tasks.append(vm.Task((x, (rng.random(rows) < chance).astype(float))))
    return vm.TaskSet(tasks)


def regression_of(size: int, learn: str) -> vm.TaskModel:
    return vm.TaskModel(
        vm.LinearPredictor([f"x{k}" for k in range(1, size)]),
        vm.likelihoods.Bernoulli(),
        vm.GaussianPrior(learn_precision=learn),
    )


def loss_on_a_grid(tasks: vm.TaskSet, loc: np.ndarray, factor: np.ndarray, number: int) -> float:
    """-log p(y) by the trapezoidal rule over u, theta = loc + factor u, 7 sds to either side."""
    one = np.linspace(-7.0, 7.0, number)
    u = np.stack(np.meshgrid(*[one] * len(loc), indexing="ij"), -1).reshape(-1, len(loc))
    theta = loc + u @ factor.T
    prior = stats.norm.logpdf(u).sum(-1) + len(loc) * math.log(one[1] - one[0])
    total = 0.0
    for task in tasks:
        x, y = (part.numpy() for part in task.support)
        out = theta[:, :1] + theta[:, 1:] @ x.T
        total -= special.logsumexp(prior + (y * out - np.logaddexp(0.0, out)).sum(-1))
    return float(total)


def at(fit: vm.Fit) -> tuple[np.ndarray, np.ndarray]:
    """theta0 and a root of the prior's covariance."""
    values, vectors = np.linalg.eigh(fit.prior.covariance.detach().numpy())
    loc = torch.stack([value.detach() for value in fit.prior.loc.values()]).flatten()
    return loc.numpy(), vectors * np.sqrt(values.clip(min=0.0))


@pytest.mark.parametrize(
    ("sds", "learn", "number"),
    [((1.5, 1.0), "per_parameter", 61), ((1.5, 1.0), "full", 61), ((1.5, 1.0, 0.7), "shared", 25)],
)
def test_few_weights_are_integrated_out_by_default(
    sds: tuple[float, ...], learn: str, number: int
) -> None:
    """The evidence of the estimates is a dense grid's, and no step along an entry raises it."""
    tasks = slopes(40, 10, sds)
    fit = vm.fit(regression_of(len(sds), learn), tasks, progress=False)
    assert fit.strategy == vm.Implicit("quadrature") and fit.converged and fit.run.step <= 20
    loc, factor = at(fit)
    best = loss_on_a_grid(tasks, loc, factor, number)
    assert fit.loss == pytest.approx(best, abs=2e-3)
    h = 0.02
    for k in range(len(loc)):
        step = h * np.eye(len(loc))[k]
        sides = [
            loss_on_a_grid(tasks, loc + step, factor, number),
            loss_on_a_grid(tasks, loc - step, factor, number),
        ]
        _is_lowest(best, sides, h)
        sides = [
            loss_on_a_grid(tasks, loc, np.diag(np.exp(sign * step)) @ factor, number)
            for sign in (1, -1)
        ]
        if learn != "shared":
            _is_lowest(best, sides, h)
    # a Gaussian's bound lies above it at every eta
    bound = vm.fit(
        regression_of(len(sds), learn), tasks, vm.Joint("multivariate_normal"), progress=False
    )
    assert bound.loss > fit.loss + 0.1
    assert loss_on_a_grid(tasks, *at(bound), number) > best + 1e-3


def _is_lowest(best: float, sides: list[float], h: float) -> None:
    """By the parabola through three points: nothing to gain along the line."""
    slope, curvature = (sides[0] - sides[1]) / (2 * h), (sum(sides) - 2 * best) / h**2
    assert curvature > 0 and 0.5 * slope**2 / curvature < 1e-4


def test_a_singular_covariance_is_reached_in_a_few_newton_steps() -> None:
    """L-BFGS took 34 steps of 20 line searches along that valley, 19 s on 50 tasks."""
    rng, tasks = np.random.default_rng(0), []
    for z in rng.normal(size=40):
        x = rng.normal(size=(8, 1))
        chance = special.expit(0.5 + 1.5 * z + (1.0 - 0.8 * z) * x[:, 0])
        tasks.append(vm.Task((x, (rng.random(8) < chance).astype(float))))
    found = vm.TaskSet(tasks)
    with pytest.warns(RuntimeWarning, match="the fit is singular"):
        fit = vm.fit(regression_of(2, "full"), found, progress=False)
    assert fit.converged and fit.run.step <= 20
    loc, factor = at(fit)
    assert fit.loss == pytest.approx(loss_on_a_grid(found, loc, factor, 61), abs=2e-3)
    # float32 tells no precision matrix of it from an infinite one: the posteriors were NaN
    with pytest.warns(RuntimeWarning, match="the fit is singular"):
        single = vm.fit(regression_of(2, "full"), found.to(dtype=torch.float32), progress=False)
    assert single.loss == pytest.approx(fit.loss, abs=1e-3)
    # the thinnest direction is 1e-6 of the others, of which float32 holds 1 or 2 digits
    for name, sd in fit.posterior().sd.items():
        torch.testing.assert_close(single.posterior().sd[name].double(), sd, rtol=0.1, atol=1e-3)


def test_newton_on_the_evidence_ends_where_lbfgs_does() -> None:
    tasks = slopes(20, 8, (1.0, 0.7))
    model = regression_of(2, "per_parameter")
    newton = vm.fit(model, tasks, progress=False)
    slow = vm.fit(
        model,
        tasks,
        vm.Implicit("quadrature"),
        100,
        lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe", tolerance_change=1e-14),
        progress=False,
    )
    assert newton.loss == pytest.approx(slow.loss, abs=1e-4)
    for name, value in newton.eta.items():
        torch.testing.assert_close(value, slow.eta[name], rtol=0.0, atol=5e-3)


def test_an_evidence_that_its_nodes_do_not_reach_says_so() -> None:
    """sds of 12 and 8 against five answers each: 15 nodes for each weight are no integral."""
    tasks = slopes(60, 5, (12.0, 8.0))
    rough = vm.Implicit(vm.guides.Quadrature(num_nodes=6))
    with pytest.warns(RuntimeWarning, match=r"with 6 nodes for each weight than with 9|hides"):
        vm.fit(regression_of(2, "per_parameter"), tasks, rough, progress=False)


@pytest.mark.parametrize(
    ("name", "evidence", "bound"),
    [("epil", 655.3502, 655.3507), ("bacteria", 98.3167, 98.3317)],
)
def test_random_slopes_of_real_counts_and_answers(name: str, evidence: float, bound: float) -> None:
    """epil: visits that vary by patient; bacteria: weeks.  bound: the log likelihood (dense grid)
    of what the dense guide by cubature, the default before, ended at.
    """
    shared_data(name)
    frame = table(name)
    if name == "epil":
        frame = frame.assign(
            lbase=np.log(frame.base / 4) - np.log(frame.base / 4).mean(),
            lage=np.log(frame.age) - np.log(frame.age).mean(),
            trt=(frame.trt == "progabide").astype(float),
            visit=(frame.period - 2.5) / 2,
        ).assign(lbase_trt=lambda d: d.lbase * d.trt)
        columns, fixed = ["visit"], ["lbase", "trt", "lage", "lbase_trt"]
        likelihood, task = vm.likelihoods.Poisson(), "subject"
    else:
        frame = frame.assign(drug=(frame.trt != "placebo").astype(float))
        columns, fixed, likelihood, task = ["week"], ["drug"], vm.likelihoods.Bernoulli(), "ID"
    tasks = vm.TaskSet.from_frame(frame, task=task, x=[*columns, *fixed], y="y")
    model = vm.TaskModel(
        vm.LinearPredictor([*columns, *fixed]),
        likelihood,
        vm.GaussianPrior(learn_precision="full"),
        shared=fixed,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the fit is singular")  # bacteria's is
        fit = vm.fit(model, tasks.to(dtype=F64), progress=False)
    assert fit.strategy == vm.Implicit("quadrature") and fit.converged
    assert fit.loss == pytest.approx(evidence, abs=2e-3) and fit.loss < bound
