"""Time to a given accuracy: the exact maximum-likelihood fit of y ~ x + (x | task), against MixedLM
and NUTS.

    python -m experiments.benchmarks.accuracy '{"data": "radon_all", "method": "varmeta"}'

Every answer is judged by the same numbers: the exact log likelihood at what was found, and how far
theta0, the sds and the residual sd are from lme4's.  NUTS samples a posterior under wide priors,
whose means are not the maximum of the likelihood; its time is that to 400 effective samples of the
worst of the six numbers.  MixedLM is run as its documentation does, and by Powell's method, since
its default search may end short of the maximum.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd

METHODS = ("varmeta", "statsmodels", "statsmodels, powell", "numpyro")
EFFECTIVE, WARMUP, BLOCK, MAX_DRAWS = 400, 500, 500, 4_000
# lme4 1.1-31, ML, of the set that is shipped; those of the others stand beside their data
SHIPPED = ((1.494187, -0.656136), (0.332841, 0.313740), 0.716995)
COLUMNS = {
    "radon_all": ("county", "floor", "log_radon", "intercept_slope_ML"),
    "hsb82": ("school", "cses", "mAch", "ML"),
}


@dataclass(frozen=True)
class Answer:
    """theta0: intercept and slope; covariance `(2, 2)` between tasks; sigma: residual sd."""

    theta0: np.ndarray
    covariance: np.ndarray
    sigma: float


def main() -> None:
    asked = json.loads(sys.argv[1])
    print(json.dumps(asked | measure(**asked)))


def sets() -> tuple[str, ...]:
    """What there is to fit: larger sets lie in `$VARMETA_SHARED/data` where somebody has them."""
    return tuple(name for name in COLUMNS if _file(name).exists()) or ("radon",)


def _file(name: str) -> Path:
    return Path(os.environ.get("VARMETA_SHARED", "../shared")) / "data" / name / "data.csv"


def load(name: str) -> tuple[pd.DataFrame, tuple[Any, Any, float]]:
    """A table with task, x and y, and lme4's (theta0, sds, sigma)."""
    if name == "radon":
        import varmeta as vm

        rows = [
            (t.name, x, y)
            for t in vm.datasets.radon()
            if t.support
            for x, y in zip(*t.support, strict=True)
        ]
        frame = pd.DataFrame(rows, columns=["task", "x", "y"])
        return frame.astype({"x": float, "y": float}), SHIPPED
    task, x, y, key = COLUMNS[name]
    frame = pd.read_csv(_file(name))[[task, x, y]].set_axis(["task", "x", "y"], axis=1).dropna()
    if name == "radon_all":
        frame = frame[frame["x"].isin([0, 1])]
    fit = json.loads((_file(name).parent / "reference.json").read_text())["fits"][key]
    sds = [row["sd_or_corr"] for row in fit["random"] if row["var2"] is None and row["var1"]]
    return frame.astype({"x": float, "y": float}), (fit["fixed"]["estimate"], sds, fit["sigma"])


def measure(data: str, method: str) -> dict[str, Any]:
    frame, (theta0, sds, sigma) = load(data)
    warnings.simplefilter("ignore")
    try:
        begin = perf_counter()
        known: dict[str, Callable[[pd.DataFrame], tuple[Answer, dict[str, Any]]]] = {
            "varmeta": ours,
            "statsmodels": mixedlm,
            "statsmodels, powell": partial(mixedlm, method=["powell"]),
            "numpyro": nuts,
        }
        answer, extra = known[method](frame)
        seconds = perf_counter() - begin
    except ImportError:
        return {"note": "not installed"}
    found = np.sqrt(np.diag(answer.covariance))
    return {
        "tasks": frame["task"].nunique(),
        "rows": len(frame),
        "s": seconds,
        "theta0_gap": float(np.abs(answer.theta0 - np.asarray(theta0)).max()),
        "sd_gap": float(np.abs(found / np.asarray(sds) - 1).max()),
        "sigma_gap": abs(answer.sigma / sigma - 1),
        "loglik": log_likelihood(frame, answer),
    } | extra


def log_likelihood(frame: pd.DataFrame, at: Answer) -> float:
    """Exact: each task is N(X theta0, X C X' + sigma^2 I), by its 2 x 2 form."""
    total = 0.0
    for _, rows in frame.groupby("task"):
        x = np.stack([np.ones(len(rows)), rows["x"].to_numpy()], -1)
        r = rows["y"].to_numpy() - x @ at.theta0
        inside = np.eye(2) + at.covariance @ (x.T @ x) / at.sigma**2
        pull = x.T @ r / at.sigma**2
        squares = r @ r / at.sigma**2 - pull @ np.linalg.solve(inside, at.covariance @ pull)
        total -= 0.5 * (
            squares + np.linalg.slogdet(inside)[1] + len(r) * np.log(2 * np.pi * at.sigma**2)
        )
    return float(total)


def ours(frame: pd.DataFrame) -> tuple[Answer, dict[str, Any]]:
    import torch

    import varmeta as vm

    begin = perf_counter()
    tasks = vm.TaskSet.from_frame(frame, task="task", x=["x"], y="y").to(torch.float64)
    net = torch.nn.Linear(1, 1).double()
    model = vm.TaskModel(net, vm.likelihoods.Gaussian(), vm.GaussianPrior(learn_precision="full"))
    fit = vm.fit(model, tasks, vm.Joint("multivariate_normal"), progress=False)
    prior = fit.prior
    assert prior.scale is not None  # the likelihood has one
    order = [list(model.weights.names).index(name) for name in ("bias", "weight")]
    sds = np.array([float(prior.sd["bias"]), float(prior.sd["weight"])])
    correlation = np.asarray(prior.correlation)[np.ix_(order, order)]
    theta0 = np.array([float(prior.loc["bias"]), float(prior.loc["weight"])])
    extra = {"converged": fit.converged, "fit_s": perf_counter() - begin, "steps": fit.stop}
    return Answer(theta0, correlation * np.outer(sds, sds), float(prior.scale)), extra


def mixedlm(frame: pd.DataFrame, **how: Any) -> tuple[Answer, dict[str, Any]]:
    import statsmodels.formula.api as smf

    begin = perf_counter()
    fit = smf.mixedlm("y ~ x", frame, groups="task", re_formula="~x").fit(reml=False, **how)
    answer = Answer(fit.fe_params.to_numpy(), np.asarray(fit.cov_re), float(np.sqrt(fit.scale)))
    return answer, {"converged": bool(fit.converged), "fit_s": perf_counter() - begin}


def nuts(frame: pd.DataFrame) -> tuple[Answer, dict[str, Any]]:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.diagnostics import effective_sample_size
    from numpyro.infer import MCMC, NUTS

    jax.config.update("jax_enable_x64", True)
    codes, _ = pd.factorize(frame["task"])
    x, y = jnp.asarray(frame["x"].to_numpy()), jnp.asarray(frame["y"].to_numpy())
    count, wide = int(codes.max()) + 1, 10.0 * float(frame["y"].std())

    def model() -> None:
        theta0 = numpyro.sample("theta0", dist.Normal(0.0, wide).expand([2]).to_event(1))
        sds = numpyro.sample("sds", dist.HalfNormal(wide).expand([2]).to_event(1))
        factor = numpyro.sample("factor", dist.LKJCholesky(2, 1.0))
        sigma = numpyro.sample("sigma", dist.HalfNormal(wide))
        with numpyro.plate("tasks", count):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        theta = theta0 + z @ (sds[:, None] * factor).T
        numpyro.sample("y", dist.Normal(theta[codes, 0] + theta[codes, 1] * x, sigma), obs=y)

    begin = perf_counter()
    chain = MCMC(NUTS(model), num_warmup=WARMUP, num_samples=BLOCK, progress_bar=False)
    chain.run(jax.random.PRNGKey(0))
    blocks: list[dict[str, np.ndarray]] = []
    while True:
        blocks.append(
            {name: np.asarray(value) for name, value in chain.get_samples().items() if name != "z"}
        )
        draws = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        numbers = np.column_stack(
            [draws["theta0"], draws["sds"], draws["factor"][:, 1, 0], draws["sigma"]]
        )
        effective = float(
            min(effective_sample_size(numbers[None, :, j]) for j in range(numbers.shape[1]))
        )
        if effective >= EFFECTIVE or len(numbers) >= MAX_DRAWS:
            break
        chain.post_warmup_state = chain.last_state
        chain.run(chain.last_state.rng_key)
    seconds = perf_counter() - begin
    spread = draws["sds"][:, :, None] * draws["factor"]
    covariance = (spread @ spread.transpose(0, 2, 1)).mean(0)
    answer = Answer(draws["theta0"].mean(0), covariance, float(draws["sigma"].mean()))
    return answer, {"fit_s": seconds, "draws": len(numbers), "effective": effective}


if __name__ == "__main__":
    main()
