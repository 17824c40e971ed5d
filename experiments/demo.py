"""The main job on real data: learn a prior from tasks by every strategy, adapt it to tasks never
seen, and compare.

(a) Radon in 85 counties and growth of 30 rats: intercept and slope per task with a dense prior and
    a dense guide, beside the exact maximum-likelihood fits of lme4.
(b) Life expectancy in 142 countries: a neural-network prior from 85 training countries; 28 unseen
    countries are adapted from 1952-1977 and scored on 1982-2007.  Every strategy, the same seeds,
    the same budget of gradient evaluations.

    python -m experiments.demo --out results/demo --seeds 3 --size full
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd
import torch
from torch import nn

import varmeta as vm
from varmeta.plot import plot_curves, plot_prior
from varmeta.posteriors import arviz as inference_data
from varmeta.posteriors import calibration
from varmeta.strategies.objective import OuterName

# lme4 1.1-31, ML, `y ~ x + (x | task)`: intercept, slope, their sds, their correlation, residual
# sd, log likelihood.
LME4 = {
    "radon": (1.494187, -0.656136, 0.332841, 0.313740, -0.374557, 0.716995, -1043.521340),
    "rats": (242.653333, 6.185714, 14.007056, 0.499634, 0.671734, 6.014130, -548.028663),
}
LEARNED = "joint (normal), learned precisions"
DENSE = "joint (dense), learned, shared features"
SIZES: dict[str, dict[str, int]] = {
    "full": {"budget": 600, "seeds": 3},
    "smoke": {"budget": 40, "seeds": 2},
}


def mixed_models(out: Path) -> pd.DataFrame:
    """Ours beside lme4's exact answers, one row per quantity."""
    import matplotlib.pyplot as plt

    rows = []
    for name, tasks in (("radon", vm.datasets.radon()), ("rats", vm.datasets.rats())):
        model = vm.TaskModel(
            nn.Linear(1, 1), vm.likelihoods.Gaussian(), vm.GaussianPrior(learn_precision="full")
        )
        begin = perf_counter()
        fit = vm.fit(model, tasks, vm.Joint("multivariate_normal"), progress=False)
        seconds = perf_counter() - begin
        prior = fit.prior
        assert prior.scale is not None  # the Gaussian likelihood learns it
        ours = (
            prior.loc["bias"],
            prior.loc["weight"],
            prior.sd["bias"],
            prior.sd["weight"],
            prior.correlation[0, 1],
            prior.scale,
            torch.tensor(-fit.loss),
        )
        labels = (
            "intercept",
            "slope",
            "sd intercept",
            "sd slope",
            "correlation",
            "residual sd",
            "log likelihood",
        )
        for label, mine, reference in zip(labels, ours, LME4[name], strict=True):
            rows.append(
                {"data": name, "quantity": label, "varmeta": float(mine), "lme4 (ML)": reference}
            )
        print(f"{name}: {fit.stop}; {seconds:.1f} s", flush=True)
        inference_data.save(fit.to_arviz(), out / f"{name}.nc")
        plot_prior(fit)[0, 0].figure.savefig(out / f"{name}_prior.png", dpi=150)
        plt.close("all")
    return pd.DataFrame(rows)


def strategies() -> dict[str, vm.Joint | vm.Implicit | vm.Unrolled | vm.FirstOrder | vm.Reptile]:
    """Every row of the table, with inner loops short enough for the budget and step sizes at which
    none of them diverges.
    """
    inner, adam = vm.GradientDescent(lr=0.003), vm.Adam(lr=3e-2)

    def implicit(outer: OuterName) -> vm.Implicit:
        # five steps an outer step, from where the last ones ended: the certificates say how far
        # that is from a minimum
        return vm.Implicit("delta", outer, 5, adam, vm.CG(max_steps=5), warm_start=True)

    return {
        "joint (normal)": vm.Joint("normal", minimizer=adam),
        LEARNED: vm.Joint("normal", minimizer=adam),
        DENSE: vm.Joint("multivariate_normal", minimizer=adam),
        "joint (delta)": vm.Joint("delta", minimizer=adam),
        "reinit (normal)": vm.Reinit("normal"),
        "implicit, elbo": implicit("elbo"),
        "implicit, query (iMAML)": implicit("query"),
        "unrolled (MAML)": vm.Unrolled("delta", "query", inner_steps=5, minimizer=inner),
        "first order (FOMAML)": vm.FirstOrder("delta", "query", inner_steps=5, minimizer=inner),
        "Reptile": vm.Reptile("delta", inner_steps=5, minimizer=adam),
    }


def tasks_of(countries: pd.DataFrame) -> vm.TaskSet:
    """One task per country: support 1952-1977, query 1982-2007."""
    marked = countries.assign(year=countries["year"].astype(float), later=1 - countries["support"])
    return vm.TaskSet.from_frame(marked, task="country", x=["year"], y="life_exp", query="later")


def floor(points: int, draws: int = 4000) -> float:
    """The calibration error of perfect forecasts of a few independent observations."""
    uniform = torch.rand(draws, points, generator=torch.Generator().manual_seed(0))
    return float(torch.stack([calibration.calibration_error(row) for row in uniform]).mean())


def said(row: dict[str, Any]) -> None:
    """A line for each run as it ends: minutes of silence look like a hang."""
    how = (
        f"{row['seconds']:.1f} s, {row['evaluations']:.0f} evaluations"
        if not row["failed"]
        else row["stop"]
    )
    print(f"seed {row['seed']}: {row['method']} ({how})", file=sys.stderr, flush=True)


def growth(out: Path, seeds: int, budget: float) -> None:
    """Compare the strategies on unseen countries; write the table and the figures."""
    import matplotlib.pyplot as plt

    countries = vm.datasets.gapminder(as_frame=True)
    train, test = (
        tasks_of(countries[countries["task_split"] == part]) for part in ("train", "test")
    )
    train, scaling = train.standardized()
    test = scaling.apply(test)
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    model = vm.TaskModel(net, vm.likelihoods.Gaussian(scale=0.3), vm.GaussianPrior(precision=10.0))
    noise = vm.likelihoods.Gaussian(scale=0.3)
    models = {
        LEARNED: vm.TaskModel(net, noise, vm.GaussianPrior(10.0, "per_parameter")),
        # the hidden layer is the same for all countries; its 9 output weights have a dense prior
        DENSE: vm.TaskModel(net, noise, vm.GaussianPrior(10.0, "full"), shared=["0.*"]),
    }
    report = vm.compare(
        strategies(),
        model,
        train,
        test,
        seeds=seeds,
        models=models,
        budget=budget,
        optimizer=lambda params: torch.optim.Adam(params, lr=3e-2),
        progress=False,
        callback=said,
    )
    print(
        f"\n{len(train)} training countries, {len(test)} unseen; {seeds} seeds; {budget:g} "
        "gradient evaluations per task"
    )
    print(
        "standardised units; mean [95 % interval over seeds and tasks]; coverage is of 90 % "
        "intervals"
    )
    print(
        "calibration error is per country: perfect forecasts of 6 independent years would score "
        f"{floor(6):.2f}"
    )
    print(report)
    report.save(out)
    for metric in ("log_density", "rmse", "coverage"):
        report.plot(metric).figure.savefig(out / f"comparison_{metric}.png", dpi=150)
    fit = report.fits[DENSE, 0]
    posterior = fit.adapt(test)
    years = torch.linspace(1950, 2010, 61, dtype=train.dtype)
    grid = scaling.x(years)
    shown = posterior.names[:: max(1, len(posterior.names) // 6)][:6]
    axes = plot_curves(
        posterior, grid, list(shown), scaling=scaling, labels=("year", "life expectancy (years)")
    )
    axes[0, 0].figure.savefig(out / "unseen_countries.png", dpi=150)
    plot_prior(fit)[0, 0].figure.savefig(out / "gapminder_prior.png", dpi=150)
    plt.close("all")
    inference_data.save(fit.to_arviz(num_samples=200), out / "gapminder.nc")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/demo"))
    parser.add_argument("--seeds", type=int, help="by default 3 (full) or 2 (smoke)")
    parser.add_argument("--size", choices=SIZES, default="full")
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # small matrices: a second thread costs more than it brings
    begin = perf_counter()
    table = mixed_models(arguments.out)
    table.to_csv(arguments.out / "mixed_models.csv", index=False)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.4f}"))
    growth(arguments.out, arguments.seeds or size["seeds"], size["budget"])
    print(f"\nwritten to {arguments.out}/ in {perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
