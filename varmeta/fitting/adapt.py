"""Adapt to tasks, unseen ones too: phi given eta, compiled and by chunks where that is worth it.

What users call is `Fit.adapt` (results/result.py); what finds phi is each strategy's own `adapt`.
"""

from __future__ import annotations

from dataclasses import replace

from varmeta.fitting import chunks
from varmeta.fitting.compiled_step import Compile, fall_back
from varmeta.fitting.worth import is_worth_it, may_be_worth_it
from varmeta.graphs.capture import CaptureError
from varmeta.numerics.solution import Solution
from varmeta.strategies.own_parts import no_solution
from varmeta.strategies.problem import Problem
from varmeta.strategies.strategy import Eta, Strategy
from varmeta.tasks import Batch


def adapt(
    strategy: Strategy,
    problem: Problem,
    batch: Batch,
    eta: Eta,
    compile: Compile,
    task_chunk_size: int | None = None,
) -> Solution:
    """`strategy.adapt`, its loops' bodies compiled where `compile` says so."""
    cut = chunks.pieces_in_memory(strategy, problem, batch, eta, task_chunk_size)

    def solve(graphed: bool) -> Solution:
        def one(part: Batch) -> Solution:
            here = replace(problem, graphed=graphed).ahead(part, eta)
            found = strategy.adapt(here, part, eta)
            if not isinstance(found, Solution):
                raise no_solution(found, strategy)
            return found

        return chunks.solution(one, cut)

    try:
        if compile == "auto":
            compile = may_be_worth_it(problem, batch, 1)
            if compile:
                number, times = chunks.heaviest(cut)
                part = cut[number].batch
                graph = problem.ahead(part, eta).gradient_graph("elbo", part, eta)
                compile = is_worth_it(graph, times, in_pieces=True)
        return solve(bool(compile))
    except CaptureError as error:
        fall_back(str(error))
        return solve(False)
