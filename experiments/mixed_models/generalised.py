"""Binomial and Poisson mixed models under each guide, beside lme4's Laplace and adaptive
quadrature.

cbpp, epil, sitecounts, grouseticks (brood only), toenail: one random intercept, for which the
mean-field and the dense guide are one.  Of each fit: how far its estimates are from lme4's by
quadrature, in lme4's standard errors; its objective beside the log likelihood at its estimates, by
importance weights of its own guides and by quadrature; and what the weights say of the guides.
bank: 14 weights for each of 946 persons, on which guides differ; no lme4, so judged by the choices
that were held out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

import varmeta as vm
from experiments.mixed_models.sets import INTERCEPT, reference, regression, table
from varmeta.hyper.conditional import conditionals, log_joint
from varmeta.models.hyper_posterior import Hyperguide

METHODS: dict[str, tuple[Any, Hyperguide]] = {
    "normal": (vm.Joint("normal", expectation="cubature"), "delta"),
    "multivariate_normal": (vm.Joint("multivariate_normal", expectation="cubature"), "delta"),
    "multivariate_normal, Gauss-Hermite": (
        vm.Joint("multivariate_normal", expectation="quadrature"),
        "delta",
    ),
    "laplace": (vm.Implicit("laplace"), "delta"),
    "posterior of eta": (vm.Joint("multivariate_normal"), "multivariate_normal"),
}
FEW_METHODS = (
    "multivariate_normal",
    "multivariate_normal, Gauss-Hermite",
    "laplace",
    "posterior of eta",
)
# Fewer draws of a one-dimensional guide that is nearly right give k-hats of 1 to 5 where the tail
# is light (docs/guides.md).
DRAWS = 40_000
# Of the quadrature, in sds of the Gaussian at the mode: where it ends, and how many nodes it has.
GRID, NODES = 12.0, 601


@dataclass(frozen=True)
class Generalised:
    """A model with a random intercept: `columns` in lme4's order, `y` a column or successes and
    trials; lme4's fits by name.
    """

    data: str
    task: str
    columns: tuple[str, ...]
    y: str | list[str]
    likelihood: Callable[[], Any]
    prepare: Callable[[pd.DataFrame], pd.DataFrame]
    laplace: str = "laplace"
    quadrature: str | None = "agq"

    def frame(self) -> pd.DataFrame:
        return self.prepare(table(self.data))

    def tasks(self) -> vm.TaskSet:
        tasks = vm.TaskSet.from_frame(self.frame(), task=self.task, x=list(self.columns), y=self.y)
        return tasks.to(dtype=torch.float64)

    def model(self) -> vm.TaskModel:
        prior = vm.GaussianPrior(learn_precision="shared")
        return regression(self.columns, self.likelihood(), prior, self.columns)

    def saturated(self) -> float:
        """The log likelihood of a model with a number for every row, which glmer leaves out with
        nAGQ > 1.
        """
        frame = self.frame()
        if isinstance(self.y, list):
            k, n = (frame[name].to_numpy(float) for name in self.y)
            return float(stats.binom(n, k / n).logpmf(k).sum())
        y = frame[self.y].to_numpy(float)
        return 0.0 if set(y) <= {0.0, 1.0} else float(stats.poisson(y).logpmf(y).sum())

    def references(self) -> dict[str, dict[str, Any]]:
        """lme4's fits as `rows` has ours, the log likelihood by quadrature with its constant."""
        fits = reference(self.data, "reference.json")["fits"]
        found = {}
        for method, name in (
            ("lme4, Laplace", self.laplace),
            ("lme4, quadrature", self.quadrature),
        ):
            if name is not None:
                fixed, random = fits[name]["fixed"], fits[name]["random"][0]
                constant = 0.0 if "Laplace" in method else self.saturated()
                found[method] = dict(
                    zip((INTERCEPT, *self.columns), fixed["estimate"], strict=True)
                ) | {
                    "sd": random["sd_or_corr"],
                    "objective": fits[name]["logLik"] + constant,
                    "errors": fixed["std_error"],
                }
        return found

    def rows(self, methods: Sequence[str] = FEW_METHODS, seed: int = 0) -> list[dict[str, Any]]:
        """A row per method, lme4's first."""
        model, tasks, theirs = self.model(), self.tasks(), self.references()
        best = theirs.get("lme4, quadrature", theirs["lme4, Laplace"])
        rows = [
            {"method": method} | self._numbers(model, tasks, found, best)
            for method, found in theirs.items()
        ]
        for method in methods:
            strategy, hyperguide = METHODS[method]
            begin = perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", RuntimeWarning
                )  # what is doubtful stands in the table
                fit = vm.fit(
                    model,
                    tasks,
                    strategy,
                    hyperguide=hyperguide,
                    seed=seed,
                    compile=False,
                    progress=False,
                )
            seconds = perf_counter() - begin
            if fit.hyper is None:
                named = {
                    name: float(value) for name, value in (fit.prior.loc | fit.prior.shared).items()
                }
                found = named | {"sd": float(fit.prior.sd[INTERCEPT]), "objective": -fit.loss}
                row = self._numbers(model, tasks, found, best) | _guides(fit, seed)
            else:
                means = fit.hyperparameters()["mean"]
                found = {name: float(means[name]) for name in (INTERCEPT, *self.columns)}
                found |= {"sd": float(means["sd(intercept)"])}
                row = self._numbers(model, tasks, found, best) | {"worst_k": fit.hyper.pareto_k}
            rows.append({"method": method, **row, "seconds": seconds})
        return [{"data": self.data, **row} for row in rows]

    def _numbers(
        self, model: vm.TaskModel, tasks: vm.TaskSet, found: dict[str, Any], best: dict[str, Any]
    ) -> dict[str, Any]:
        """Estimates beside the best of lme4's, and the log likelihood at them."""
        names = (INTERCEPT, *self.columns)
        eta = {name: torch.tensor([found[name]], dtype=torch.float64) for name in names}
        eta["log_precision"] = -2.0 * torch.tensor([found["sd"]], dtype=torch.float64).log()
        away = [abs(found[n] - best[n]) / e for n, e in zip(names, best["errors"], strict=True)]
        return {
            **{f"b({name})": found[name] for name in names},
            "sd": found["sd"],
            "worst_fixed": max(away),
            "sd_error": found["sd"] / best["sd"] - 1.0,
            "objective": found.get("objective", np.nan),
            "log_likelihood": log_likelihood(model, tasks, eta),
        }


def log_likelihood(model: vm.TaskModel, tasks: vm.TaskSet, eta: dict[str, torch.Tensor]) -> float:
    """With the random intercepts integrated out by the trapezoidal rule on a fine grid around each
    task's mode.

    eta: one row of each entry.
    """
    batch = tasks.batch()
    found = conditionals(model, batch, eta, True)
    z = torch.linspace(-GRID, GRID, NODES, dtype=torch.float64)
    theta = found.mode[0] + found.factor[0, :, :, 0] * z[:, None, None]  # (nodes, tasks, 1)
    with torch.no_grad():
        log_p = log_joint(
            model, theta, {name: value[0] for name, value in eta.items()}, batch.support
        )
    step = math.log(2 * GRID / (NODES - 1))
    return float((log_p.logsumexp(0) + found.factor[0, :, 0, 0].log() + step).sum())


def _guides(fit: vm.Fit, seed: int, draws: int = DRAWS) -> dict[str, Any]:
    """The evidence by importance weights, and what the weights say of the tasks' guides."""
    posterior = fit.posterior()
    total, table = posterior.evidence(draws, seed).loc["all"], posterior.diagnose(draws, seed)
    return {
        "elbo": total["elbo"],
        "evidence": total["evidence"],
        "evidence_se": total["se"],
        "median_gap": table["gap"].median(),
        "worst_k": table["k_hat"].max(),
        "not_usable": int((~table["reading"].isin(["good", "usable"])).sum()),
    }


def _cbpp(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(**{f"period{p}": (frame.period == p).astype(float) for p in (2, 3, 4)})


def _epil(frame: pd.DataFrame) -> pd.DataFrame:
    lbase, lage = np.log(frame.base / 4), np.log(frame.age)
    frame = frame.assign(
        lbase=lbase - lbase.mean(),
        lage=lage - lage.mean(),
        trt=(frame.trt == "progabide").astype(float),
    )
    return frame.assign(lbase_trt=frame.lbase * frame.trt)


def _grouseticks(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(**{f"year{y}": (frame["YEAR"] == y).astype(float) for y in (96, 97)})


def _toenail(frame: pd.DataFrame) -> pd.DataFrame:
    trt = (frame.treatment == "terbinafine").astype(float)
    return frame.assign(trt=trt, trt_time=trt * frame.time)


GENERALISED = (
    Generalised(
        "cbpp",
        "herd",
        ("period2", "period3", "period4"),
        ["incidence", "size"],
        vm.likelihoods.Binomial,
        _cbpp,
    ),
    Generalised(
        "epil",
        "subject",
        ("lbase", "trt", "lage", "V4", "lbase_trt"),
        "y",
        vm.likelihoods.Poisson,
        _epil,
    ),
    Generalised("sitecounts", "site", (), "count", vm.likelihoods.Poisson, lambda frame: frame),
    # lme4's fit of all three groupings has no counterpart here, and there is none by quadrature
    Generalised(
        "grouseticks",
        "BROOD",
        ("year96", "year97", "cHEIGHT"),
        "TICKS",
        vm.likelihoods.Poisson,
        _grouseticks,
        "brood_only",
        None,
    ),
    Generalised(
        "toenail", "patientID", ("trt", "time", "trt_time"), "y", vm.likelihoods.Bernoulli, _toenail
    ),
)


def bank(
    persons: int = 200,
    seed: int = 0,
    methods: Sequence[str] = ("normal", "multivariate_normal", "laplace"),
) -> list[dict[str, Any]]:
    """Each guide's prior over 14 weights, independent under the prior, learned from the persons of
    `train`, adapted to eight choices of each person of `test`, judged by that person's others.
    persons: the first so many of each.
    """
    frame = table("bank")
    columns = [
        name for name in frame.columns if name not in ("id", "choice", "task_split", "support")
    ]
    frame["held_out"] = 1 - frame.support
    train, test = (
        vm.TaskSet.from_frame(
            frame[frame.task_split == part],
            task="id",
            x=columns,
            y="choice",
            query=None if part == "train" else "held_out",
        ).to(dtype=torch.float64)[:persons]
        for part in ("train", "test")
    )
    prior = vm.GaussianPrior(learn_precision="per_parameter")
    model = vm.TaskModel(
        vm.LinearPredictor(columns, intercept=False), vm.likelihoods.Bernoulli(), prior
    )
    rows = []
    for method in methods:
        begin = perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            fit = vm.fit(model, train, METHODS[method][0], seed=seed, progress=False)
            seconds = perf_counter() - begin
            adapted = fit.adapt(test)
        score = adapted.score().loc["all"]
        rows.append(
            {
                "data": "bank",
                "method": method,
                "objective": -fit.loss,
                **_guides(fit, seed, 4000),
                "sd": float(torch.stack(list(fit.prior.sd.values())).mean()),
                "log_loss": -score["log_density"],
                "error_rate": score["error_rate"],
                "converged": fit.converged,
                "seconds": seconds,
            }
        )
    return rows
