"""Predictions and scores run shared layers once for all draws, and put out what they did."""

from __future__ import annotations

import pytest
import torch

import varmeta as vm
from tests.cases import ragged_tasks
from tests.models.test_shared_layers import SHARED, calls, model_of, whole
from varmeta.fitting.run import Run
from varmeta.posteriors import slices
from varmeta.strategies.strategy import State


def posterior(guide: str, shared: tuple[str, ...] = SHARED) -> vm.Posterior:
    model, tasks = model_of("skip", shared=shared), ragged_tasks(4)
    run = Run(model.init(torch.zeros((), dtype=torch.float64)), State())
    strategy = vm.Joint(guide, adapt_steps=3)
    return vm.Fit(model, tasks, strategy, 0, run).adapt(tasks)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("guide", ["delta", "normal", "multivariate_normal"])
def test_numbers_are_those_of_the_whole_network(
    guide: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, x = posterior(guide), torch.linspace(-1.0, 1.0, 5, dtype=torch.float64).unsqueeze(-1)
    draws = found.q.theta(6, 0)
    # two chunks of draws, and of the tasks
    monkeypatch.setattr(slices, "CHUNK", 1_500)

    def numbers() -> list[torch.Tensor]:
        score = torch.tensor(found.score(num_samples=6).to_numpy(float))
        log_likelihood = found.log_likelihood(draws)
        return [score, found.expected(x, 6).samples, found.predict(x, 6).samples, log_likelihood]

    after = numbers()
    with whole():
        expected = numbers()
    for one, other in zip(after, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, equal_nan=True)


def test_the_body_runs_once_for_all_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    found = posterior("normal")
    monkeypatch.setattr(slices, "CHUNK", 1_500)
    monkeypatch.setattr(slices, "_on_the_way", lambda *_: 300)
    before = calls(found.model)
    found.observer.log_likelihood(found.q.theta(50, 0), found.q.eta)
    # for one task, to see how much it puts out, and for all
    assert calls(found.model) == before + 2
    monkeypatch.setattr(slices, "KEPT", 10)  # of less room nothing is kept
    before = calls(found.model)
    found.observer.log_likelihood(found.q.theta(50, 0), found.q.eta)
    assert calls(found.model) > before + 10


@pytest.mark.parametrize("shared", [SHARED, ()])
def test_a_point_is_one_pass_whatever_is_asked(shared: tuple[str, ...]) -> None:
    found, x = posterior("delta", shared), torch.zeros(5, 1, dtype=torch.float64)
    for ask in (
        lambda: found.score(num_samples=1000),
        lambda: found.predict(x, num_samples=1000),
        lambda: found.expected(x, num_samples=1000),
        lambda: found.log_prob(num_samples=1000),
    ):
        before = calls(found.model)
        ask()
        # once for one task, to see what it holds on the way, and once for all
        assert calls(found.model) <= before + 2
