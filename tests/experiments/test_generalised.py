"""The binomial and Poisson models of experiments/mixed_models: lme4's log likelihoods by
quadrature, and where guides fail.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

import varmeta as vm
from experiments.mixed_models.generalised import GENERALISED, Generalised, bank, log_likelihood
from tests.conftest import shared_data

CASES = {case.data: case for case in GENERALISED}


def case_of(name: str) -> Generalised:
    shared_data(name)
    return CASES[name]


@pytest.mark.parametrize(
    ("name", "error"), [("cbpp", 1e-9), ("epil", 1e-9), ("sitecounts", 1e-8), ("toenail", 1e-3)]
)  # toenail: lme4's 50 nodes
def test_the_log_likelihood_is_lme4s_by_quadrature(name: str, error: float) -> None:
    """With the constant that glmer leaves out, that of the saturated model."""
    case = case_of(name)
    theirs = case.references()["lme4, quadrature"]
    eta = {
        key: torch.tensor([theirs[key]], dtype=torch.float64)
        for key in ("intercept", *case.columns)
    }
    eta["log_precision"] = -2.0 * torch.tensor([theirs["sd"]], dtype=torch.float64).log()
    assert log_likelihood(case.model(), case.tasks(), eta) == pytest.approx(
        theirs["objective"], abs=error
    )


def test_cbpp_under_each_guide() -> None:
    rows = {row["method"]: row for row in case_of("cbpp").rows(("multivariate_normal", "laplace"))}
    assert (
        rows["lme4, Laplace"]["worst_fixed"] < 0.005
        and rows["lme4, quadrature"]["worst_fixed"] == 0.0
    )
    for method in ("multivariate_normal", "laplace"):
        row = rows[method]
        assert row["worst_fixed"] < 0.005 and abs(row["sd_error"]) < 0.01
        # importance weights and quadrature are two roads to one number
        assert row["evidence"] == pytest.approx(row["log_likelihood"], abs=4 * row["evidence_se"])
        assert row["elbo"] < row["log_likelihood"] and row["not_usable"] == 0


def test_toenail_shows_in_the_diagnostics() -> None:
    """Laplace's objective lies above the log likelihood, cubature's "bound" far above; by
    Gauss-Hermite it is a bound.
    """
    case = case_of("toenail")
    found: dict[str, Any] = {}
    for name, strategy in {
        "laplace": vm.Implicit("laplace"),
        "cubature": vm.Joint("normal", expectation="cubature"),
        "quadrature": vm.Joint("normal", expectation="quadrature"),
    }.items():
        said = "nats (above|below) -log evidence" if name != "laplace" else None
        with pytest.warns(RuntimeWarning, match=said) if said else contextlib.nullcontext():
            fit = vm.fit(case.model(), case.tasks(), strategy, compile=False, progress=False)
        found[name] = {
            **fit.posterior().evidence(20_000).loc["all"],
            "sd": float(fit.prior.sd["intercept"]),
        }
    exact = case.references()["lme4, quadrature"]
    for name in ("laplace", "cubature"):
        assert found[name]["objective"] > found[name]["evidence"] + 4 * found[name]["se"]
        assert found[name]["sd"] > 1.1 * exact["sd"]
    assert found["quadrature"]["objective"] < exact["objective"]
    assert 0.85 * exact["sd"] < found["quadrature"]["sd"] < exact["sd"]
    assert found["quadrature"]["evidence"] > max(
        found["laplace"]["evidence"], found["cubature"]["evidence"]
    )


def test_bank_on_a_few_persons() -> None:
    shared_data("bank")
    (row,) = bank(30, methods=("normal",))
    assert row["converged"] and row["log_loss"] < 0.65  # a coin's is 0.69
    assert row["elbo"] < row["evidence"] and row["evidence_se"] < 0.2
