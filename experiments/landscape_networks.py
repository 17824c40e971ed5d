"""The same question with 25 weights instead of one: small networks on sinusoids, f = g, the two
objectives on one budget.

Tasks: 8 sinusoids of 10 points; a 1-8-1 tanh network, noise sd 0.3, lambda = 10.  A start is a
random initialisation of theta0. Inner problems are solved to tolerance (from the task's last
solution while fitting, from theta0 when an end is judged), so that nothing but the outer objective
differs.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import varmeta as vm
from varmeta.numerics.minimize import minimize
from varmeta.strategies.objective import OuterName

OBJECTIVES: dict[str, OuterName] = {"imaml": "query", "variational": "elbo"}
LEVELS = (0.01, 0.05, 0.1)
NUM_TASKS, PRECISION, NOISE = 8, 10.0, 0.3


def model_from(start: int) -> vm.TaskModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(start)
        net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    noise = vm.likelihoods.Gaussian(scale=NOISE, learn_scale=False)
    return vm.TaskModel(net, noise, vm.GaussianPrior(PRECISION))


def sinusoids(num_tasks: int, seed: int) -> vm.TaskSet:
    ranges: dict[str, Any] = {
        "amplitude": (0.5, 2.0),
        "x_range": (-3.0, 3.0),
        "dtype": torch.float64,
    }
    return vm.datasets.sinusoids(num_tasks, 10, 10, seed, **ranges)


def same_inside_and_outside(tasks: vm.TaskSet) -> vm.TaskSet:
    return vm.TaskSet([vm.Task(task.support, task.support, task.name) for task in tasks])


def study(starts: int, budget: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each start comes to under each objective, and the curves of the descents."""
    train = same_inside_and_outside(sinusoids(NUM_TASKS, seed=0))
    unseen = sinusoids(32, seed=1)
    ends: list[dict[str, Any]] = []
    curves: dict[str, Any] = {}
    begun: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
    for start in range(starts):
        model = model_from(start)
        for name, value in values(
            model, train, model.init(torch.zeros((), dtype=torch.float64))
        ).items():
            begun[name].append(value)
        for name, outer in OBJECTIVES.items():
            fit = vm.fit(
                model,
                train,
                vm.Implicit("delta", outer, on_unconverged="ignore", warm_start=True),
                optimizer=lambda params: torch.optim.Adam(params, lr=0.1),
                budget=budget,
                progress=False,
            )
            row: dict[str, Any] = {"start": start, "objective": name, "steps": len(fit.history)}
            row |= {
                f"{other} value": value
                for other, value in values(fit.model, train, fit.eta).items()
            }
            row["rmse of unseen tasks"] = float(
                fit.adapt(unseen).score(num_samples=2).loc["all", "rmse"]
            )
            ends.append(row)
            descent = fit.history[["evaluations", "loss"]]
            curves[f"{name} {start}"] = {column: descent[column].tolist() for column in descent}
    return _summary(ends, begun), curves


def values(model: vm.TaskModel, tasks: vm.TaskSet, eta: dict[str, Tensor]) -> dict[str, float]:
    """Both objectives, summed over tasks, with Alg started at theta0."""
    strategy, batch = vm.Implicit("delta"), tasks.batch()
    problem = strategy.problem(model, tasks, 0)
    phi = strategy.adapt(problem, batch, eta).value
    return {
        name: float(problem.losses(outer, batch, 0)(phi, eta).sum())
        for name, outer in OBJECTIVES.items()
    }


def _summary(ends: list[dict[str, Any]], begun: dict[str, list[float]]) -> dict[str, Any]:
    numbers: dict[str, Any] = {"ends": ends}
    for name in OBJECTIVES:
        best = min(row[f"{name} value"] for row in ends)
        scale = median(begun[name]) - best
        own = [row for row in ends if row["objective"] == name]
        excess = torch.tensor(
            [(row[f"{name} value"] - best) / scale for row in own], dtype=torch.float64
        )
        for row, value in zip(own, excess.tolist(), strict=True):
            row["excess"] = value
        rmse = torch.tensor([row["rmse of unseen tasks"] for row in own], dtype=torch.float64)
        numbers[name] = {
            "best value": best,
            "median value of the starts": scale + best,
            **{
                f"share of starts that end within {level:.0%}": float(
                    (excess <= level).double().mean()
                )
                for level in LEVELS
            },
            "largest excess": float(excess.max()),
            "rmse of unseen tasks": float(rmse.mean()),
            "rmse of unseen tasks, sd over starts": float(rmse.std()) if len(rmse) > 1 else None,
        }
    return numbers


def line_between(num_points: int) -> dict[str, list[float]]:
    """Both objectives per task on a straight line in theta0-space through two starts; Alg is
    Newton's method from theta0.

    The rows of one batch are points x tasks, each under a prior mean of its own, as in `Landscape`.
    """
    train = same_inside_and_outside(sinusoids(NUM_TASKS, seed=0))
    one, other = model_from(0), model_from(1)
    share = torch.linspace(-0.25, 1.25, num_points, dtype=torch.float64)
    problem = vm.Implicit("delta").problem(one, train, 0)

    def between(a: Tensor, b: Tensor) -> Tensor:
        points = torch.stack([a + s * (b - a) for s in share])
        return points.repeat_interleave(len(train), 0)[:, None]

    eta = {name: between(value, other.start[name]) for name, value in one.start.items()}
    batch = train.batch(list(range(len(train))) * num_points)
    inner, query = (problem.losses(name, batch, 0) for name in ("elbo", "query"))
    solution = minimize(
        lambda phi: inner(phi, eta), {"loc": one.weights.flatten(eta)[:, 0]}, vm.NewtonCG()
    )
    prior = one.prior_distribution(eta)
    normaliser = -prior.log_prob(one.weights.flatten(eta))[:, 0]
    values = {
        "imaml": query(solution.value, eta),
        "variational": inner(solution.value, eta) - normaliser,
    }
    curves = {
        name: value.detach().reshape(num_points, -1).mean(1).tolist()
        for name, value in values.items()
    }
    return {"share": share.tolist(), **curves}


def run(starts: int, budget: float, num_points: int) -> tuple[dict[str, Any], dict[str, Any]]:
    torch.set_num_threads(1)  # it may run beside other work, in a process of its own
    numbers, descents = study(starts, budget)
    return numbers, {"descents": descents, "line": line_between(num_points)}
