"""The posterior of eta where the tasks' evidence is known: against guides that move, and dense
covariances.
"""

from __future__ import annotations

import pytest
import torch

import varmeta as vm
from tests.linear_gaussian import REGRESSIONS, dense_evidence, intercepts, moved
from varmeta.fitting.profiled_at_eta import log_evidence, reach
from varmeta.fitting.profiled_evidence import ProfiledEvidence
from varmeta.fitting.reduced import ReducedTasks
from varmeta.hyper import exact, family, integrate
from varmeta.hyper.known import known
from varmeta.numerics.hessian import vector_hessian
from varmeta.numerics.tree import named_parts
from varmeta.priors.factors import PRECISION

DENSE = vm.Joint("multivariate_normal")


@pytest.mark.parametrize("case", REGRESSIONS)
def test_the_evidence_at_any_eta_is_that_of_dense_covariances(case: str) -> None:
    """With its second derivatives, by differences of it."""
    model, tasks = REGRESSIONS[case]()
    start = model.init(torch.zeros((), dtype=torch.float64))
    linear = (*model.shared, *model.coefficients)
    reduced = ReducedTasks.of(model, tasks, linear)
    assert reduced is not None
    objective = ProfiledEvidence(model, reduced, start, linear)
    eta = moved(model, 2)
    found = log_evidence(objective, eta)
    assert float(found) == pytest.approx(float(dense_evidence(model, eta, tasks).sum()), abs=1e-8)
    flat = torch.cat([value.reshape(-1) for value in eta.values()])

    def fn(vector: torch.Tensor) -> torch.Tensor:
        return log_evidence(objective, named_parts(vector, eta))

    hessian, step = vector_hessian(fn, flat), 1e-3
    direction = torch.linspace(-1.0, 1.0, len(flat), dtype=torch.float64)
    ends = fn(flat + step * direction) + fn(flat - step * direction) - 2 * fn(flat)
    assert float(ends / step**2) == pytest.approx(
        float(direction @ hessian @ direction), rel=1e-4, abs=1e-3
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of effective draws, and of sds at 0
@pytest.mark.parametrize("hyperguide", ["multivariate_normal", "normal"])
@pytest.mark.parametrize("case", ["shared sd", "one shared", "known noise", "covariates"])
def test_no_guide_need_move(case: str, hyperguide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tasks = REGRESSIONS[case]()
    with monkeypatch.context() as patch:
        patch.setattr(family, "fit_gaussian", lambda *_, **__: pytest.fail("guides moved"))
        found = vm.fit(model, tasks, DENSE, hyperguide=hyperguide)  # type: ignore[arg-type]
    monkeypatch.setattr(integrate, "profiled", lambda *_, **__: None)
    guided = vm.fit(model, tasks, DENSE, hyperguide=hyperguide)  # type: ignore[arg-type]
    assert found.converged and found.hyper is not None and guided.hyper is not None
    assert found.loss == pytest.approx(guided.loss, abs=1e-5)
    assert found.hyper.log_evidence == pytest.approx(guided.hyper.log_evidence, abs=1e-3)
    for name, value in found.eta.items():
        torch.testing.assert_close(value, guided.eta[name], rtol=0.02, atol=0.02)


def test_a_prior_far_wider_than_the_noise_is_told_apart() -> None:
    """By QR where the products of rows have lost what one more row says."""
    model, tasks = REGRESSIONS["full"]()
    linear, eta = (*model.shared, *model.coefficients), moved(model)
    reduced = ReducedTasks.of(model, tasks, linear)
    assert reduced is not None
    objective = ProfiledEvidence(model, reduced, eta, linear)
    wide = eta | {name: v - 36.0 for name, v in eta.items() if name.startswith(PRECISION)}
    rows = {name: torch.stack([eta[name], wide[name]]) for name in eta}
    found = exact.log_evidence(objective, tasks.batch(), rows)
    expected = [float(known(model, tasks.batch(), rows).log_evidence[k].sum()) for k in range(2)]
    assert reach(objective, eta) < exact.FAR < reach(objective, wide)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


def test_reml_under_a_hyperprior_of_theta0() -> None:
    """The criterion has no closed form there; the Gaussian of theta0 has the evidence still."""
    model, tasks = REGRESSIONS["hyperpriors"]()
    fit = vm.fit(model, tasks, DENSE, hyperguide="reml")
    assert fit.converged and "of the Gaussian of eta" in fit.stop


def test_many_tasks() -> None:
    """5,000, of which no rows of guides are made."""
    model, tasks = intercepts(5_000)
    fit = vm.fit(model, tasks, DENSE, hyperguide="multivariate_normal")
    assert float(fit.prior.sd["intercept"]) == pytest.approx(1.0, abs=0.05)
    assert fit.hyper is not None and fit.hyper.is_reliable
