"""Does varmeta give the answers of lme4, and of long runs of MCMC, on real nested data?  One table,
ours beside theirs.

classical: maximum likelihood and REML with standard errors, beside lme4, and radon's 386 counties.
bayesian: the posterior of eta and of every task, beside reference posteriors.
generalised: binomial and Poisson models under each guide, beside lme4's Laplace and adaptive
quadrature (a table of its own).

    python -m experiments.mixed_models --out results/mixed_models --size full --part all
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.mixed_models.bayesian import BAYESIAN
from experiments.mixed_models.classical import CLASSICAL, radon_all
from experiments.mixed_models.generalised import GENERALISED, bank
from experiments.mixed_models.sets import COLUMNS, SHARED


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per fit: the worst of its quantities."""
    parts = []
    for (part, data, model), group in rows.groupby(["part", "data", "model"], sort=False):
        parts.append(
            {
                "part": part,
                "data": data,
                "model": model,
                "quantities": len(group),
                "worst_error": group.error.max(),
                "sd_ratio_low": group.sd_ratio.min(),
                "sd_ratio_high": group.sd_ratio.max(),
                "k_hat": group.k_hat.max(),
                "ess": group.ess.min(),
                "seconds": group.seconds.max(),
            }
        )
    return pd.DataFrame(parts)


PARTS = ("classical", "bayesian", "generalised", "all")


def compared(options: argparse.Namespace) -> None:
    """The table of `classical` and `bayesian`, written again after every fit."""
    small = options.size == "smoke"
    rows: list[dict[str, Any]] = []
    jobs: list[Callable[[], list[dict[str, Any]]]] = []
    if options.part in ("classical", "all"):
        jobs += [case.rows for case in (CLASSICAL[:2] if small else CLASSICAL)]
    if options.part in ("bayesian", "all"):
        jobs += [
            lambda case=case: case.rows(options.seed)  # type: ignore[misc]
            for case in (BAYESIAN[:1] if small else BAYESIAN)
        ]
    if options.part in ("classical", "all"):
        jobs += [] if small else [radon_all]
    for job in jobs:
        rows += job()
        table = pd.DataFrame(rows).reindex(columns=COLUMNS)
        table.to_csv(options.out / "quantities.csv", index=False)
        print(summary(table).iloc[[-1]].to_string(header=len(rows) < 10), flush=True)
    if rows:
        table = summary(pd.DataFrame(rows).reindex(columns=COLUMNS))
        table.to_csv(options.out / "summary.csv", index=False)
        print(
            "\nerror: relative beside lme4, in reference sds beside posteriors\n"
            + table.round(5).to_string(index=False)
        )


def generalised_models(options: argparse.Namespace) -> None:
    """The table of `generalised`, written again after every set."""
    small = options.size == "smoke"
    rows: list[dict[str, Any]] = []
    jobs: list[Callable[[], list[dict[str, Any]]]] = [
        lambda case=case: case.rows(seed=options.seed)  # type: ignore[misc]
        for case in (GENERALISED[:1] if small else GENERALISED)
    ]
    for job in [*jobs, *([] if small else [lambda: bank(seed=options.seed)])]:
        found = pd.DataFrame(job())
        rows += found.to_dict("records")
        pd.DataFrame(rows).to_csv(options.out / "generalised.csv", index=False)
        print(found.dropna(axis=1, how="all").round(4).to_string(index=False), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/mixed_models"))
    parser.add_argument("--size", choices=("smoke", "full"), default="full")
    parser.add_argument("--part", choices=PARTS, default="all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not SHARED.is_dir():
        sys.exit(f"no reference data at {SHARED}: name their folder by VARMETA_SHARED")
    options.out.mkdir(parents=True, exist_ok=True)
    compared(options)
    if options.part in ("generalised", "all"):
        generalised_models(options)


if __name__ == "__main__":
    main()
