"""The shared work written by hand in torch: `torch.func`, run as it stands and captured and
compiled as ours is.

ways of imaml and maml: "eager" (vmap over tasks of a task's own function), "compiled" (the same,
one graph).
ways of joint: "eager" (a loss with autograd and torch.optim.Adam), "compiled" (value, gradients and
both Adam steps as one graph), "torch.compile" (the loss compiled as most users do it, autograd and
fused Adam outside).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vmap

from experiments.benchmarks.work import (
    ADAM_LR,
    CG_STEPS,
    HALF_LOG_2PI,
    INNER_STEPS,
    LOG_SD,
    LR,
    MAML_STEPS,
    PRECISION,
    Step,
    Work,
    flat,
    split,
)  # fmt: skip
from varmeta.graphs.capture import Captured

Tree = dict[str, Tensor]


def net(w: Tree, x: Tensor) -> Tensor:
    """Outputs `(points,)` of one task, x `(points,)`; further axes in front of the weights' are
    batched over.
    """
    h = torch.relu(x.unsqueeze(-1) * w["0.weight"].mT + w["0.bias"].unsqueeze(-2))
    h = torch.relu(h @ w["2.weight"].mT + w["2.bias"].unsqueeze(-2))
    return (h @ w["4.weight"].mT).squeeze(-1) + w["4.bias"]


def inner(w: Tree, theta0: Tree, x: Tensor, y: Tensor) -> Tensor:
    away = sum((w[name] - theta0[name]).square().sum() for name in w)
    return 0.5 * (net(w, x) - y).square().sum() + 0.5 * PRECISION * away


def outer(w: Tree, x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (net(w, x) - y).square().sum() + HALF_LOG_2PI * y.shape[-1]


def descend(theta0: Tree, x: Tensor, y: Tensor, steps: int) -> Tree:
    w = theta0
    for _ in range(steps):
        g = grad(inner)(w, theta0, x, y)
        w = {name: w[name] - LR * g[name] for name in w}
    return w


def dot(a: Tree, b: Tree) -> Tensor:
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def imaml_of_task(theta0: Tree, x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> tuple[Tree, Tensor]:
    w = descend(theta0, x, y, INNER_STEPS)
    b, loss = grad_and_value(outer)(w, u, v)
    solution = {name: torch.zeros_like(value) for name, value in b.items()}
    r = p = b
    rr = dot(r, r)
    for _ in range(CG_STEPS):
        ap = jvp(lambda w: grad(inner)(w, theta0, x, y), (w,), (p,))[1]
        alpha = rr / dot(p, ap)
        solution = {name: solution[name] + alpha * p[name] for name in p}
        r = {name: r[name] - alpha * ap[name] for name in p}
        new = dot(r, r)
        p = {name: r[name] + new / rr * p[name] for name in p}
        rr = new
    return {name: PRECISION * value for name, value in solution.items()}, loss


def maml_of_task(theta0: Tree, x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> tuple[Tree, Tensor]:
    return grad_and_value(lambda theta0: outer(descend(theta0, x, y, MAML_STEPS), u, v))(theta0)


def summed(theta0: Tree, *data: Tensor) -> Tensor:
    """MAML's objective over all tasks, the derivative of which is one backward pass."""

    def of_task(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return outer(descend(theta0, x, y, MAML_STEPS), u, v)

    return vmap(of_task)(*data).sum()


def imaml(work: Work) -> list[Step]:
    return _ways(work, _over_tasks(imaml_of_task))


def maml(work: Work) -> list[Step]:
    return [
        *_ways(work, _over_tasks(maml_of_task)),
        *_ways(work, grad_and_value(summed), ", gradient of the sum"),
    ]


def _over_tasks(of_task: Callable[..., tuple[Tree, Tensor]]) -> Callable[..., tuple[Tree, Tensor]]:
    def whole(theta0: Tree, *data: Tensor) -> tuple[Tree, Tensor]:
        gradients, losses = vmap(of_task, in_dims=(None, 0, 0, 0, 0))(theta0, *data)
        return {name: g.sum(0) for name, g in gradients.items()}, losses.sum()

    return whole


def _ways(work: Work, whole: Callable[..., tuple[Tree, Tensor]], how: str = "") -> list[Step]:
    theta0 = {name: torch.as_tensor(value) for name, value in work.theta0.items()}
    data = [
        torch.as_tensor(a) for a in (work.x_support, work.y_support, work.x_query, work.y_query)
    ]

    def step(function: Callable[..., Any], way: str) -> Step:
        def run() -> tuple[float, Tree]:
            gradient, loss = function(theta0, *data)
            return float(loss), gradient

        return Step(run, _values, way=way + how)

    return [step(Captured(whole), "compiled"), step(whole, "eager")]


def _values(found: tuple[float, Tree]) -> tuple[float, np.ndarray]:
    return found[0], flat({name: g.cpu().numpy() for name, g in found[1].items()})


# -- joint -----------------------------------------------------------------------------------------


def negative_elbo(phi: Tree, eta: Tree, noise: Tree, x: Tensor, y: Tensor) -> Tensor:
    """Summed over tasks; phi "loc.<name>" and "log_sd.<name>" `(tasks, ...)`, noise `(draws, tasks,
    ...)`.
    """
    log_precision, log_scale = eta["log_precision"], eta["log_scale"]
    theta, divergence = {}, torch.zeros_like(log_scale)
    for name in noise:
        loc, log_sd = phi[f"loc.{name}"], phi[f"log_sd.{name}"]
        sd = log_sd.exp()
        theta[name] = loc + sd * noise[name]
        squares = sd.square() + (loc - eta[name]).square()
        divergence = (
            divergence
            + (0.5 * (squares * log_precision.exp() - 1.0 - log_precision) - log_sd).sum()
        )
    r = (net(theta, x) - y) * torch.exp(-log_scale)
    nll = (0.5 * r.square() + log_scale + HALF_LOG_2PI).sum((-1, -2)).mean(0)
    return divergence + nll


def adam(x: Tree, g: Tree, mean: Tree, square: Tree, count: Tensor) -> tuple[Tree, Tree, Tree]:
    mean = {name: 0.9 * mean[name] + 0.1 * g[name] for name in x}
    square = {name: 0.999 * square[name] + 0.001 * g[name] * g[name] for name in x}
    first, second = 1 - 0.9**count, 1 - 0.999**count
    new = {
        name: x[name] - ADAM_LR * (mean[name] / first) / ((square[name] / second).sqrt() + 1e-8)
        for name in x
    }
    return new, mean, square


class _Joint:
    """The state of one hand-written run; given_noise `(2, tasks, SIZE)` for the first step, later
    ones draw anew.
    """

    def __init__(self, work: Work, given_noise: np.ndarray | None) -> None:
        self.x, self.y = torch.as_tensor(work.x_support), torch.as_tensor(work.y_support)
        self.eta = {name: torch.as_tensor(value).clone() for name, value in work.theta0.items()}
        self.names = list(self.eta)
        like = self.x.new_zeros(())
        self.eta |= {"log_precision": like + math.log(PRECISION), "log_scale": like.clone()}
        self.phi = {
            f"loc.{name}": torch.as_tensor(value).clone() for name, value in work.loc.items()
        }
        self.phi |= {
            f"log_sd.{name}": torch.full_like(self.phi[f"loc.{name}"], LOG_SD)
            for name in self.names
        }
        self.given = None if given_noise is None else split(torch.as_tensor(given_noise))

    def noise(self) -> Tree:
        if self.given is not None:
            given, self.given = self.given, None
            return given
        half = {name: torch.randn_like(self.phi[f"loc.{name}"]) for name in self.names}
        return {name: torch.stack([value, -value]) for name, value in half.items()}


def joint(work: Work, given_noise: np.ndarray | None = None) -> list[Step]:
    return [make(_Joint(work, given_noise)) for make in (_compiled, _torch_compile, _eager)]


def _compiled(run: _Joint) -> Step:
    state = {"x": {**run.phi, **{f"eta.{name}": value for name, value in run.eta.items()}}}
    state |= {"mean": {name: torch.zeros_like(value) for name, value in state["x"].items()}}
    state |= {"square": {name: torch.zeros_like(value) for name, value in state["x"].items()}}
    count = run.x.new_zeros(())

    def whole(state: dict[str, Tree], count: Tensor, noise: Tree, x: Tensor, y: Tensor) -> Any:
        def loss(leaves: Tree) -> Tensor:
            eta = {name[4:]: value for name, value in leaves.items() if name.startswith("eta.")}
            return negative_elbo(leaves, eta, noise, x, y)

        g, value = grad_and_value(loss)(state["x"])
        new, mean, square = adam(state["x"], g, state["mean"], state["square"], count + 1)
        return (
            {"x": new, "mean": mean, "square": square},
            count + 1,
            value,
            [g[f"eta.{name}"] for name in noise],
        )

    captured = Captured(whole)

    def step() -> Any:
        nonlocal state, count
        state, count, value, gradients = captured(state, count, run.noise(), run.x, run.y)
        return float(value), gradients

    return Step(step, _joint_values, way="compiled")


def _eager(
    run: _Joint, function: Callable[..., Tensor] = negative_elbo, way: str = "eager"
) -> Step:
    leaves = [value.requires_grad_() for value in (*run.phi.values(), *run.eta.values())]
    optimizer = torch.optim.Adam(leaves, lr=ADAM_LR, fused=True)

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = function(run.phi, run.eta, run.noise(), run.x, run.y)
        loss.backward()
        optimizer.step()
        return float(loss.detach()), [run.eta[name].grad for name in run.names]

    return Step(step, _joint_values, way=way)


def _torch_compile(run: _Joint) -> Step:
    return _eager(run, torch.compile(negative_elbo, fullgraph=True, dynamic=False), "torch.compile")


def _joint_values(found: Any) -> tuple[float, np.ndarray]:
    return found[0], np.concatenate(
        [g.cpu().numpy().astype(np.float64).reshape(-1) for g in found[1]]
    )
