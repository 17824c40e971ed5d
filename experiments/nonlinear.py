"""Nonlinear mixed effects as Pyro programs: the pharmacokinetics of theophylline and the growth of
chicks.

How near are a dense Gaussian guide and Laplace's to the likelihood, where nlme linearises?  Which
starts lead where?

    python -m experiments.nonlinear --out results/nonlinear --size full

fits         every model by both guides: the objective, the log likelihood at the estimates by
             quadrature and by importance weights, the reading of k-hat per task, and what the fit
             warned about.
quantities   the estimates beside nlme's, and the log likelihood that nlme reports beside the one
             that its estimates have.
starts       fits from random starts: how many reach the best optimum, and how many fail to without
             a word.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import varmeta as vm
from experiments.mixed_models.sets import SHARED, reference, table
from varmeta.plot import BAND, INK, plot_curves
from varmeta.priors.check import LearnPrecision

Params = dict[str, Tensor]
Rows = list[dict[str, Any]]


# -- the programs ----------------------------------------------------------------------------------


def absorption(params: Params, x: Tensor, y: Tensor | None) -> Any:
    """One compartment with first-order absorption: concentration of x = (dose, time) after an oral
    dose.
    """
    dose, time = x[..., 0], x[..., 1]
    ke, ka, cl = params["lKe"].exp(), params["lKa"].exp(), params["lCl"].exp()
    mean = dose * ke * ka / (cl * (ka - ke)) * ((-ke * time).exp() - (-ka * time).exp())
    return pyro.sample("y", dist.Normal(mean, params["log_sd"].exp()), obs=y)


def logistic(params: Params, time: Tensor, y: Tensor | None) -> Any:
    """Asym / (1 + exp((xmid - time) / scal)), as nlme's SSlogis."""
    mean = params["Asym"] * torch.sigmoid((time - params["xmid"]) / params["scal"])
    return pyro.sample("y", dist.Normal(mean, params["log_sd"].exp()), obs=y)


def log_logistic(params: Params, time: Tensor, y: Tensor | None) -> Any:
    """The same by logarithms of what is positive."""
    mean = params["log_Asym"].exp() * torch.sigmoid(
        (time - params["xmid"]) / params["log_scal"].exp()
    )
    return pyro.sample("y", dist.Normal(mean, params["log_sd"].exp()), obs=y)


def gompertz(params: Params, time: Tensor, y: Tensor | None) -> Any:
    """log of the weight goes from that at birth to log Asym exponentially, at a rate."""
    top, birth = params["log_Asym"], params["log_birth"]
    mean = (top + (birth - top) * (-params["log_rate"].exp() * time).exp()).exp()
    return pyro.sample("y", dist.Normal(mean, params["log_sd"].exp()), obs=y)


@dataclass(frozen=True)
class Case:
    """One model of one data set.  reference: nlme's fit of that name.  wide: sds of random
    starts.
    """

    data: str
    name: str
    program: Callable[[Params, Tensor, Tensor | None], Any]
    start: dict[str, float]
    shared: tuple[str, ...]
    learn_precision: LearnPrecision
    reference: str | None = None
    wide: dict[str, float] = field(default_factory=dict)

    def tasks(self) -> vm.TaskSet:
        if self.data == "theoph":
            return vm.TaskSet.from_frame(
                table("theoph"), task="Subject", x=["Dose", "Time"], y="conc"
            )
        return vm.TaskSet.from_frame(table("chickweight"), task="Chick", x="Time", y="weight")

    def model(
        self, start: dict[str, float] | None = None, prior: vm.GaussianPrior | None = None
    ) -> vm.TaskModel:
        values = {
            name: torch.tensor(v, dtype=torch.float64) for name, v in (start or self.start).items()
        }
        prior = prior or vm.GaussianPrior(learn_precision=self.learn_precision)
        return vm.TaskModel.from_pyro(self.program, values, prior, shared=self.shared)


PK = {"lKe": -2.5, "lKa": 0.5, "lCl": -3.0, "log_sd": 0.0}
GROWTH = {"log_Asym": 5.5, "xmid": 10.0, "log_scal": 2.0, "log_sd": 2.0}
CASES = (
    Case(
        "theoph",
        "lKa, lCl",
        absorption,
        PK,
        ("log_sd", "lKe"),
        "per_parameter",
        "diag2",
        {"lKe": 1.5, "lKa": 1.5, "lCl": 1.5},
    ),
    Case("theoph", "lKe, lKa, lCl, dense", absorption, PK, ("log_sd",), "full", "full"),
    Case(
        "chickweight",
        "logistic: Asym, xmid",
        logistic,
        {"Asym": 250.0, "xmid": 10.0, "scal": 6.0, "log_sd": 2.0},
        ("log_sd", "scal"),
        "per_parameter",
        "logistic_ML",
    ),
    Case(
        "chickweight",
        "logistic: log Asym, xmid, dense",
        log_logistic,
        GROWTH,
        ("log_sd", "log_scal"),
        "full",
        wide={"log_Asym": 1.5, "xmid": 10.0, "log_scal": 1.0},
    ),
    Case("chickweight", "logistic: all three, dense", log_logistic, GROWTH, ("log_sd",), "full"),
    Case(
        "chickweight",
        "Gompertz: log Asym, log rate, dense",
        gompertz,
        {"log_Asym": 6.0, "log_birth": 3.7, "log_rate": -3.0, "log_sd": 2.0},
        ("log_sd", "log_birth"),
        "full",
    ),
)
GUIDES: dict[str, Callable[[], Any]] = {
    "dense": lambda: vm.Joint("multivariate_normal"),
    "laplace": lambda: vm.Implicit("laplace"),
}


# -- fits ------------------------------------------------------------------------------------------


def quadrature(posterior: vm.Posterior, nodes: int = 15) -> Tensor:
    """log p(y_i | eta) by adaptive Gauss-Hermite quadrature around each task's guide,
    `(tasks,)`.
    """
    q = posterior.distribution
    mean, factor = q.mean.squeeze(-2), q.covariance_matrix.squeeze(-3)
    factor = torch.linalg.cholesky(factor)
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    size = mean.shape[-1]
    z = torch.from_numpy(
        np.stack(np.meshgrid(*[points] * size, indexing="ij"), -1).reshape(-1, size)
    )
    grid = np.stack(np.meshgrid(*[np.log(weights)] * size, indexing="ij"), -1)
    log_weights = torch.from_numpy(grid.reshape(-1, size).sum(-1))
    theta = (mean + torch.einsum("tij,kj->kti", factor, z)).unsqueeze(-2)
    with torch.no_grad():
        prior = posterior.model.prior_distribution(posterior.q.eta).log_prob(theta).squeeze(-1)
        terms = (
            prior
            + posterior.log_likelihood(theta)
            + (log_weights + 0.5 * z.square().sum(-1)).unsqueeze(-1)
        )
        value: Tensor = terms.logsumexp(0) + factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return value


def fitted(
    case: Case, guide: str, start: dict[str, float] | None = None
) -> tuple[vm.Fit, list[str]]:
    """The fit, and what it warned about."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        fit = vm.fit(
            case.model(start), case.tasks(), GUIDES[guide](), compile=False, progress=False
        )
    return fit, [str(item.message) for item in caught]


def row_of(case: Case, guide: str) -> tuple[dict[str, Any], vm.Fit]:
    begin = perf_counter()
    fit, said = fitted(case, guide)
    seconds = perf_counter() - begin
    posterior = fit.posterior()
    found = posterior.diagnose(num_samples=4000)
    exact, check = (quadrature(posterior, nodes) for nodes in (15, 21))
    readings = found["reading"].value_counts()
    row = {
        "data": case.data,
        "model": case.name,
        "guide": guide,
        "objective": -fit.loss,
        "quadrature": float(exact.sum()),
        "quadrature_error": float((exact - check).abs().sum()),
        "importance": found["evidence"].sum(),
        "se": float(np.sqrt(found["se"].pow(2).sum())),
        "k_hat": found["k_hat"].max(),
        "trusted": int(readings.get("good", 0) + readings.get("usable", 0)),
        "tasks": len(found),
        "converged": fit.converged,
        "seconds": seconds,
        "warnings": "; ".join(said),
    }
    return row, fit


def estimates(fit: vm.Fit) -> dict[str, float]:
    """theta0 and shared parameters, sds, correlations and the noise scale, by nlme's words."""
    prior = fit.prior
    out = {
        name: float(value) for name, value in (prior.loc | prior.shared).items() if name != "log_sd"
    }
    out |= {f"sd({name})": float(value) for name, value in prior.sd.items()}
    if fit.model.prior.dense:
        labels = prior.labels
        out |= {
            f"cor({labels[j]}, {labels[i]})": float(prior.correlation[i, j])
            for i in range(len(labels))
            for j in range(i)
        }
    return out | {"noise scale": float(prior.shared["log_sd"].exp())}


def of_nlme(case: Case) -> tuple[dict[str, float], vm.Posterior | None, float]:
    """nlme's estimates, the tasks' posteriors given them, and the log likelihood that it reports.

    None for posteriors where the correlations, known to three digits, are no correlation matrix.
    """
    theirs = reference(case.data, "reference.json")["fits"][case.reference]
    fixed = dict(zip(theirs["fixed"]["names"], theirs["fixed"]["estimate"], strict=True))
    random = [row for row in theirs["random"] if row["term"] != "Residual"]
    names, sds = (
        [row["term"] for row in random],
        torch.tensor([row["sd"] for row in random], dtype=torch.float64),
    )
    correlation = torch.eye(len(names), dtype=torch.float64)
    out = fixed | {f"sd({name})": float(sd) for name, sd in zip(names, sds, strict=True)}
    for i, row in enumerate(random):
        for j, value in enumerate(row.get("corr_with_previous_terms", [])):
            correlation[i, j] = correlation[j, i] = value
            out[f"cor({names[j]}, {names[i]})"] = value
    weights = [name for name in case.start if name not in case.shared]
    order = [names.index(name) for name in weights]
    covariance = (sds[:, None] * correlation * sds)[order][:, order]
    out["noise scale"] = theirs["sigma"]
    if bool(torch.linalg.cholesky_ex(covariance).info):
        return out, None, theirs["logLik"]
    model = case.model(
        fixed | {"log_sd": float(np.log(theirs["sigma"]))}, vm.GaussianPrior(covariance=covariance)
    )
    # one step of length 0: nothing is learned, and the tasks are then adapted
    still = vm.fit(
        model,
        case.tasks(),
        vm.Joint("multivariate_normal"),
        1,
        lambda p: torch.optim.SGD(p, lr=0.0),
        compile=False,
        progress=False,
    )
    return out, still.adapt(case.tasks(), compile=False), theirs["logLik"]


def beside_nlme(case: Case, fits: dict[str, vm.Fit]) -> Rows:
    theirs, posterior, reported = of_nlme(case)
    ours = {guide: estimates(fit) for guide, fit in fits.items()}
    rows: Rows = [
        {
            "data": case.data,
            "model": case.name,
            "quantity": name,
            **{g: ours[g].get(name) for g in ours},
            "nlme": value,
        }
        for name, value in theirs.items()
    ]
    exact = {guide: float(quadrature(fit.posterior()).sum()) for guide, fit in fits.items()}
    given = None if posterior is None else float(quadrature(posterior).sum())
    rows.append(
        {
            "data": case.data,
            "model": case.name,
            "quantity": "log likelihood",
            **exact,
            "nlme": given,
        }
    )
    return [
        *rows,
        {"data": case.data, "model": case.name, "quantity": "reported", "nlme": reported},
    ]


# -- starts ----------------------------------------------------------------------------------------


def starts(case: Case, number: int, best: float, guide: str = "dense") -> dict[str, Any]:
    """Where fits from random starts end: at the best optimum, elsewhere (with and without a
    warning), or refused.
    """
    generator = np.random.default_rng(0)
    counts = dict.fromkeys(("best", "elsewhere, warned", "elsewhere, silent", "refused"), 0)
    for _ in range(number):
        start = case.start | {
            n: case.start[n] + sd * generator.standard_normal() for n, sd in case.wide.items()
        }
        try:
            fit, said = fitted(case, guide, start)
        except ValueError:
            counts["refused"] += 1
            continue
        there = abs(fit.loss - best) < 1e-2
        counts["best" if there else "elsewhere, warned" if said else "elsewhere, silent"] += 1
    return {"data": case.data, "model": case.name, "guide": guide, "starts": number, **counts}


# -- figures ---------------------------------------------------------------------------------------


def figures(fits: dict[str, vm.Fit], out: Path) -> None:
    import matplotlib.pyplot as plt

    if "theoph" in fits:
        posterior = fits["theoph"].posterior()
        _, axes = plt.subplots(3, 4, figsize=(12, 8), sharex=True, sharey=True)
        time = torch.linspace(0.0, 25.0, 60, dtype=torch.float64)
        data = fits["theoph"].tasks
        grids = [
            torch.stack([task.support[0][0, 0].expand(60), time], -1)
            for task in data
            if task.support
        ]
        low, high = (part.numpy() for part in posterior.predict(grids).interval(0.9))
        middle = posterior.expected(grids).mean.numpy()
        for i, (task, ax) in enumerate(zip(data, axes.flat, strict=True)):
            assert task.support is not None
            ax.fill_between(time, low[i], high[i], color=BAND, alpha=0.4, linewidth=0)
            ax.plot(time, middle[i], color=INK, linewidth=1.2)
            ax.plot(task.support[0][:, 1], task.support[1], "o", color=INK, markersize=3)
            ax.set_title(f"subject {task.name}", fontsize=9)
        axes[2, 0].set(xlabel="hours since the dose", ylabel="theophylline, mg/L")
        plt.savefig(out / "theoph.png", dpi=130, bbox_inches="tight")
    if "chickweight" in fits:
        posterior = fits["chickweight"].posterior()
        # the shortest curves first: what the prior adds shows there
        order = sorted(
            range(len(posterior.names)), key=lambda i: int(posterior.q.batch.support.num_points[i])
        )
        chosen = [posterior.names[i] for i in [*order[:6], *order[-6:]]]
        plot_curves(
            posterior,
            torch.linspace(0, 30, 60, dtype=torch.float64),
            chosen,
            labels=("day", "weight, g"),
        )
        plt.savefig(out / "chickweight.png", dpi=130, bbox_inches="tight")
    plt.close("all")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/nonlinear"))
    parser.add_argument("--size", choices=("smoke", "full"), default="full")
    options = parser.parse_args(arguments)
    if not SHARED.is_dir():
        sys.exit(f"no reference data at {SHARED}: name their folder by VARMETA_SHARED")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    small = options.size == "smoke"
    rows: Rows = []
    beside: Rows = []
    reached: Rows = []
    drawn: dict[str, vm.Fit] = {}
    for case in [CASES[0], CASES[3]] if small else CASES:
        fits = {}
        for guide in ("dense",) if small else GUIDES:
            row, fits[guide] = row_of(case, guide)
            rows.append(row)
            print(
                pd.DataFrame([row])
                .drop(columns="warnings")
                .round(4)
                .to_string(index=False, header=len(rows) == 1),
                flush=True,
            )
            pd.DataFrame(rows).to_csv(options.out / "fits.csv", index=False)
        drawn.setdefault(case.data, fits["dense"])
        if case.reference:
            beside += beside_nlme(case, fits)
        if case.wide:
            drawn[case.data] = fits["dense"]
            reached.append(starts(case, 4 if small else 50, fits["dense"].loss))
    pd.DataFrame(beside).to_csv(options.out / "quantities.csv", index=False)
    pd.DataFrame(reached).to_csv(options.out / "starts.csv", index=False)
    print("\n" + pd.DataFrame(beside).drop(columns="data").round(4).to_string(index=False))
    print("\n" + pd.DataFrame(reached).to_string(index=False))
    figures(drawn, options.out)
    print(f"written to {options.out}/")


if __name__ == "__main__":
    main()
