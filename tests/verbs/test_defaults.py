"""`fit(model, tasks, strategy)` with no other argument ends well on every shipped data set, in raw
units, and says why.
"""

from __future__ import annotations

import re
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from varmeta.fitting.convergence import judge
from varmeta.fitting.run import Run
from varmeta.strategies.strategy import State


def known_sd(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    return pyro.sample("y", dist.Normal(params["effect"], x), obs=y)


SETS = {
    "radon": vm.datasets.radon,
    "rats": vm.datasets.rats,
    "eight schools": vm.datasets.eight_schools,
    "gapminder": lambda: vm.datasets.gapminder("train"),
}
STRATEGIES = {
    "joint": vm.Joint(),
    "joint dense": vm.Joint("multivariate_normal"),
    "joint delta": vm.Joint("delta"),
    "reinit": vm.Reinit(),
    "implicit": vm.Implicit(),
    "implicit normal": vm.Implicit("normal"),
    "iMAML": vm.Implicit(outer="query"),
    "MAML": vm.Unrolled(),
    "FOMAML": vm.FirstOrder(),
    "Reptile": vm.Reptile(),
}
# fewer than the default of 2,000, which cost as much as the other cases of this data set together
SHORTER = {("gapminder", "FOMAML"): 500}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", SETS)
def test_converges_and_says_why(name: str, strategy: str) -> None:
    tasks, how = SETS[name](), STRATEGIES[strategy]
    learn = None if how.guide == "delta" else "per_parameter"
    if name == "eight schools":
        model = vm.TaskModel.from_pyro(known_sd, {"effect": ()}, vm.GaussianPrior(1.0, learn))
    else:
        model = vm.TaskModel(
            nn.Linear(1, 1), vm.likelihoods.Gaussian(), vm.GaussianPrior(1.0, learn)
        )
    if how.outer == "query" and tasks.batch().query is None:
        tasks = vm.TaskSet(
            [task for task in tasks if task.support is not None and len(task.support[1]) > 1]
            or [tasks[0]]
        )
        if len(tasks) < 2:
            with pytest.raises(ValueError, match="needs query data"):
                vm.fit(model, tasks, how)  # one observation per school: nothing to split
            return
        tasks = tasks.split(0.5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the prior precision of", category=RuntimeWarning)
        if isinstance(
            how, (vm.FirstOrder, vm.Reptile)
        ):  # a fixed step size is too large for a county of 116 houses
            warnings.filterwarnings(
                "ignore", message="the inner steps diverge for 1 task,", category=RuntimeWarning
            )
        fit = vm.fit(model, tasks, how, SHORTER.get((name, strategy)))
    assert fit.converged, fit.stop
    assert "converged after" in fit.stop or "settled" in fit.stop
    assert all(bool(torch.isfinite(value).all()) for value in fit.eta.values())
    assert fit.stop in str(fit)
    if isinstance(how, vm.Implicit) and how.outer == "elbo":
        # the amortised objective is the joint one with phi at its minimum: one optimum
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="the prior precision of", category=RuntimeWarning
            )
            joint = vm.fit(model, tasks, vm.Joint(how.guide))
        assert fit.loss == pytest.approx(joint.loss, abs=1e-5)


def test_a_dense_prior_takes_a_dense_guide() -> None:
    model = vm.TaskModel(
        nn.Linear(1, 1), vm.likelihoods.Gaussian(), vm.GaussianPrior(learn_precision="full")
    )
    assert vm.fit(model, vm.datasets.radon()[:20], num_steps=1).strategy == vm.Joint(
        "multivariate_normal"
    )
    model = vm.TaskModel(
        nn.Linear(1, 1), vm.likelihoods.Gaussian(), vm.GaussianPrior(learn_precision="shared")
    )
    assert vm.fit(model, vm.datasets.radon()[:20], num_steps=1).strategy == vm.Joint(
        "multivariate_normal"
    )


def test_a_singular_fit_says_so() -> None:
    """Eight tasks whose slope is three tenths of their intercept."""
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for effect in torch.randn(8, generator=generator, dtype=torch.float64):
        x = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)
        noise = 0.5 * torch.randn(6, generator=generator, dtype=torch.float64)
        tasks.append(vm.Task((x[:, None], effect * (1.0 + 0.3 * x) + noise)))
    model = vm.TaskModel(
        nn.Linear(1, 1), vm.likelihoods.Gaussian(), vm.GaussianPrior(learn_precision="full")
    )
    with pytest.warns(
        RuntimeWarning, match="singular: the prior's correlation of weight and bias is 1.0000"
    ):
        fit = vm.fit(model, vm.TaskSet(tasks))
    assert fit.converged and fit.prior.sd["bias"] > 0.3


def test_one_task_alone_is_said_to_tell_nothing_of_how_tasks_differ() -> None:
    model = vm.TaskModel(
        nn.Linear(1, 1), vm.likelihoods.Gaussian(), vm.GaussianPrior(learn_precision="shared")
    )
    with pytest.warns(RuntimeWarning, match="there is one task, '1', .* Check the column"):
        vm.fit(model, vm.datasets.radon()[:1], num_steps=5)
    with pytest.warns(RuntimeWarning) as said:  # also where nothing has settled
        vm.fit(model, vm.datasets.radon()[:1], optimizer=torch.optim.Adam)
    sentences = [str(one.message) for one in said]
    assert "has not converged" in sentences[0] and "there is one task" in sentences[1]
    # two thousand steps at Adam's own rate left the noise where nothing is explained
    assert len(sentences) == 3 and "exceeds the sd of the data" in sentences[2]


def test_weights_under_one_precision_do_not_run_away_one_by_one() -> None:
    """No task knows anything of the second weight, which is no reason to doubt the precision that
    all of them share.
    """
    tasks = [
        vm.Task((torch.cat([x, 0 * x], -1), y))
        for x, y in (task.support for task in vm.datasets.lines(8))
    ]
    model = vm.TaskModel(
        nn.Linear(2, 1), vm.likelihoods.Gaussian(), vm.GaussianPrior(learn_precision="shared")
    )
    with pytest.warns(RuntimeWarning) as said:
        vm.fit(model, vm.TaskSet(tasks), vm.Joint("normal"), num_steps=30)
    assert ["column 1 of x is 0 in every row" in str(one.message) for one in said] == [
        True
    ]  # theta0 of a column of zeros
    (x, y) = vm.datasets.lines(1, num_support=20)[0].support
    alike = vm.TaskSet([vm.Task((x, y + 0.01 * k), name=str(k)) for k in range(8)])
    line = vm.TaskModel(
        nn.Linear(1, 1), vm.likelihoods.Gaussian(), vm.GaussianPrior(learn_precision="shared")
    )
    with pytest.warns(RuntimeWarning, match=r"precision of weight, bias runs away"):
        vm.fit(line, alike, vm.Joint("normal"), num_steps=20)


def test_counts_that_vary_no_more_than_poissons_say_so() -> None:
    counts = vm.TaskSet(
        [vm.Task((torch.zeros(6, 0), torch.tensor([3, 4, 3, 2, 4, 3]) + k)) for k in range(4)]
    )
    negative = vm.TaskModel(
        vm.LinearPredictor([]), vm.likelihoods.NegativeBinomial(), vm.GaussianPrior()
    )
    with pytest.warns(
        RuntimeWarning, match=r"concentration runs to infinity \(.*\): .* use likelihoods.Poisson"
    ):
        fit = vm.fit(negative, counts, num_steps=60)
    assert fit.converged
    assert f"concentration  {'':>12}" in str(fit)


@pytest.mark.parametrize("counts", [[0, 9, 1, 14, 0, 3], [0, 0, 0, 0, 0, 0]])
def test_other_counts_do_not(counts: list[int]) -> None:
    tasks = vm.TaskSet([vm.Task((torch.zeros(6, 0), torch.tensor(counts))) for _ in range(4)])
    model = vm.TaskModel(
        vm.LinearPredictor([]), vm.likelihoods.NegativeBinomial(), vm.GaussianPrior()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of zeros alone there is more to say
        warnings.filterwarnings("error", message="the concentration", category=RuntimeWarning)
        vm.fit(model, tasks, num_steps=4)


JUDGED: dict[str, tuple[float, float, bool, str]] = {
    # noise of each loss, slope per step, verdict
    "quiet": (0.1, 0.0, True, "which has settled"),
    "noisy": (30.0, 0.0, False, "hides: raise num_steps, num_particles or batch_size"),
    "falling": (
        0.1,
        -1.0,
        False,
        "fell by .* so it is still moving: raise num_steps or the learning rate",
    ),
    "rising": (0.1, 0.04, False, "rose by .* so it does not descend: lower the learning rate"),
    "far": (0.1, 1.0, False, "ended 180 nats above where it began: lower the learning rate"),
    "beyond": (0.1, 1e306, False, "nats above where it began: lower the learning rate"),
    # half of the steps go up: larger ones are not what it lacks
    "uneven": (5.0, -0.3, False, "fell by .* so it is still moving: raise num_steps$"),
}


@pytest.mark.parametrize(("noise", "slope", "converged", "verdict"), JUDGED.values(), ids=JUDGED)
def test_whether_a_run_has_settled(
    noise: float, slope: float, converged: bool, verdict: str
) -> None:
    draws = noise * torch.randn(
        200, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    losses = 100.0 + draws + slope * torch.arange(200)
    run = Run({}, State(None, None, 0, 1.0), [{"loss": x} for x in losses.tolist()])
    judge(run, 10, 1)
    assert run.converged is converged and re.search(verdict, run.stop)


def test_a_fit_that_diverges_is_told() -> None:
    tasks = vm.datasets.lines(10, num_support=5, noise=0.1, dtype=torch.float64)
    model = vm.TaskModel(
        vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian(), vm.GaussianPrior(1.0)
    )
    options = {"num_steps": 40, "schedule": "constant"}
    with pytest.warns(RuntimeWarning, match="the fit diverges: .* nats above where it began"):
        fit = vm.fit(
            model, tasks, vm.Joint("delta"), optimizer=lambda p: torch.optim.SGD(p, 0.05), **options
        )
    assert not fit.converged and fit.run.history[-1]["loss"] > fit.run.history[0]["loss"] + 100.0


def test_tasks_too_small_to_split_are_named_and_can_be_left_out() -> None:
    tasks = vm.TaskSet([vm.Task(([[0.0]], [1.0]), name="small"), *vm.datasets.lines(3)]).split(0.5)
    with pytest.raises(
        ValueError, match=r"1 task of 4 has none, 'small' first: .*tasks.with_query\(\)"
    ):
        vm.meta_gradient(
            vm.TaskModel(nn.Linear(1, 1), vm.likelihoods.Gaussian()), tasks, vm.Unrolled()
        )
    assert tasks.with_query().names == tasks.names[1:]
    with pytest.raises(ValueError, match="none of these tasks has query data"):
        tasks[:1].with_query()
