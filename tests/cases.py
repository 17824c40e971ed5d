"""Lists that the tests take products of: models, guides, objectives."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import varmeta as vm
from varmeta.strategies.check import check_strategy
from varmeta.strategies.strategy import Strategy, Traits

# "w..." are the weights of every model below, as against their biases
STRUCTURED = vm.guides.Structured(dense=("*w*",))
GUIDES = [
    "delta",
    "normal",
    "multivariate_normal",
    vm.guides.LowRank(rank=1),
    STRUCTURED,
    "laplace",
]
OUTERS = ["elbo", "query_elbo", "query", "query_predictive"]


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network with its own seed, whatever the global state."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().double()


def check(
    strategy: Strategy, model: vm.TaskModel, tasks: vm.TaskSet, for_fit: bool = True
) -> Traits:
    """What `fit` asks of a strategy before any work."""
    return check_strategy(strategy, strategy.problem(model, tasks, 0), tasks, for_fit)


def ragged_tasks(
    num_tasks: int = 4, features: int = 1, seed: int = 0, noise: float = 0.3
) -> vm.TaskSet:
    """Noisy sines of different sizes, with query data; float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int, phase: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, features, generator=generator, dtype=torch.float64)
        y = torch.sin(x.sum(-1) + phase) + noise * torch.randn(
            n, generator=generator, dtype=torch.float64
        )
        return x, y

    tasks = []
    for index in range(num_tasks):
        phase = torch.rand((), generator=generator, dtype=torch.float64)
        tasks.append(
            vm.Task(
                support=draw(3 + index % 3, phase),
                query=draw(2 + index % 2, phase),
                name=f"sine {index}",
            )
        )
    return vm.TaskSet(tasks)


def scalar_program(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    """One weight, and a nonlinear mean: the post's own setting."""
    return pyro.sample(
        "y", dist.Normal(torch.sin(params["w"] * x[..., 0]), params["log_sd"].exp()), obs=y
    )


def scalar_model(prior: vm.GaussianPrior) -> vm.TaskModel:
    start = {
        "w": torch.tensor(0.4, dtype=torch.float64),
        "log_sd": torch.tensor(-0.3, dtype=torch.float64),
    }
    return vm.TaskModel.from_pyro(scalar_program, start, prior, shared=["log_sd"])


def linear_model(prior: vm.GaussianPrior) -> vm.TaskModel:
    return vm.TaskModel(seeded(lambda: nn.Linear(1, 1)), vm.likelihoods.Gaussian(scale=0.7), prior)


def net_model(prior: vm.GaussianPrior, width: int = 3) -> vm.TaskModel:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))

    return vm.TaskModel(seeded(make), vm.likelihoods.Gaussian(scale=0.7), prior)


def large_model(prior: vm.GaussianPrior, width: int = 40) -> vm.TaskModel:
    """1,761 weights, or width^2 + 4 width + 1."""

    def make() -> nn.Module:
        layers = (
            nn.Linear(1, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, 1),
        )
        return nn.Sequential(*layers)

    return vm.TaskModel(seeded(make), vm.likelihoods.Gaussian(scale=0.7), prior)


MODELS = {"scalar": scalar_model, "linear": linear_model, "net": net_model}


def adam(params: object) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2)  # type: ignore[arg-type]


def known(
    model: vm.TaskModel, tasks: vm.TaskSet, strategy: vm.Joint | vm.Implicit | vm.Unrolled
) -> vm.Fit:
    """A fit whose eta is the model's start: what is learned, or that nothing could be, is not the
    question.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the likelihood has no maximum", RuntimeWarning)
        return vm.fit(model, tasks, strategy, 1, lambda params: torch.optim.SGD(params, lr=0.0))
