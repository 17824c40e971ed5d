"""What a fit claims to be exact is exact: linear by construction, converged and tight; elsewhere
nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import varmeta as vm
from tests.cases import seeded
from tests.verbs.test_exact_fits import reference, regression, sleepstudy
from varmeta.guides.make import default_guide
from varmeta.models.linearity import is_linear_in

F64 = torch.float64


def lines(num_tasks: int = 12, rows: int = 5, seed: int = 0) -> vm.TaskSet:
    """Lines around 1 + 2 x, with x in [-1, 1] and noise of sd 0.3."""
    rng = np.random.default_rng(seed)
    tasks = []
    for _ in range(num_tasks):
        x = rng.uniform(-1, 1, (rows, 1))
        slope, intercept = 2 + 0.5 * rng.normal(), 1 + 0.7 * rng.normal()
        tasks.append(
            vm.Task(support=(x, intercept + slope * x[:, 0] + 0.3 * rng.normal(size=rows)))
        )
    return vm.TaskSet(tasks)


class Doubled(vm.LinearPredictor):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).exp()


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(1, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x))).abs()


def hooked() -> nn.Module:
    net = nn.Linear(1, 1)
    net.register_forward_hook(lambda module, args, out: out.abs() + 20)
    return net


def tied() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer)


def deep(*after: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Linear(1, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), *after
    )


LAST = ("2.1.weight", "2.1.bias")
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], bool]] = {
    "Linear": (lambda: nn.Linear(2, 1), ("weight", "bias"), True),
    "LinearPredictor": (lambda: vm.LinearPredictor(["a"]), ("intercept", "a"), True),
    "last layer": (deep, LAST, True),
    "last bias": (deep, LAST[1:], True),
    "last but one": (deep, ("2.0.weight", "2.0.bias"), True),
    "last two": (deep, ("2.0.bias", *LAST), False),
    "first layer": (deep, ("0.weight",), False),
    "and a flattening": (lambda: deep(nn.Flatten()), LAST, True),
    "and a ReLU": (lambda: deep(nn.ReLU()), LAST, False),
    "subclass": (lambda: Doubled(["a"]), ("intercept", "a"), False),
    "own forward": (Custom, ("head.weight", "head.bias"), False),
    "hook": (hooked, ("weight", "bias"), False),
    "hook within": (lambda: nn.Sequential(nn.Tanh(), hooked()), ("1.weight", "1.bias"), False),
    "tied": (tied, ("0.weight", "0.bias"), False),
    "tied without a bend": (
        lambda: nn.Sequential(*2 * [nn.Linear(3, 3)]),
        ("0.weight", "0.bias"),
        False,
    ),
    "parametrised": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 1)),
        ("bias", "parametrizations.weight.original0", "parametrizations.weight.original1"),
        False,
    ),
    "not a parameter": (lambda: nn.Linear(2, 1), ("weight", "log_noise"), False),
}


@pytest.mark.parametrize("name", NETS)
def test_linear_is_known_from_how_the_network_is_built(name: str) -> None:
    make, varying, expected = NETS[name]
    assert is_linear_in(make(), varying) is expected


def test_what_is_linear_depends_on_what_is_shared() -> None:
    net = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1))
    noise = vm.likelihoods.Gaussian()
    assert not vm.TaskModel(net, noise).is_linear
    assert vm.TaskModel(net, noise, shared=["0.*"]).is_linear
    assert not vm.TaskModel(net, noise, shared=["2.*"]).is_linear
    assert not vm.TaskModel(net, vm.likelihoods.StudentT(), shared=["0.*"]).is_linear_gaussian


def test_a_relu_far_from_its_kink_is_not_called_linear() -> None:
    """The evidence of the same estimates is more than a nat away from the objective that used to be
    called it.
    """
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU()).double()
    with torch.no_grad():
        net[0].weight.fill_(0.1)
        net[0].bias.fill_(20.0)
    model = vm.TaskModel(
        net, vm.likelihoods.Gaussian(), vm.GaussianPrior(1.0, learn_precision="per_parameter")
    )
    tasks = lines()
    assert not model.is_linear and not model.looks_linear(tasks) and not model.is_linear_gaussian
    fit = vm.fit(
        model, tasks, vm.Implicit("multivariate_normal", "elbo"), num_steps=3, progress=False
    )
    assert fit.log_likelihood is None and "log likelihood" not in str(fit)


def test_an_unfinished_fit_has_no_log_likelihood() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

    prior = vm.GaussianPrior(1.0, learn_precision="full")
    model = vm.TaskModel(seeded(make), vm.likelihoods.Gaussian(), prior, shared=["0.*"])
    assert model.is_linear
    fit = vm.fit(
        model, lines(), vm.Joint("multivariate_normal"), num_steps=50, compile=False, progress=False
    )
    assert fit.log_likelihood is None and "log likelihood" not in str(fit)


def test_a_settled_fit_that_is_not_tight_has_no_log_likelihood() -> None:
    """Where eta is at rest but the tasks' posteriors have not been reached, the objective is not
    the evidence.
    """
    model = vm.TaskModel(nn.Linear(1, 1), vm.likelihoods.Gaussian(), vm.GaussianPrior(1.0))
    fit = vm.fit(model, lines(), vm.Joint("multivariate_normal"), progress=False)
    assert fit.converged and fit.log_likelihood == -fit.loss
    slow = vm.fit(
        model,
        lines(),
        vm.Joint("multivariate_normal", minimizer=vm.Adam(lr=1e-6)),
        num_steps=60,
        compile=False,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
        progress=False,
    )
    slow.run.converged = True
    assert slow.log_likelihood is None and "log likelihood" not in str(slow)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_log_likelihood_is_that_of_the_marginal_normal(dtype: torch.dtype) -> None:
    tasks = lines().to(dtype=dtype)
    model = vm.TaskModel(
        vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian(), vm.GaussianPrior(1.0, "full")
    )
    fit = vm.fit(model, tasks, vm.Joint(vm.guides.Dense()), progress=False)
    assert fit.converged and fit.log_likelihood is not None and fit.prior.scale is not None
    mean = torch.cat([value.reshape(1) for value in fit.prior.loc.values()]).double().numpy()
    total = 0.0
    for task in tasks:
        x, y = task.support
        design = np.concatenate([np.ones((len(x), 1)), x.double().numpy()], 1)
        covariance = design @ fit.prior.covariance.double().numpy() @ design.T
        covariance += float(fit.prior.scale) ** 2 * np.eye(len(x))
        total += stats.multivariate_normal(design @ mean, covariance).logpdf(y.double().numpy())
    assert fit.log_likelihood == pytest.approx(total, abs=1e-6 if dtype == F64 else 1e-2)


def test_a_regression_gets_the_guide_that_is_exact_for_it() -> None:
    """sleepstudy, `(Days || Subject)`: lme4 has sds of 24.17 and 5.80 and a log likelihood of
    -876.0.
    """
    expected = reference("sleepstudy", "uncorrelated_ML")
    model = regression(1, "per_parameter")
    fit = vm.fit(model, sleepstudy(), progress=False)
    assert fit.strategy == vm.Joint("multivariate_normal")
    sds = {
        row["var1"]: row["sd_or_corr"] for row in expected["random"] if row["group"] != "Residual"
    }
    assert float(fit.prior.sd["bias"]) == pytest.approx(sds["(Intercept)"], rel=1e-4)
    assert float(fit.prior.sd["weight"]) == pytest.approx(sds["Days"], rel=1e-4)
    assert fit.log_likelihood == pytest.approx(expected["logLik"], abs=1e-4)
    # asked for, the mean-field guide says what it costs
    field = vm.fit(model, sleepstudy(), vm.Joint("normal"), progress=False)
    assert field.log_likelihood is None and float(field.prior.sd["bias"]) < 21
    assert "the guide costs" in str(field) and "'multivariate_normal'" in str(field)


@pytest.mark.parametrize(
    ("size", "guide"), [(1, "multivariate_normal"), (20, "multivariate_normal"), (21, "normal")]
)
def test_the_default_guide_goes_by_the_number_of_weights(size: int, guide: str) -> None:
    net = nn.Linear(size, 1, bias=False)
    assert default_guide(vm.TaskModel(net, vm.likelihoods.StudentT())) == guide
    dense = vm.GaussianPrior(learn_precision="full")
    assert (
        default_guide(vm.TaskModel(net, vm.likelihoods.StudentT(), dense)) == "multivariate_normal"
    )
    # a posterior that is known is not searched for
    assert default_guide(vm.TaskModel(net, vm.likelihoods.Gaussian())) == "multivariate_normal"
