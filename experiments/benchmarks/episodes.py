"""Ours beside a loop written by hand in `torch.func`, on few-shot images: first the same values,
then times, alternating.

    python -m experiments.benchmarks.episodes '{"case": "anil", "tasks": 4}'

prints one line of JSON.  Conv-4 (32 channels, group norm, 28 x 28 pixels), 5-way 1-shot episodes
with 15 queries a class.  cases: "anil", the last layer adapts in 20 steps and the loop by hand
works out the features once; "maml", all layers adapt in 5 steps, differentiated through.  Two ways
by hand, of which the faster is the peer: all tasks at once by `vmap`, and one after another.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.nn.functional import cross_entropy

import varmeta as vm
from experiments.benchmarks.pairs import _once, alternate, quartiles
from varmeta.fitting.compiled_step import Step

WAYS, QUERIES, PRECISION, LR = 5, 15, 1.0, 0.01
INNER_STEPS = {"anil": 20, "maml": 5}
# a case, and how many episodes its outer step is over
CASES = (("anil", 4), ("maml", 4), ("maml", 16), ("maml", 32))

Tree = dict[str, Tensor]


def main() -> None:
    asked = json.loads(sys.argv[1])
    print(json.dumps(asked | measure(**asked)))


def conv4(channels: int = 32) -> nn.Sequential:
    layers: list[nn.Module] = []
    for block in range(4):
        layers += [
            nn.Conv2d(channels if block else 1, channels, 3, padding=1),
            nn.GroupNorm(4, channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(nn.Sequential(*layers, nn.Flatten()), nn.Linear(channels, WAYS))


def episodes(number: int, dtype: torch.dtype = torch.float32) -> vm.TaskSet:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(number):
        classes = torch.rand(WAYS, 1, 28, 28, generator=generator)
        noise = torch.rand(WAYS * (1 + QUERIES), 1, 28, 28, generator=generator)
        y = torch.arange(WAYS).repeat(1 + QUERIES)
        x = (0.5 * (classes[y] + noise)).to(dtype)
        found.append(vm.Task((x[:WAYS], y[:WAYS]), (x[WAYS:], y[WAYS:])))
    return vm.TaskSet(found)


def measure(
    case: str, tasks: int, seconds: float = 20.0, channels: int = 32, dtype: str = "float32"
) -> dict[str, Any]:
    """The gaps between the values, medians and quartiles of both in milliseconds, their ratio."""
    torch.manual_seed(0)
    net, data = conv4(channels).to(getattr(torch, dtype)), episodes(tasks, getattr(torch, dtype))
    ours = _ours(case, net, data)
    theirs = _by_hand(case, net, data)
    value, gradient = ours()
    gaps = []
    for other, peers in (way() for way in theirs.values()):
        size = torch.cat([g.reshape(-1) for g in gradient.values()]).norm()
        away = torch.cat([(gradient[n] - g).reshape(-1) for n, g in peers.items()]).norm()
        gaps.append((abs(float(value - other)) / abs(float(value)), float(away / size)))
    found: dict[str, Any] = {
        "loss_gap": max(gap for gap, _ in gaps),
        "gradient_gap": max(gap for _, gap in gaps),
    }
    if not seconds:
        return found
    way = min(theirs, key=lambda name: statistics.median(_once(theirs[name]) for _ in range(3)))
    mine, its = alternate(ours, theirs[way], seconds)
    found |= {f"ours_{k}": v for k, v in quartiles(mine).items()}
    found |= {f"peer_{k}": v for k, v in quartiles(its).items()}
    ratios = [statistics.median(a) / statistics.median(b) for a, b in zip(mine, its, strict=True)]
    return found | {"way": way, "ours_over_peer": statistics.median(ratios)}


def _ours(case: str, net: nn.Sequential, data: vm.TaskSet) -> Callable[[], tuple[Tensor, Tree]]:
    shared = ("0.*",) if case == "anil" else ()
    likelihood = vm.likelihoods.Categorical(WAYS)
    model = vm.TaskModel(net, likelihood, vm.GaussianPrior(PRECISION), shared)
    strategy = vm.Unrolled("delta", "query", INNER_STEPS[case], vm.GradientDescent(LR))
    problem, batch = strategy.problem(model, data, 0), data.batch()
    eta = {n: v.requires_grad_() for n, v in model.init(batch.support.x.new_zeros(())).items()}
    step, state = Step(strategy, False, 1), strategy.init(problem, batch, eta)

    def run() -> tuple[Tensor, Tree]:
        found = step(problem, batch, eta, state)
        return found.value, found.gradient

    return run


def _by_hand(
    case: str, net: nn.Sequential, data: vm.TaskSet
) -> dict[str, Callable[[], tuple[Tensor, Tree]]]:
    steps = INNER_STEPS[case]
    parts = [torch.stack([getattr(t, part)[i] for t in data])
             for part in ("support", "query") for i in (0, 1)]  # fmt: skip
    body, head = net[0], net[1]
    shared = {f"0.{n}": v.detach() for n, v in body.named_parameters()} if case == "anil" else {}
    theta0 = {n: v.detach() for n, v in net.named_parameters() if n not in shared}

    def outputs(w: Tree, x: Tensor) -> Tensor:
        found: Tensor
        if case == "maml":
            found = functional_call(net, w, (x,))
        else:
            found = functional_call(head, {n[2:]: v for n, v in w.items()}, (x,))
        return found

    def inner(w: Tree, start: Tree, x: Tensor, y: Tensor) -> Tensor:
        away = sum((w[name] - start[name]).square().sum() for name in w)
        return cross_entropy(outputs(w, x), y, reduction="sum") + 0.5 * PRECISION * away

    def of_task(start: Tree, x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        w = start
        for _ in range(steps):
            g = grad(inner)(w, start, x, y)
            w = {name: w[name] - LR * g[name] for name in w}
        return cross_entropy(outputs(w, u), v, reduction="sum")

    def seen(eta: Tree, x: Tensor) -> Tensor:
        if case == "maml":
            return x
        known = {n[2:]: eta[n] for n in shared}
        found: Tensor = functional_call(body, known, (x.flatten(0, 1),)).unflatten(0, x.shape[:2])
        return found

    def at_once(eta: Tree) -> Tensor:
        x, y, u, v = parts
        start = {n: eta[n] for n in theta0}
        given = (seen(eta, x), y, seen(eta, u), v)
        return vmap(lambda *task: of_task(start, *task))(*given).sum()

    def in_turn() -> tuple[Tensor, Tree]:
        eta = theta0 | shared
        if case == "anil":  # the features of all tasks have one backward pass
            return _value_first(grad_and_value(one_by_one)(eta))
        found = [grad_and_value(of_task)(eta, *task) for task in zip(*parts, strict=True)]
        gradient = {n: torch.stack([g[n] for g, _ in found]).sum(0) for n in eta}
        return torch.stack([value for _, value in found]).sum(), gradient

    def one_by_one(eta: Tree) -> Tensor:
        x, y, u, v = parts
        start = {n: eta[n] for n in theta0}
        given = (seen(eta, x), y, seen(eta, u), v)
        return torch.stack([of_task(start, *task) for task in zip(*given, strict=True)]).sum()

    return {
        "vmap": lambda: _value_first(grad_and_value(at_once)(theta0 | shared)),
        "one task after another": in_turn,
    }


def _value_first(found: tuple[Tree, Tensor]) -> tuple[Tensor, Tree]:
    return found[1], found[0]


if __name__ == "__main__":
    main()
