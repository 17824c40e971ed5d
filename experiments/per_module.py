"""When does a learned precision collapse, and when is it right?  Chen et al. (2019), Modular
Meta-Learning with Shrinkage.

    python -m experiments.per_module --out results/per_module --seeds 3 --size full

thresholds   x_tn ~ N(theta_t, 1), n = 1..N, theta_t ~ N(phi, sigma^2): gradient descent on the
             joint MAP objective collapses or stops where their Corollary 1 says; a Gaussian guide
             gives the exact marginal maximum S - 1/N; the predictive estimate (theta by MAP on half
             of the data, sigma by the other half) is consistent.
linear       the paper's linear experiment: the sds that are learned, and the loss on new tasks.
spiral       the same where the mean is a rotation that depends on the weights' norm.
head         two modules, of which only the head differs between tasks: precisions per module.
"""

from __future__ import annotations

import argparse
import csv
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import varmeta as vm
from varmeta.priors.check import LearnPrecision

VARIANCES = (0.20, 0.29, 0.31, 1.0, 4.0)
POINTS = 10
Rows = list[dict[str, Any]]


# -- one weight per task: where joint MAP collapses ------------------------------------------------


def normal_mean(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    return pyro.sample(
        "y", dist.Normal(params["theta"] + x, 1.0), obs=y
    )  # x is 0: one theta for every row


def one_weight(variance: float, num_tasks: int, seed: int, points: int = POINTS) -> Tensor:
    """Observations `(tasks, points)` of the one-dimensional model, phi = 0."""
    generator = torch.Generator().manual_seed(seed)
    theta = math.sqrt(variance) * torch.randn(
        num_tasks, 1, generator=generator, dtype=torch.float64
    )
    return theta + torch.randn(num_tasks, points, generator=generator, dtype=torch.float64)


def tasks_of(y: Tensor, query: Tensor | None = None) -> vm.TaskSet:
    parts = [(torch.zeros(len(row), dtype=y.dtype), row) for row in y]
    queries: list[Any] = (
        [None] * len(y)
        if query is None
        else [(torch.zeros(len(q), dtype=q.dtype), q) for q in query]
    )
    return vm.TaskSet([vm.Task(part, other) for part, other in zip(parts, queries, strict=True)])


def model_of(precision: float = 1.0) -> vm.TaskModel:
    return vm.TaskModel.from_pyro(normal_mean, {"theta": ()}, vm.GaussianPrior(precision, "shared"))


def joint_map(tasks: vm.TaskSet, start: float, steps: int = 400) -> float:
    """sigma^2 where gradient flow on the joint MAP objective ends (theta_t and phi at their optimum
    given sigma); 0: collapse.

    `fit` refuses this objective, which has no minimum; its gradient is there all the same.
    """
    model, strategy = model_of(), vm.Implicit("delta", on_unconverged="ignore")
    mean = torch.cat([task.support[1] for task in tasks if task.support]).mean()
    log_precision = -math.log(start)
    for _ in range(steps):
        eta = {"theta": mean, "log_precision": torch.tensor(log_precision, dtype=torch.float64)}
        slope = float(
            vm.meta_gradient(model, tasks, strategy, eta=eta).grads["log_precision"]
        ) / len(tasks)
        log_precision -= 2.0 * slope
        if log_precision > 12.0:
            return 0.0
        if abs(slope) < 1e-9:
            break
    return math.exp(-log_precision)


def predicted(spread: float, points: int, start: float) -> float:
    """Corollary 1: with S the variance of the task means, sigma^2 = (S - 2/N + sqrt(S (S - 4/N))) /
    2, or collapse.
    """
    root = spread * (spread - 4 / points)
    if root < 0 or start < 0.5 * (spread - 2 / points - math.sqrt(root)):
        return 0.0
    return 0.5 * (spread - 2 / points + math.sqrt(root))


def thresholds(num_tasks: int, seeds: int) -> Rows:
    rows = []
    for variance in VARIANCES:
        for seed in range(seeds):
            y = one_weight(variance, num_tasks, seed)
            tasks = tasks_of(y)
            spread = float(y.mean(1).var(correction=0))
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", RuntimeWarning
                )  # a collapse on the way is what is looked for
                exact = vm.fit(model_of(), tasks, vm.Joint("normal"), progress=False)
                halves = tasks_of(y[:, : POINTS // 2], y[:, POINTS // 2 :])
                predictive = vm.fit(
                    model_of(), halves, vm.Implicit("delta", "query_predictive"), progress=False
                )
            rows.append(
                {
                    "true": variance,
                    "seed": seed,
                    "start": 4.0,
                    "joint_map": joint_map(tasks, 4.0),
                    "corollary": predicted(spread, POINTS, 4.0),
                    "marginal": spread - 1 / POINTS,
                    "gaussian_guide": float(exact.prior.sd["theta"]) ** 2,
                    "predictive": float(predictive.prior.sd["theta"]) ** 2,
                }
            )
    return rows


def basins(num_tasks: int) -> Rows:
    """The same data from starts on both sides of the corollary's smallest one."""
    tasks = tasks_of(one_weight(1.0, num_tasks, 0))
    spread = float(
        torch.stack([task.support[1].mean() for task in tasks if task.support]).var(correction=0)
    )
    edge = 0.5 * (spread - 2 / POINTS - math.sqrt(spread * (spread - 4 / POINTS)))
    return [
        {"start": share * edge, "edge": edge, "joint_map": joint_map(tasks, share * edge, 2000)}
        for share in (0.95, 1.05)
    ]


# -- many weights per task -------------------------------------------------------------------------

SDS = {"linear": (8.0,) * 4 + (2.0,) * 4, "spiral": (8.0,) * 2 + (2.0,) * 8}
NOISE = {"linear": (8.0,) * 4 + (5.0,) * 4 + (1.0,), "spiral": (10.0,) * 10}
CENTRE = {"linear": 1.0, "spiral": 2.0}
ANGLE = math.pi / 5


def mean_of(kind: str, theta: Tensor) -> Tensor:
    """Linear: (theta, sum theta / sqrt 8).  Spiral: consecutive pairs turned by pi / 5 times their
    length.
    """
    if kind == "linear":
        return torch.cat([theta, theta.sum(-1, keepdim=True) / math.sqrt(8)], -1)
    pairs = theta.reshape(*theta.shape[:-1], -1, 2)
    # the root is taken away from 0, where a length has no derivative
    angle = ANGLE * (pairs.square().sum(-1) + 1e-12).sqrt()
    a, b = pairs.unbind(-1)
    turned = torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
    return turned.reshape(theta.shape)


def vectors(kind: str, num_tasks: int, points: int, seed: int) -> vm.TaskSet:
    """Tasks with `points` support and as many query observations."""
    generator = torch.Generator().manual_seed(seed)
    sds, noise = (torch.tensor(v[kind], dtype=torch.float64) for v in (SDS, NOISE))
    theta = CENTRE[kind] + sds * torch.randn(
        num_tasks, len(sds), generator=generator, dtype=torch.float64
    )
    draws = noise * torch.randn(
        num_tasks, 2 * points, len(noise), generator=generator, dtype=torch.float64
    )
    y = mean_of(kind, theta).unsqueeze(1) + draws
    x = torch.zeros(points, dtype=torch.float64)
    return vm.TaskSet([vm.Task((x, row[:points]), (x, row[points:])) for row in y])


def vector_model(kind: str, learn: LearnPrecision) -> vm.TaskModel:
    noise = torch.tensor(NOISE[kind], dtype=torch.float64)

    def program(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
        mean = mean_of(kind, params["theta"]) + x.unsqueeze(
            -1
        )  # x is 0: a row for each observation
        return pyro.sample("y", dist.Normal(mean, noise).to_event(1), obs=y)

    start = torch.full((len(SDS[kind]),), CENTRE[kind], dtype=torch.float64)
    return vm.TaskModel.from_pyro(program, {"theta": start}, vm.GaussianPrior(0.05, learn))


def many_weights(
    kind: str,
    num_tasks: int,
    seeds: int,
    points: int = 4,
    held_out: int = 1000,
    only: Sequence[str] = (),
) -> Rows:
    """Learned sds, and the loss of new tasks' query after adaptation (nats per observation)."""
    methods: dict[str, tuple[LearnPrecision, vm.Joint | vm.Implicit]] = {
        "ELBO, dense, per weight": (
            "per_parameter",
            vm.Joint("multivariate_normal", expectation="cubature"),
        ),
        "ELBO, mean-field, per weight": (
            "per_parameter",
            vm.Joint("normal", expectation="cubature"),
        ),
        "ELBO, mean-field, one": ("shared", vm.Joint("normal", expectation="cubature")),
        "predictive, per weight": ("per_parameter", vm.Implicit("delta", "query_predictive")),
        "predictive, one": ("shared", vm.Implicit("delta", "query_predictive")),
    }
    rows = []
    for seed in range(seeds):
        train, test = (
            vectors(kind, num_tasks, points, seed),
            vectors(kind, held_out, points, 10_000 + seed),
        )
        for name in only or methods:
            learn, strategy = methods[name]
            data = train.merged() if name.startswith("ELBO") else train
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                fit = vm.fit(vector_model(kind, learn), data, strategy, progress=False)
                posterior = fit.adapt(test)
            row: dict[str, Any] = {
                "kind": kind,
                "method": name,
                "seed": seed,
                "converged": fit.converged,
            }
            row["loss"] = -float(posterior.score(num_samples=200).loc["all", "log_density"])
            row |= {f"sd_{i}": float(v) for i, v in enumerate(fit.prior.sd["theta"])}
            rows.append(row)
    return rows


# -- two modules, of which one differs -------------------------------------------------------------


class TwoModules(nn.Module):
    """body x + head tanh(B x) with a fixed B: linear in the weights of both modules."""

    def __init__(self, basis: Tensor) -> None:
        super().__init__()
        self.body = nn.Linear(2, 1, bias=False).double()
        self.head = nn.Linear(len(basis), 1, bias=False).double()
        self.basis: Tensor
        self.register_buffer("basis", basis)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x) + self.head(torch.tanh(x @ self.basis.T))
        return out


def two_modules(num_tasks: int, points: int, seed: int) -> tuple[vm.TaskModel, vm.TaskSet]:
    """Tasks of `points` support and query observations: body (1, -1) in all of them, the head's
    weights ~ N(0, 1).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    basis, x, heads = normal(4, 2), normal(num_tasks, 2 * points, 2), normal(num_tasks, 4, 1)
    y = (x @ torch.tensor([1.0, -1.0], dtype=torch.float64)) + (
        torch.tanh(x @ basis.T) @ heads
    ).squeeze(-1)
    y = y + 0.1 * normal(num_tasks, 2 * points)
    tasks = [
        vm.Task((a[:points], b[:points]), (a[points:], b[points:]))
        for a, b in zip(x, y, strict=True)
    ]
    prior = vm.GaussianPrior(1.0, "per_module")
    model = vm.TaskModel(TwoModules(basis), vm.likelihoods.Gaussian(0.1, learn_scale=False), prior)
    return model, vm.TaskSet(tasks)


def head(num_tasks: int, points: int, seeds: int) -> Rows:
    """Precisions per module and their ratio, from an equal start."""
    rows = []
    strategies = {
        "ELBO, dense": vm.Joint("multivariate_normal"),
        "ELBO, mean-field": vm.Joint("normal"),
        "predictive": vm.Implicit("delta", "query_predictive"),
    }
    for seed in range(seeds):
        model, tasks = two_modules(num_tasks, points, seed)
        for name, strategy in strategies.items():
            data = tasks.merged() if name.startswith("ELBO") else tasks
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", RuntimeWarning
                )  # the body's precision runs away, as it should
                fit = vm.fit(model, data, strategy, progress=False)
            body, top = (
                float(fit.eta[f"log_precision.{module}"].exp()) for module in ("body", "head")
            )
            rows.append(
                {"method": name, "seed": seed, "body": body, "head": top, "ratio": body / top}
            )
    return rows


def write(rows: Rows, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in row.items()
            )
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/per_module"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", choices=("smoke", "full"), default="full")
    parser.add_argument("--only", choices=("thresholds", "linear", "spiral", "head"), nargs="*")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    few, many, some = (200, 50, 20) if args.size == "smoke" else (20_000, 1000, 100)
    for name in args.only or ("thresholds", "linear", "spiral", "head"):
        if name == "thresholds":
            write(thresholds(few, args.seeds), args.out / "thresholds.csv")
            write(basins(few), args.out / "basins.csv")
        elif name == "head":
            write(head(some, 10, args.seeds), args.out / "head.csv")
        else:
            write(many_weights(name, many, args.seeds), args.out / f"{name}.csv")


if __name__ == "__main__":
    main()
