"""First-order rules: gradient descent and Adam, each a pure function of (phi, gradient, state)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from varmeta.numerics import tree
from varmeta.numerics.arguments import no_tensors, positive
from varmeta.numerics.learning_rates import Rate, checked_rate
from varmeta.numerics.minimize import FirstOrderMinimizer
from varmeta.numerics.tree import Tree


@dataclass(frozen=True)
class GradientDescent(FirstOrderMinimizer):
    """v <- momentum v + g,  phi <- phi - lr v; without momentum phi <- phi - lr g.

    With `per_point` the rate is lr / n for a task of n support points.

    Converges on a quadratic for lr < 2 (1 + momentum) / (largest curvature).  A task's loss is
    summed over its points, where the field takes means: the field's step a on a mean cross-entropy
    of n points is lr = a / n here, or lr = a with `per_point`; on a mean *squared error*, under a
    Gaussian of noise scale s, it is lr = 2 s^2 a / n, or lr = 2 s^2 a with `per_point`.

    lr: the learning rate; or rates that are learned with eta, `LearnedRates(...)` ("learned" is
        `LearnedRates()`, one for each layer); or fixed ones by patterns of the weights' names,
        {"head.*": 0.1, "*": 0.01}, of which a weight takes the first that it matches; or fixed
        ones as a vector, one for each weight in the order of `fit.prior.labels`.  What a guide
        keeps of a weight beside its location takes the weight's rate, and what belongs to no one
        weight, as correlations do, the rates' geometric mean.
    per_point: take lr on the mean over a task's points, whose loss does not grow with their number.
    momentum: of the heavy ball, as in torch.optim.SGD; every task has its own v, 0 at its start.
    clip: a task's g is scaled down to this norm where it is longer.  g is of the summed loss, also
        under `per_point`: the field's c on a mean over n points is c n.

    Raises ValueError for a learning rate or clip that is not positive and for a momentum outside
    [0, 1), TypeError for one that is no number, as a tensor that asks for a gradient.

    >>> phi, gradient = {"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}
    >>> GradientDescent(lr=0.1).update(phi, gradient, {})[0]["w"]
    tensor([0.8000])
    """

    lr: Rate | Mapping[str, float] | Tensor | Literal["learned"] = 0.01
    per_point: bool = False
    momentum: float = 0.0
    clip: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "lr", checked_rate(self.lr))
        no_tensors(self)
        if not isinstance(self.per_point, bool):
            raise TypeError(f"per_point must be True or False, not {self.per_point!r}")
        if isinstance(self.momentum, bool) or not isinstance(self.momentum, Real):
            raise TypeError(f"momentum must be a number in [0, 1), not {self.momentum!r}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be a number in [0, 1), not {self.momentum}")
        if self.clip is not None:
            positive("clip", self.clip)

    def init(self, phi: Tree) -> Tree:
        if not self.momentum:
            return {}
        return {f"velocity.{name}": torch.zeros_like(x) for name, x in phi.items()}

    def update(
        self, phi: Tree, gradient: Tree, state: Tree, lr_scale: Any = 1.0
    ) -> tuple[Tree, Tree]:
        """One step; lr_scale: where lr is not a number, the rates themselves, shaped as phi.

        Raises ValueError where the rates that the rule learns are not given.
        """
        if self.clip is not None:
            gradient = _clipped(gradient, self.clip)
        if self.momentum:
            gradient = {
                name: self.momentum * state[f"velocity.{name}"] + g for name, g in gradient.items()
            }
            state = {f"velocity.{name}": v for name, v in gradient.items()}
        if isinstance(lr_scale, dict):
            return tree.map_tree(lambda x, g, rate: x - rate * g, phi, gradient, lr_scale), state
        if not isinstance(self.lr, (int, float)):
            raise ValueError(
                f"the rates of lr={self.lr!r} belong to the weights of a model, which are not "
                "known here: give one number"
            )
        return tree.add(phi, gradient, -self.lr * lr_scale), state


def _clipped(gradient: Tree, norm: float) -> Tree:
    """The gradients of tasks in which it is longer than `norm`, scaled down to it."""
    # the larger is taken of the squares: the root of a norm of 0 has no derivative
    longer = tree.dot(gradient, gradient).clamp(min=norm * norm).sqrt()
    return tree.scale(gradient, norm / longer)


@dataclass(frozen=True)
class Adam(FirstOrderMinimizer):
    """Adam (Kingma and Ba, ICLR 2015, algorithm 1), every task with its own count of steps.

    m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,
    phi <- phi - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps).

    The state is the tree {"first", "second": b1^t and b2^t, `(tasks,)`; "mean.<name>": m,
    "square.<name>": v}.
    It can be differentiated where a gradient is 0: a term far below eps^2 keeps the root's
        derivative finite.

    Raises ValueError for an lr or eps that is not positive, or betas outside [0, 1).

    >>> adam, phi = Adam(lr=0.1), {"w": torch.tensor([1.0])}
    >>> gradient = {"w": torch.tensor([30.0])}
    >>> adam.update(phi, gradient, adam.init(phi))[0]["w"]  # the first step is lr, in any units
    tensor([0.9000])
    """

    lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        no_tensors(self)
        positive("lr", self.lr)
        positive("eps", self.eps)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), not {self.betas}")

    def init(self, phi: Tree) -> Tree:
        like = next(iter(phi.values()))
        moments = {
            f"{kind}.{name}": torch.zeros_like(x)
            for kind in ("mean", "square")
            for name, x in phi.items()
        }
        # in half precision b2 is 1, and nothing would ever move
        ones = torch.ones(
            len(like), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device
        )
        return {"first": ones, "second": ones, **moments}

    def update(
        self, phi: Tree, gradient: Tree, state: Tree, lr_scale: float | Tensor = 1.0
    ) -> tuple[Tree, Tree]:
        first, second = self.betas
        # the powers are state: taken of a count, a fused kernel takes them again for every weight
        powers = {"first": first * state["first"], "second": second * state["second"]}
        unbiased = (1 - powers["second"]).reciprocal()
        rate = self.lr * lr_scale / (1 - powers["first"])
        new_phi, new_state = {}, powers
        for name, x in phi.items():
            g = gradient[name]
            mean = first * state[f"mean.{name}"] + (1 - first) * g
            square = second * state[f"square.{name}"] + (1 - second) * g * g
            tiny = max((1e-8 * self.eps) ** 2, torch.finfo(x.dtype).tiny)
            root = (square * tree.rows(unbiased, x).to(x.dtype) + tiny).sqrt()
            new_phi[name] = x - tree.rows(rate, x).to(x.dtype) * mean / (root + self.eps)
            new_state |= {f"mean.{name}": mean, f"square.{name}": square}
        return new_phi, new_state
