"""Models whose tasks' posteriors are Gaussian by construction, each with tasks; and their evidence,
written out row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.cases import seeded
from varmeta.priors.factor_normal import FactorNormal

Gaussian, Prior = vm.likelihoods.Gaussian, vm.GaussianPrior


def rows(num_tasks: int = 16, outputs: int = 1, seed: int = 0, weight: bool = False) -> vm.TaskSet:
    """Two predictors, a feature, tasks of 0 to 9 rows, query data; float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tasks = []
    for i in range(num_tasks):
        size = (6, 8, 0, 2, 9, 4, 7, 1)[i % 8]
        own = normal(3, outputs)

        def part(n: int, own: Tensor = own) -> tuple[Tensor, Tensor]:
            x = normal(n, 2)
            y = own[0] + x @ (1.0 + 0.8 * own[1:]) + 0.4 * normal(n, outputs)
            columns = [y, 0.5 + normal(n, 1).abs()] if weight else [y]
            y = torch.cat(columns, -1)
            return x, y.squeeze(-1) if y.shape[-1] == 1 else y

        tasks.append(vm.Task(part(size), part(3), f"task {i}", {"z": float(i) - 2.0}))
    return vm.TaskSet(tasks, x_names=["a", "b"])


def body(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), *layers)


def _net(make: Callable[[], nn.Module], shared: list[str], **prior: object) -> vm.TaskModel:
    chosen = {"learn_precision": "full"} | prior
    return vm.TaskModel(seeded(make), Gaussian(scale=0.6), Prior(**chosen), shared=shared)  # type: ignore[arg-type]


def _predictor(
    prior: vm.GaussianPrior, likelihood: object = None, **options: object
) -> vm.TaskModel:
    shared, offset = options.pop("shared", ()), options.pop("offset", ())
    return vm.TaskModel(
        vm.LinearPredictor(["a", "b"], offset=offset).double(),  # type: ignore[arg-type]
        Gaussian(scale=0.6) if likelihood is None else likelihood,  # type: ignore[arg-type]
        prior,
        shared=shared,  # type: ignore[arg-type]
    )


REGRESSIONS: dict[str, Callable[[], tuple[vm.TaskModel, vm.TaskSet]]] = {
    "fixed": lambda: (_predictor(Prior(2.0)), rows()),
    "shared sd": lambda: (_predictor(Prior(learn_precision="shared")), rows()),
    "per parameter": lambda: (_predictor(Prior(learn_precision="per_parameter")), rows()),
    "full": lambda: (_predictor(Prior(learn_precision="full")), rows()),
    "one shared": lambda: (_predictor(Prior(learn_precision="full"), shared=["b"]), rows()),
    "offset": lambda: (_predictor(Prior(learn_precision="full"), offset="b"), rows()),
    "known noise": lambda: (
        _predictor(Prior(learn_precision="full"), Gaussian(0.5, learn_scale=False)),
        rows(),
    ),
    "theta0 held": lambda: (
        _predictor(Prior(learn_precision="full", learn_loc=["a"], loc={"b": 0.5})),
        rows(),
    ),
    "covariates": lambda: (
        _predictor(Prior(learn_precision="full", covariates={"intercept": ["z"], "a": ["z"]})),
        rows(),
    ),
    "precision weights": lambda: (
        _predictor(
            Prior(learn_precision="full"),
            vm.likelihoods.Weighted(Gaussian(scale=0.6), precision=True),
        ),
        rows(weight=True),
    ),
    "hyperpriors": lambda: (
        _predictor(
            Prior(
                learn_precision="full",
                lkj=2.0,
                scale_hyperprior=dist.HalfNormal(torch.tensor(2.0, dtype=torch.float64)),
                loc_hyperprior=dist.Normal(torch.tensor(0.0, dtype=torch.float64), 3.0),
            ),
            Gaussian(0.6, scale_hyperprior=dist.HalfNormal(torch.tensor(1.0, dtype=torch.float64))),
        ),
        rows(),
    ),
    "two outputs": lambda: (
        vm.TaskModel(
            seeded(lambda: nn.Linear(2, 2)),
            Gaussian(scale=0.6),
            Prior(learn_precision="per_parameter"),
        ),
        rows(outputs=2),
    ),
}

NETWORKS: dict[str, Callable[[], tuple[vm.TaskModel, vm.TaskSet]]] = {
    "head": lambda: (_net(body(nn.Linear(4, 1)), ["0.*"]), rows()),
    "head of low rank": lambda: (
        _net(body(nn.Linear(4, 1)), ["0.*"], learn_precision="low_rank", rank=2),
        rows(),
    ),
    "head of independent weights": lambda: (
        _net(body(nn.Linear(4, 1)), ["0.*"], learn_precision="per_parameter"),
        rows(),
    ),
    "bias of the head shared": lambda: (_net(body(nn.Linear(4, 1)), ["0.*", "2.bias"]), rows()),
    "a layer after it": lambda: (
        _net(body(nn.Linear(4, 3), nn.Linear(3, 1)), ["0.*", "3.*"]),
        rows(),
    ),
    "two outputs of a head": lambda: (_net(body(nn.Linear(4, 2)), ["0.*"]), rows(outputs=2)),
}

# Whose evidence is known, but not profiled in whitened columns.
OTHERS: dict[str, Callable[[], tuple[vm.TaskModel, vm.TaskSet]]] = {
    "low rank": lambda: (_predictor(Prior(learn_precision="low_rank", rank=1)), rows()),
}

MODELS = REGRESSIONS | OTHERS | NETWORKS


def moved(model: vm.TaskModel, seed: int = 1) -> dict[str, Tensor]:
    """eta away from where the model starts."""
    generator = torch.Generator().manual_seed(seed)
    start = model.init(torch.zeros((), dtype=torch.float64))
    return {
        name: value + 0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in start.items()
    }


def outputs(
    model: vm.TaskModel,
    eta: dict[str, Tensor],
    x: Tensor,
    theta: Tensor,
    features: dict[str, Tensor],
) -> Tensor:
    """Of one task, flat `(rows * outputs,)`, by the network itself."""
    data = vm.tasks.Data(x[None], x[None, :, 0], torch.ones(1, len(x)).bool(), features)
    weights = model.moved(theta.reshape(1, 1, -1), eta, data)
    return model.output(weights, eta, x[None]).reshape(-1)


def dense_evidence(
    model: vm.TaskModel, eta: dict[str, Tensor], tasks: vm.TaskSet, query: bool = False
) -> Tensor:
    """log p(y_i | eta) of each task by the covariance of its rows; query: of both parts."""
    prior = model.prior_distribution(eta)
    scale = eta["log_scale"].exp() if "log_scale" in eta else torch.tensor(0.5, dtype=torch.float64)
    dense = isinstance(prior, dist.MultivariateNormal | FactorNormal)
    spread = prior.covariance_matrix if dense else torch.diag(prior.variance)
    found = []
    for task in tasks:
        parts = [part for part in (task.support, task.query if query else None) if part is not None]
        x, y = (torch.cat([part[k] for part in parts]) for k in (0, 1)) if parts else (None, None)
        if x is None or y is None:
            found.append(torch.zeros((), dtype=torch.float64))
            continue
        known = {
            name: torch.tensor([value], dtype=torch.float64)
            for name, value in task.features.items()
        }  # type: ignore[union-attr]
        run = lambda theta, x=x, known=known: outputs(model, eta, x, theta, known)  # noqa: E731
        design = torch.autograd.functional.jacobian(run, prior.mean)
        weight = torch.ones(len(y), dtype=torch.float64)
        if isinstance(model.likelihood, vm.likelihoods.Weighted):
            y, weight = y[:, 0], y[:, 1]
        noise = torch.diag(scale**2 / weight.repeat_interleave(y[0].numel()))
        covariance = design @ spread @ design.T + noise
        mean, row = run(prior.mean), y.reshape(-1)
        left = row - mean
        squares = left @ torch.linalg.solve(covariance, left)
        found.append(-0.5 * (squares + covariance.logdet() + len(row) * math.log(2 * math.pi)))
    return torch.stack(found)


def intercepts(number: int) -> tuple[vm.TaskModel, vm.TaskSet]:
    """So many tasks of three rows around a number of their own, whose sd is 1 as the noise's is."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(number, 1, generator=generator) + torch.randn(number, 3, generator=generator)
    tasks = vm.TaskSet([vm.Task((torch.zeros(3, 0).double(), own.double())) for own in y])
    prior = vm.GaussianPrior(learn_precision="shared")
    net = vm.LinearPredictor([]).double()
    return vm.TaskModel(net, vm.likelihoods.Gaussian(), prior), tasks
