"""A task left out, where the evidence is known: exact densities, beside importance sampling."""

from __future__ import annotations

import torch
from torch import nn

import varmeta as vm
from tests.linear_gaussian import REGRESSIONS, dense_evidence


class Unknown(nn.Linear):
    """A layer of one's own, of which nothing is known by construction."""


def test_it_is_what_sampling_finds_without_its_noise() -> None:
    _, tasks = REGRESSIONS["full"]()
    tables = []
    for layer in (nn.Linear, Unknown):
        torch.manual_seed(0)
        prior = vm.GaussianPrior(learn_precision="per_parameter")
        model = vm.TaskModel(layer(2, 1).double(), vm.likelihoods.Gaussian(), prior)
        fit = vm.fit(model, tasks, vm.Joint("multivariate_normal"))
        assert fit.model.is_linear_gaussian == (layer is nn.Linear)
        tables.append(fit.leave_one_task_out())
        if layer is nn.Linear:
            exact = dense_evidence(fit.model, fit.eta, tasks)
            found = torch.tensor(tables[0]["log_evidence"].to_numpy()[:-1])
            torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
            again = fit.leave_one_task_out(num_particles=100)  # nothing of a task is drawn
            assert again.equals(tables[0])
    known, sampled = tables
    assert (known["left_out"] - sampled["left_out"]).abs()[:-1].max() < 0.1
    assert (known["log_evidence"] - sampled["log_evidence"]).abs()[:-1].max() < 0.05
    # leaving a task out costs its density
    assert known.loc["all", "left_out"] < known.loc["all", "log_evidence"]
