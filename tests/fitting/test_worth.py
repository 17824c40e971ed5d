"""When "auto" compiles: one rule for fits and for adaptation, of sizes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import varmeta as vm
from tests.cases import net_model, ragged_tasks
from varmeta.fitting import adapt, worth
from varmeta.fitting.compiled_step import Step
from varmeta.graphs.capture import compile_seconds, eager_seconds

PRIOR = vm.GaussianPrior(1.0)


def test_it_is_worth_it_from_four_times_what_compiling_takes() -> None:
    model, tasks = net_model(PRIOR), ragged_tasks(5)
    problem = vm.Implicit("delta", "query").problem(model, tasks, 0)
    eta = model.init(torch.zeros((), dtype=torch.float64))
    graph = problem.gradient_graph("elbo", tasks.batch(), eta)
    calls = 4.0 * compile_seconds(graph) / eager_seconds(graph)
    assert worth.is_worth_it(graph, 1.001 * calls)
    assert not worth.is_worth_it(graph, 0.999 * calls)
    # an inner solve takes 30 gradients, and its pieces compile like 12
    assert worth.is_worth_it(graph, 1.001 * calls * 12 / 30, in_pieces=True)
    assert not worth.is_worth_it(graph, 0.999 * calls * 12 / 30, in_pieces=True)


@pytest.mark.parametrize(("num_steps", "asked"), [(999, False), (1001, True)])
def test_what_cannot_be_worth_it_is_not_traced(
    num_steps: int, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tasks, questions = net_model(PRIOR), ragged_tasks(5), []
    monkeypatch.setattr(
        "varmeta.fitting.compiled_step.is_worth_it", lambda *_: bool(questions.append(1))
    )
    strategy, batch = vm.Joint("normal"), tasks.batch()
    problem, eta = (
        strategy.problem(model, tasks, 0),
        model.init(torch.zeros((), dtype=torch.float64)),
    )
    Step(strategy, "auto", num_steps)(problem, batch, eta, strategy.init(problem, batch, eta))
    assert bool(questions) is asked


def test_adaptation_asks_the_same_question(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tasks, asked = net_model(PRIOR), ragged_tasks(5), []
    strategy = vm.Implicit("delta", "query")
    problem, batch = strategy.problem(model, tasks, 0), tasks.batch()
    eta = model.init(torch.zeros((), dtype=torch.float64))

    def note(*args: Any, **options: Any) -> bool:
        asked.append((args[1:], options))
        return False

    monkeypatch.setattr("varmeta.fitting.adapt.is_worth_it", note)
    eager = adapt.adapt(strategy, problem, batch, eta, "auto").value["loc"]
    assert not asked
    monkeypatch.setattr("varmeta.fitting.adapt.may_be_worth_it", lambda *_: True)
    again = adapt.adapt(strategy, problem, batch, eta, "auto").value["loc"]
    assert asked == [((1.0,), {"in_pieces": True})] and torch.equal(eager, again)
