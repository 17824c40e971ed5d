"""What stands behind the numbers of docs/choices.md and docs/traps.md that no test holds: one small
measurement each.

    python -m experiments.choices                lists them
    python -m experiments.choices --only guide   prints one's rows; --size smoke: the smallest case
    python -m experiments.choices --only all

guide        dense against mean-field guides by the number of weights a task.
steps        joint Newton steps of lme4's models, in raw units (data beside a checkout where they
             are not shipped).
groups       tasks grouped by size against one rectangle (radon_all, beside a checkout).
precision    solves in the prior's sds against plain ones: the error of the gradient in float64 and
             float32.
certificate  how far from the minimum a gradient was taken, and how wrong it is. theophylline the
posterior of the prior, and the optimum with exchanged rates (data beside a checkout).

Times are of one thread.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any
from unittest.mock import patch

import pandas as pd
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import varmeta as vm
from experiments.mixed_models.sets import SHARED, dyestuff, regression, sleepstudy, table
from varmeta.guides.make import GuideName
from varmeta.strategies.problem import Problem

Rows = list[dict[str, Any]]
F64 = torch.float64


@contextmanager
def without_units(known: bool) -> Iterator[None]:
    """Nothing where the prior's sds are known, else the solvers are not told of them."""
    with patch.object(Problem, "units", Problem.units if known else lambda *_: None):
        yield


def fitted(
    model: vm.TaskModel, tasks: vm.TaskSet, guide: GuideName = "multivariate_normal"
) -> tuple[vm.Fit, float]:
    """The joint fit, and its seconds."""
    begin = perf_counter()
    fit = vm.fit(model, tasks, vm.Joint(guide), progress=False)
    return fit, perf_counter() - begin


def guide(small: bool) -> Rows:
    """50 regressions of D weights, two rows more than weights each, noise scale 0.5."""
    rows = []
    for size in (2,) if small else (4, 8, 14, 20):
        generator = torch.Generator().manual_seed(size)
        tasks = []
        for _ in range(5 if small else 50):
            x = torch.randn(size + 2, size - 1, generator=generator, dtype=F64)
            theta = torch.randn(size, generator=generator, dtype=F64)
            y = (
                x @ theta[1:]
                + theta[0]
                + 0.5 * torch.randn(size + 2, generator=generator, dtype=F64)
            )
            tasks.append(vm.Task((x, y)))
        fits = {}
        for name in ("multivariate_normal", "normal"):
            model = vm.TaskModel(
                nn.Linear(size - 1, 1),
                vm.likelihoods.Gaussian(),
                vm.GaussianPrior(learn_precision="per_parameter"),
            )
            fits[name], seconds = fitted(model, vm.TaskSet(tasks), name)
            rows.append(
                {
                    "weights": size,
                    "guide": name,
                    "seconds": seconds,
                    "noise scale": float(fits[name].eta["log_scale"].exp()),
                    "nats above the dense guide": fits[name].loss
                    - fits["multivariate_normal"].loss,
                    "converged": fits[name].converged,
                }
            )
    return rows


def steps(small: bool) -> Rows:
    """Maximum likelihood with a random intercept and slope (dyestuff, machines: intercepts)."""
    sets: dict[str, tuple[Callable[[], vm.TaskSet], tuple[str, ...]]] = {
        "rats": (vm.datasets.rats, ("day",)), "radon": (vm.datasets.radon, ("floor",)),
    }  # fmt: skip
    if SHARED.is_dir():
        sets |= {"sleepstudy": (sleepstudy, ("Days",)), "dyestuff": (dyestuff, ())}
    rows = []
    for name in ("rats",) if small else sets:
        make, columns = sets[name]
        model = regression(
            columns, vm.likelihoods.Gaussian(), vm.GaussianPrior(learn_precision="full")
        )
        fit = vm.fit(model, make(), vm.Joint("multivariate_normal"), progress=False)
        rows.append(
            {"set": name, "Newton steps": len(fit.history), "log likelihood": fit.log_likelihood}
        )
    return rows


def groups(small: bool) -> Rows:
    """`floor + (floor | county)` on 385 counties, in groups of about one size and as one
    rectangle.
    """
    frame = table("radon_all")
    tasks = vm.TaskSet.from_frame(frame[frame.floor < 2], task="county", x=["floor"], y="log_radon")
    tasks = tasks[:20] if small else tasks
    mask = tasks.batch().support.mask
    rows = []
    for name, worth in (("groups", 4_000), ("one rectangle", 10**12)):
        model = regression(
            ["floor"], vm.likelihoods.Gaussian(), vm.GaussianPrior(learn_precision="full")
        )
        with patch("varmeta.tasks.batch.WORTH", worth):
            fit, seconds = fitted(model, tasks)
        rows.append(
            {
                "tasks as": name,
                "data": float(mask.double().mean()),
                "seconds": seconds,
                "loss": fit.loss,
            }
        )
    return rows


def sines(num_tasks: int, points: int, dtype: torch.dtype = F64) -> vm.TaskSet:
    return vm.datasets.sinusoids(num_tasks, num_support=points, num_query=points, noise=0.3).to(
        dtype=dtype
    )


def network(width: int, prior: vm.GaussianPrior, dtype: torch.dtype = F64) -> vm.TaskModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [
            nn.Linear(1, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, 1),
        ]
    return vm.TaskModel(
        nn.Sequential(*layers).to(dtype), vm.likelihoods.Gaussian(0.3, learn_scale=False), prior
    )


def precision(small: bool) -> Rows:
    """A linear task set of 80 weights, precisions of 0.01 to 1e4, 20 rows: d/d theta0 of the query
    loss, against algebra.
    """
    size, number = (8, 4) if small else (80, 20)
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(number, size, generator=generator, dtype=F64) for _ in range(2))
    y, q = (torch.randn(number, generator=generator, dtype=F64) for _ in range(2))
    scale = torch.logspace(-2, 4, size, dtype=F64)
    hessian = x.T @ x + torch.diag(scale)
    theta = torch.linalg.solve(hessian, x.T @ y)  # theta0 is 0
    exact = scale * torch.linalg.solve(hessian, z.T @ (z @ theta - q))
    rows = []
    for dtype in (F64, torch.float32):
        task = vm.Task((x.to(dtype), y.to(dtype)), (z.to(dtype), q.to(dtype)))
        net = nn.Linear(size, 1, bias=False).to(dtype)
        nn.init.zeros_(net.weight)
        prior = vm.GaussianPrior({"weight": scale.to(dtype).reshape(1, -1)})
        model = vm.TaskModel(net, vm.likelihoods.Gaussian(learn_scale=False), prior)
        for known in (True, False):
            with without_units(known):
                strategy = vm.Implicit(
                    "delta", "query", linear_solver=vm.CG(), on_unconverged="ignore"
                )
                found = (
                    vm.meta_gradient(model, vm.TaskSet([task]), strategy)
                    .grads["weight"]
                    .flatten()
                    .double()
                )
            rows.append(
                {"dtype": str(dtype), "prior's sds": known, "relative error": _apart(found, exact)}
            )
    return rows


def certificate(small: bool) -> Rows:
    """A 1-8-8-1 network, 5 tasks: gradients after 16 gradient steps and after few of Newton's,
    against Newton's minimum.
    """
    model, tasks = network(8, vm.GaussianPrior(10.0)), sines(5, 10)
    exact, _ = _gradient(model, tasks, None, vm.NewtonCG())
    rows = []
    counts = (4,) if small else (8, 20, 26, 28, 30, 32)
    for number, rule in (
        (16, vm.GradientDescent(1e-3)),
        *((number, vm.NewtonCG()) for number in counts),
    ):
        found, above = _gradient(model, tasks, number, rule)
        rows.append(
            {
                "inner steps": number,
                "of": type(rule).__name__,
                "nats above": above,
                "relative error": _apart(found, exact),
            }
        )
    return rows


def _gradient(
    model: vm.TaskModel, tasks: vm.TaskSet, number: int | None, rule: Any
) -> tuple[Tensor, float]:
    """iMAML's gradient, and the nats that its worst task is above the minimum."""
    found = vm.meta_gradient(
        model, tasks, vm.Implicit("delta", "query", number, rule, on_unconverged="ignore")
    )
    assert found.certificate is not None
    return torch.cat([g.flatten() for g in found.grads.values()]), float(
        found.certificate.decrement.max()
    )


def theophylline(small: bool) -> Rows:
    """Hyper-parameters under half-normal hyperpriors of the sds; then the fit from exchanged rates
    beside the usual one.
    """
    from experiments.nonlinear import CASES
    from experiments.nonlinear import fitted as fitted_case

    case = CASES[0]
    prior = vm.GaussianPrior(learn_precision="per_parameter", scale_hyperprior=dist.HalfNormal(1.0))
    print(
        vm.fit(
            case.model(None, prior), case.tasks(), hyperguide="multivariate_normal", progress=False
        )
    )
    rows = []
    for name, start in (
        ("usual", case.start),
        ("exchanged", case.start | {"lKe": 0.4, "lKa": -2.5}),
    ):
        fit, said = fitted_case(case, "dense", start)
        found = {key: float(value) for key, value in (fit.prior.loc | fit.prior.shared).items()}
        rows.append({"start": name, "loss": fit.loss, **found, "warnings": len(said)})
    return rows


def _apart(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


MEASURES: dict[str, Callable[[bool], Rows]] = {
    "guide": guide,
    "steps": steps,
    "groups": groups,
    "precision": precision,
    "certificate": certificate,
    "theophylline": theophylline,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=(*MEASURES, "all"))
    parser.add_argument("--size", choices=("smoke", "full"), default="full")
    options = parser.parse_args(arguments)
    if options.only is None:
        for name, measure in MEASURES.items():
            print(f"{name:12s} {(measure.__doc__ or '').strip()}")
        return
    torch.set_num_threads(1)
    for name in MEASURES if options.only == "all" else (options.only,):
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", RuntimeWarning
            )  # a mean-field guide is doubtful, which is the point
            rows = pd.DataFrame(MEASURES[name](options.size == "smoke"))
            print(f"{name}\n{rows.to_string(index=False)}", flush=True)


if __name__ == "__main__":
    main()
