"""Prototypes: a class is where its support rows lie, on average, in the features of a shared body.

The probability of a class falls with the squared distance to its mean c_k,

    p(y = k | x) = exp(-|f(x) - c_k|^2) / sum_j exp(-|f(x) - c_j|^2)

and as |f(x)|^2 is the same for all classes, that is a linear layer with weights 2 c_k and biases
-|c_k|^2: phi of the last layer, known without a search.
Source: Snell, Swersky and Zemel, Prototypical Networks for Few-shot Learning, NeurIPS 2017,
equations 1, 2 and 8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from varmeta.guides.closed_form import features_of
from varmeta.guides.delta import Delta
from varmeta.likelihoods.discrete import Categorical
from varmeta.models.linearity import head_of, own_forward
from varmeta.models.model import TaskModel
from varmeta.numerics.solution import Result, Solution
from varmeta.numerics.tree import Tree
from varmeta.strategies.objective import Outer
from varmeta.strategies.problem import Problem
from varmeta.strategies.strategy import Eta, State, Stats, Strategy, Traits
from varmeta.tasks import Batch, Data, TaskSet


@dataclass(frozen=True)
class Prototypes(Strategy):
    """The last layer from the means of a task's classes (ProtoNet); the body is learned.

    For classes (`likelihoods.Categorical` or `LeastSquaresClasses`) and networks, an
    `nn.Sequential`, whose weights that vary are those of the last `nn.Linear`, with its bias; all
    other layers are `shared`.  The body is learned by -log p of the query rows' classes.  The
    layer's theta0 and the prior are not used, so they stay where they start.

    A class without a support row has probability 0 in its task; where a query row to learn from is
    of one, `fit` refuses the task.  Of a task without any support row all classes are as probable.

    Raises ValueError, before any work, for another guide than a point and for other models.
    Source: Snell, Swersky and Zemel, Prototypical Networks for Few-shot Learning, NeurIPS 2017.

    >>> import varmeta as vm
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    >>> model = vm.TaskModel(net, vm.likelihoods.Categorical(3), shared=["0.*"])
    >>> rows = torch.eye(4)[:3], torch.arange(3)
    >>> found = vm.meta_gradient(model, vm.TaskSet([vm.Task(rows, rows)]), vm.Prototypes())
    >>> [name for name, gradient in found.grads.items() if gradient.any()]
    ['0.weight', '0.bias']
    """

    @property
    def outer(self) -> Outer:
        return "query"

    def traits(self, problem: Problem) -> Traits:
        if not isinstance(problem.guide, Delta):
            raise ValueError(
                f"prototypes are points, which no guide {problem.guide!r} is: use "
                "Prototypes(), whose guide is 'delta'"
            )
        fault = unsuited(problem.model)
        if fault is not None:
            raise ValueError(f"Prototypes {fault}")
        return Traits(noisy=False, moves_precision=False)

    def init(self, problem: Problem, batch: Batch, eta: Eta) -> State:
        return State()

    def loss(
        self, problem: Problem, batch: Batch, eta: Eta, state: State
    ) -> tuple[Tensor, State, Stats]:
        phi = prototypes(problem.model, eta, batch.support)
        losses = problem.losses("query", batch, state.step)(phi, eta)
        new = replace(state, step=state.step + 1)
        return self.total(problem, batch, eta, losses), new, Stats(losses.detach(), 1.0)

    def adapt(self, problem: Problem, batch: Batch, eta: Eta) -> Solution:
        with torch.no_grad():
            phi = prototypes(problem.model, eta, batch.support)
        lost = phi["loc"].isnan().any(-1)
        result = torch.where(lost, int(Result.NON_FINITE), int(Result.CONVERGED))
        return Solution(phi, result, {"evaluations": torch.ones(len(batch)).to(batch.support.like)})


def unsuited(model: TaskModel) -> str | None:
    """Why a model has no prototypes, what to do; None where it has."""
    likelihood = model.likelihood
    if likelihood is None or not isinstance(likelihood.predictive, Categorical):
        return (
            "are of classes 0, ..., C-1: they need likelihoods.Categorical or LeastSquaresClasses, "
            f"not {'a program' if likelihood is None else repr(likelihood)}"
        )
    if model.net is None or head_of(model.net, model.weights.names) is None:
        found = own_forward(model.net) or f"what varies here is {list(model.weights.names)}"
        return (
            "are the last layer's weights: they need a network (nn.Sequential) that ends with an "
            f"nn.Linear with a bias, both left to vary and all other layers shared=, but {found}"
        )
    if model.coefficients:
        return "follow from the support alone: leave out the prior's covariates"
    return None


def prototypes(model: TaskModel, eta: Mapping[str, Tensor], data: Data) -> Tree:
    """phi of every task: the last layer with weights 2 c_k and biases -|c_k|^2, `(tasks, D)`.

    Differentiable in eta.  A class without rows has the bias -inf, all of a task without rows 0.
    """
    assert model.net is not None
    names = model.weights.names
    head = head_of(model.net, names)
    assert head is not None  # `unsuited`
    if data.width:
        features = features_of(model, eta, data.filled[0])
    else:  # nobody has any rows
        features = data.like.new_zeros(len(data), 0, head.in_features)
    classes = torch.arange(head.out_features, device=data.y.device)
    own = (data.y.unsqueeze(-1) == classes) & data.mask.unsqueeze(-1)
    own = own.to(features)
    count = own.sum(1)  # (tasks, classes)
    mean = own.mT @ features / count.clamp(min=1).unsqueeze(-1)
    absent = (count == 0) & (count > 0).any(-1, keepdim=True)
    bias = torch.where(absent, -math.inf, -mean.square().sum(-1))
    parts = {"weight": 2 * mean, "bias": bias}
    named = {name: parts[name.rpartition(".")[2]] for name in names}
    return {"loc": model.weights.flatten(named)}


def check_classes(tasks: TaskSet) -> None:
    """Raise ValueError where a query row is of a class that its task's support does not show."""
    support, query = tasks.support_rows, tasks.query_rows
    if not len(query.y):
        return
    most = max(int(rows.y.max()) for rows in (support, query) if len(rows.y)) + 1
    shown, asked = (rows.owner * most + rows.y.long() for rows in (support, query))
    unseen = ~torch.isin(asked, shown)
    if bool(unseen.any()):
        first = int(unseen.nonzero()[0])
        task, row = query.place(first)
        raise ValueError(
            f"task {tasks.names[task]!r} has a query row of class {int(query.y[first])} "
            f"(row {row}), but no support row of it, so that it has no "
            "prototype and probability 0: give each class of the query a support row, or leave "
            "its query rows out"
        )
