"""Predictions and scores of linear Gaussian models: against dense covariances, scipy and many
draws.
"""

from __future__ import annotations

import math
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import integrate, optimize, stats
from torch import nn

import varmeta as vm
from tests.cases import seeded
from tests.linear_gaussian import MODELS, REGRESSIONS, dense_evidence, moved
from varmeta.fitting.run import Run
from varmeta.posteriors import draws, metrics, mixture_score, scoring
from varmeta.posteriors.draws import GuideDraws
from varmeta.strategies.strategy import State

X = torch.tensor([[-1.0, 0.5], [0.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
# those whose new observations have one known noise
CASES = ["full", "shared sd", "one shared", "offset", "covariates", "precision weights", "head"]
CASES += ["two outputs", "two outputs of a head"]


def posterior_of(case: str, guide: str = "multivariate_normal") -> vm.Posterior:
    model, tasks = MODELS[case]()
    run = Run(moved(model), State())
    return vm.Fit(model, tasks, vm.Implicit(guide), 0, run).posterior()


@pytest.mark.parametrize("guide", ["multivariate_normal", "normal", "delta"])
@pytest.mark.parametrize("case", CASES)
def test_a_prediction_is_what_its_draws_come_from(case: str, guide: str) -> None:
    posterior = posterior_of(case, guide)
    for found in (posterior.predict(X, 20_000), posterior.expected(X, 20_000)):
        assert found.is_exact
        draws = found.samples
        if guide == "delta" and len(draws) == 1:  # the mean is known
            torch.testing.assert_close(found.mean, draws[0])
            assert not bool(found.sd.any())
            continue
        assert draws.shape[1:] == found.mean.shape == found.sd.shape
        standard = (found.mean - draws.mean(0)) / found.sd
        assert float(standard.abs().max()) < 5 / math.sqrt(20_000)
        assert float((draws.std(0) / found.sd - 1).abs().max()) < 0.04
        low, high = found.interval(0.8)
        inside = ((low <= draws) & (draws <= high)).double().mean(0)
        assert float((inside - 0.8).abs().max()) < 0.02


def test_a_prediction_is_that_of_dense_covariances() -> None:
    """The density of a new observation given the task's own, by two evidences."""
    model, tasks = REGRESSIONS["full"]()
    posterior = posterior_of("full")
    found, eta = posterior.predict(X), posterior.q.eta
    assert isinstance(posterior.q, GuideDraws)
    mean, sd = found.mean[0], found.sd[0]
    here = dense_evidence(model, eta, tasks[:1])[0]
    for k, y in enumerate((0.3, -1.0, 2.0)):
        x0, y0 = tasks[0].support  # type: ignore[misc]
        both = (torch.cat([x0, X[k : k + 1]]), torch.cat([y0, y0.new_tensor([y])]))
        more = dense_evidence(model, eta, vm.TaskSet([vm.Task(both, features={"z": 0.0})]))[0]
        normal = stats.norm(float(mean[k]), float(sd[k]))
        assert float(more - here) == pytest.approx(normal.logpdf(y), abs=1e-8)
        assert found.interval(0.9)[1][0, k] == pytest.approx(normal.ppf(0.95), abs=1e-9)


def test_no_draw_is_taken_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = posterior_of("full")
    expected = posterior.predict(X, 50, seed=3).samples
    found = posterior.predict(X, 50, seed=3)
    with monkeypatch.context() as patch:
        patch.setattr(type(posterior.observer), "new", lambda *_: pytest.fail("drawn"))
        assert np.isfinite(found.frame()[["mean", "sd", "low", "high"]].to_numpy()).all()
        assert repr(found) == "<Prediction: known by formula for 16 tasks at 3 points>"
    assert torch.equal(found.samples, expected)
    with pytest.raises(ValueError, match="num_samples"):
        posterior.predict(X, 0)


@pytest.fixture(scope="module")
def integrated() -> vm.Posterior:
    model, tasks = REGRESSIONS["shared sd"]()
    return vm.fit(model, tasks, hyperguide="multivariate_normal", progress=False).posterior()


def test_under_a_posterior_of_eta_it_is_a_mixture(integrated: vm.Posterior) -> None:
    """By scipy, over the components one by one."""
    found, parts = integrated.predict(X), integrated.q.components()
    assert parts is not None and found.is_exact and parts.root is not None
    at = X[2]
    design = torch.cat([torch.ones(1, dtype=torch.float64), at])
    means = (parts.loc[:, 0] @ design).numpy()
    spread = (parts.root[:, 0].mT @ design).square().sum(-1)
    sds = (spread + (2 * parts.eta["log_scale"]).exp()).sqrt().numpy()
    share = parts.share.numpy()
    mean = share @ means
    assert float(found.mean[0, 2]) == pytest.approx(mean, abs=1e-9)
    variance = share @ (sds**2 + (means - mean) ** 2)
    assert float(found.sd[0, 2]) == pytest.approx(math.sqrt(variance), abs=1e-9)
    low, high = found.interval(0.9)
    for end, p in ((low, 0.05), (high, 0.95)):
        root = optimize.brentq(lambda y, p=p: share @ stats.norm.cdf(y, means, sds) - p, -50, 50)
        assert float(end[0, 2]) == pytest.approx(root, abs=1e-9)
    draws = found.samples[:, 0, 2]
    assert float(draws.mean()) == pytest.approx(mean, abs=0.15)


def test_the_score_under_a_posterior_of_eta(integrated: vm.Posterior) -> None:
    """Density and CRPS of one task's query rows by scipy, and within its error of many draws."""
    table = integrated.score()
    parts = integrated.q.components()
    assert parts is not None and parts.root is not None
    x, y = integrated.tasks[3].query  # type: ignore[misc]
    share, log_density, crps = parts.share.numpy(), [], []
    for row, value in zip(x, y.tolist(), strict=True):
        design = torch.cat([torch.ones(1, dtype=torch.float64), row])
        means = (parts.loc[:, 3] @ design).numpy()
        spread = (parts.root[:, 3].mT @ design).square().sum(-1)
        sds = (spread + (2 * parts.eta["log_scale"]).exp()).sqrt().numpy()
        log_density.append(math.log(share @ stats.norm.pdf(value, means, sds)))
        grid = np.linspace(-30, 30, 4001)
        cdf = stats.norm.cdf(grid[:, None], means, sds) @ share
        crps.append(integrate.trapezoid((cdf - (grid >= value)) ** 2, grid))
    assert table["log_density"].iloc[3] == pytest.approx(np.mean(log_density), abs=1e-10)
    assert table["crps"].iloc[3] == pytest.approx(np.mean(crps), abs=0.01)
    error = table.attrs["log_density_se"]["all"]
    assert 0 < error < 0.01
    log_prob, mask = integrated.log_prob(num_samples=2000)
    drawn = (log_prob.logsumexp(0) - math.log(2000))[mask].mean()
    assert table.loc["all", "log_density"] == pytest.approx(float(drawn), abs=0.05)
    assert list(table.columns) == [
        "n", "log_density", "rmse", "coverage", "calibration_error", "crps"
    ]  # fmt: skip


@pytest.mark.parametrize("number", [2, 3, 7, 200])
def test_the_crps_of_a_mixture_of_few_or_many(number: int) -> None:
    """An ensemble's members are few, so that two draws are often of the same one."""
    generator = torch.Generator().manual_seed(number)
    share, mean, variance = (
        torch.rand(number, 1, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    share, mean, variance = (share / share.sum())[:, 0], 8 * mean - 4, variance.unsqueeze(-1) + 0.1
    y = torch.full((1, 1), 0.3, dtype=torch.float64)
    found = mixture_score._judged(share, mean.unsqueeze(-1), variance.unsqueeze(-1), y)[3]
    grid = np.linspace(-30, 30, 60_001)
    each = stats.norm.cdf(grid[:, None], mean[:, 0].numpy(), variance[:, 0, 0].sqrt().numpy())
    expected = integrate.trapezoid((each @ share.numpy() - (grid >= 0.3)) ** 2, grid)
    # of many, each is paired with a few others
    assert float(found) == pytest.approx(expected, abs=1e-3 if number < 64 else 0.1)


def test_a_mixture_of_one_scores_as_a_normal() -> None:
    posterior = posterior_of("two outputs")
    data = posterior.tasks.batch().require_query()
    parts = posterior.q.components()
    assert parts is not None
    one = mixture_score.row_of(posterior.model, parts, data, 0.9)(slice(None))
    other = scoring.row_of(posterior.observer, data, 1, 0, 0.9)(slice(None))
    assert one == pytest.approx(other, abs=1e-10)


def test_padding_is_nothing_and_a_prediction_can_be_stored(integrated: vm.Posterior) -> None:
    x = [X[: 1 + i % 3] for i in range(len(integrated.tasks))]
    found, whole = integrated.predict(x, 20), integrated.predict(X, 20)
    mask = found.mask
    for one, other in zip(found.interval(), whole.interval(), strict=True):
        torch.testing.assert_close(one[mask], other[mask])
        assert not bool(one[~mask].any())
    again = pickle.loads(pickle.dumps(found))
    assert torch.equal(again.samples, found.samples) and again.is_exact
    pd.testing.assert_frame_equal(again.frame(), found.frame())


def test_a_guide_that_holds_its_square_root_in_parts_is_drawn_from_where_it_is_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = vm.TaskModel(
        seeded(lambda: nn.Linear(6, 1)), vm.likelihoods.Gaussian(), vm.GaussianPrior()
    )
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    run = Run(moved(model), State())
    tasks = vm.TaskSet([vm.Task((x, x[:, 0]))])
    posterior = vm.Fit(model, tasks, vm.Joint(vm.guides.LowRank(1)), 0, run).posterior()
    assert posterior.predict(x).is_exact
    monkeypatch.setattr(draws, "MAX_KNOWN_SIZE", 6)
    assert not posterior.predict(x, 10).is_exact
    assert posterior_of("full").predict(X).is_exact


def test_a_mixture_in_float32_keeps_its_digits_and_tells_lost_ones() -> None:
    """Two equal components are one normal; of responses that go together float32 loses it."""
    y = torch.tensor([[3.0, 3.0]])
    share, mean = torch.tensor([0.5, 0.5]), torch.zeros(2, 1, 2)
    together = torch.tensor([[1.0, 1 - 1e-6], [1 - 1e-6, 1.0]]).expand(2, 1, 2, 2)
    one = metrics.normal(mean[0], together[0], y)["log_density"]
    log_prob = mixture_score._judged(share, mean, together, y)[0]
    assert log_prob[:, 0].tolist() == pytest.approx([one, one], rel=1e-12)
    none = torch.tensor([[1.0, 2.0], [2.0, 1.0]]).expand(2, 1, 2, 2)
    assert bool(mixture_score._judged(share, mean, none, y)[0].isnan().all())
