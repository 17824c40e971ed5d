"""Whether to compile: where eager steps would take four times what compiling does.

Both times come from the sizes of graphs, and no clock is read, so that whether a fit is compiled,
and with that the last digit of its numbers, is the same in every run.
"""

from __future__ import annotations

from torch import fx

from varmeta.graphs.capture import FIRST_COMPILATION, compile_seconds, eager_seconds
from varmeta.strategies.problem import Problem
from varmeta.tasks import Batch

# A graph divides a step by four or more, so it breaks even at 1.3 times; the rest is for an
# estimate that is too high by 2.4 for a joint step.
WORTH = 4.0
# Gradients that an inner solve typically takes, and as how many gradients its six pieces, all of
# them larger, compile.
SOLVE, PIECES = 30, 12
# What an eager step hardly exceeds, before its graph is known: some 5,000 operations, and as many
# seconds for each row of data times weight.
_LONGEST, _PER_NUMBER = 0.08, 3.2e-8


def may_be_worth_it(problem: Problem, batch: Batch, num_calls: float) -> bool:
    """Whether that many eager steps or adaptations may take so long that it is worth a trace.

    A trace takes a second or two, as long as a hundred steps of a hundred tasks.
    """
    numbers = batch.cells * problem.model.weights.size
    return num_calls * (_LONGEST + _PER_NUMBER * numbers) >= WORTH * FIRST_COMPILATION


def is_worth_it(graph: fx.GraphModule, num_calls: float, in_pieces: bool = False) -> bool:
    """Whether that many calls are enough work to compile.

    graph: of a whole call; or, where its loops stay in Python and their bodies are compiled
        (`in_pieces`), of one gradient.
    """
    evaluations, pieces = (SOLVE, PIECES) if in_pieces else (1, 1)
    eager = num_calls * evaluations * eager_seconds(graph)
    return eager > WORTH * pieces * compile_seconds(graph)
