"""Noise of observations as a function of (seed, task's name, draw, place in the task).

So it is the same whatever stands beside the task.

A distribution draws by PyTorch's random operations, which read one stream in the order of memory:
with one task more, or one row of padding more, every later number is another.  Within `TaskNoise`
those operations read numbers of the tasks' own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from varmeta.numerics import noise

# A stream of its own, away from training (steps from 0) and from the draws of the weights (2**40).
OBSERVED = 2**41

aten = torch.ops.aten
# y = transform(u, *parameters) of uniform u, by operation; what is filled in place comes without a
# generator's argument.
_FILLS: dict[Any, Callable[..., Tensor]] = {
    aten.uniform_: lambda u, low=0.0, high=1.0: low + (high - low) * u,
    aten.normal_: lambda u, mean=0.0, std=1.0: mean + std * torch.special.ndtri(u),
    aten.exponential_: lambda u, rate=1.0: -u.log() / rate,
    aten.cauchy_: lambda u, median=0.0, sigma=1.0: median + sigma * (math.pi * (u - 0.5)).tan(),
    aten.log_normal_: lambda u, mean=1.0, std=2.0: (mean + std * torch.special.ndtri(u)).exp(),
    aten.geometric_: lambda u, p: (u.log() / math.log1p(-p)).ceil().clamp(min=1.0),
    aten.bernoulli_: lambda u, p=0.5: (u < p).double(),
}
_MAKES: dict[Any, Callable[[Tensor], Tensor]] = {
    aten.rand: lambda u: u,
    aten.rand_like: lambda u: u,
    aten.randn: torch.special.ndtri,
    aten.randn_like: torch.special.ndtri,
}
# Rejection sampling: how many numbers one draw takes depends on luck, so each task has a generator
# of its own.
_SERIAL: dict[Any, Callable[..., Tensor]] = {
    aten.poisson: torch.poisson,
    aten.binomial: torch.binomial,
    aten._standard_gamma: torch._standard_gamma,
    aten._sample_dirichlet: torch._sample_dirichlet,
}


class TaskNoise(TorchDispatchMode):
    """Within it, random numbers follow the tasks' names.

    Those for tensors whose axes are (draws, tasks, points, ...).

    ids: the tasks' numbers, `(tasks,)`, see `noise.task_id`.  mask: `(tasks, points)`, False in
    padding, for which some operations draw nothing.  `at(first, num)` says which draws come next.
    Random tensors of other shapes come from PyTorch's own stream.
    """

    def __init__(self, seed: int, ids: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.seed, self.ids, self.shape = seed, ids, tuple(mask.shape)
        self.rows = [row.nonzero().flatten() for row in mask.cpu()]
        self._names = ids.tolist()
        self._generators: dict[tuple[int, int], torch.Generator] = {}
        self.at(0, 1)

    def at(self, first: int, num: int) -> None:
        """Say that the next tensors are of the draws first, ..., first + num - 1.

        Each is sampled as the ones before were.
        """
        self.first, self.num, self._calls = first, num, 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        kind = func.overloadpacket
        if kind in _FILLS:
            target, values = args[0], [a for a in args[1:] if not isinstance(a, torch.Generator)]
            u = self._uniform(target.shape)
            return func(*args, **kwargs) if u is None else target.copy_(_FILLS[kind](u, *values))
        if kind in _MAKES:
            made = func(*args, **kwargs)
            u = self._uniform(made.shape)
            return made if u is None else _MAKES[kind](u).to(made)
        if kind is aten.normal:
            made = func(*args, **kwargs)
            u = self._uniform(made.shape)
            if u is None:
                return made
            mean, std = (*args, 1.0)[:2]
            return (mean + std * torch.special.ndtri(u)).to(made)
        if kind is aten.bernoulli and len(args) == 1:
            u = self._uniform(args[0].shape)
            return func(*args, **kwargs) if u is None else (u < args[0]).to(args[0])
        if (
            kind is aten.multinomial
            and args[0].dim() == 2
            and (args[1] == 1 or (len(args) > 2 and args[2]))
        ):
            u = self._uniform((len(args[0]), args[1]))
            return func(*args, **kwargs) if u is None else _classes(args[0], u)
        if kind in _SERIAL:
            drawn = self._serial(_SERIAL[kind], [a for a in args if isinstance(a, Tensor)])
            return func(*args, **kwargs) if drawn is None else drawn
        return func(*args, **kwargs)

    def _rest(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The axes behind those of draws, tasks and points, or None where it has not these."""
        lead = (self.num, *self.shape)
        if tuple(shape[:3]) == lead:
            return tuple(shape[3:])
        return tuple(shape[1:]) if len(shape) and shape[0] == math.prod(lead) else None

    def _uniform(self, shape: tuple[int, ...]) -> Tensor | None:
        rest = self._rest(shape)
        if rest is None or not math.prod(shape):
            return None
        size = self.shape[1] * math.prod(rest)
        u = noise.uniform(
            self.seed, OBSERVED + self._calls, self.ids, self.num, size, first=self.first
        )
        self._calls += 1
        return u.reshape(shape)

    def _serial(self, draw: Callable[..., Tensor], parameters: list[Tensor]) -> Tensor | None:
        shape = parameters[0].shape
        rest = self._rest(shape)
        if rest is None or not math.prod(shape):
            return None
        # on the CPU on every machine: only there is a generator read in order, so that slices of
        # draws do not matter
        full = [p.cpu().reshape(self.num, *self.shape, *rest) for p in parameters]
        out = torch.zeros_like(full[0])
        for i, rows in enumerate(self.rows):
            if len(rows):
                own = [p[:, i, rows].contiguous() for p in full]
                out[:, i, rows] = draw(*own, generator=self._generator(i))
        self._calls += 1
        return out.reshape(shape).to(parameters[0].device)

    def _generator(self, task: int) -> torch.Generator:
        key = self._calls, self._names[task]
        if key not in self._generators:
            address = f"{self.seed} {key[0]} {key[1]}".encode()
            seed = int.from_bytes(hashlib.blake2b(address, digest_size=8).digest(), "big") >> 1
            self._generators[key] = torch.Generator().manual_seed(seed)
        return self._generators[key]


def _classes(weights: Tensor, u: Tensor) -> Tensor:
    """Classes `(n, draws)` with probability proportional to weights `(n, classes)`, by uniforms
    `(n, draws)`.
    """
    below = weights.double().cumsum(-1)
    at = torch.searchsorted(below, u.double() * below[:, -1:], right=True)
    return at.clamp(max=weights.shape[-1] - 1)
