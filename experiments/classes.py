"""Few-shot classes by a shared body and three kinds of head: least squares, prototypes, Laplace's.

    python -m experiments.classes --steps 300 [--data DIR]

The same body, tasks, steps and optimizer.  On made tasks, and with --data (a folder with
omniglot/data.npz) on 5-way tasks of characters: those of "background small 1" to learn from, those
of the validation alphabets to be judged on, others to hold out.  Prints error rate, log density and
calibration error of the unseen tasks' query rows, and seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import varmeta as vm

WAYS = 5
Draw = Callable[[torch.Generator, int, int], Tensor]


def made(generator: torch.Generator, shots: int, queries: int) -> Tensor:
    """Rows `(WAYS, shots + queries, 20)` of classes around centres in four hidden directions."""
    fixed = torch.Generator().manual_seed(0)
    mixing = torch.randn(4, 20, generator=fixed)
    centre = torch.randn(WAYS, 1, 4, generator=generator)
    hidden = centre + 0.3 * torch.randn(WAYS, shots + queries, 4, generator=generator)
    return torch.tanh(hidden @ mixing) + 0.5 * torch.randn(
        WAYS, shots + queries, 20, generator=generator
    )


def characters(path: Path, part: str) -> Tensor:
    """Images `(characters, 20, 196)`, ink near 1, averaged over squares of two by two."""
    data = np.load(path / "omniglot" / "data.npz")
    known, unseen = data["in_small1"], data["fold"] == 1
    chosen = {"known": known, "unseen": unseen, "held out": ~known & ~unseen}[part]
    images = torch.from_numpy(data["images"][chosen]).float() / 255
    images = nn.functional.avg_pool2d(images.unsqueeze(1), 2).flatten(1)
    return images[torch.from_numpy(data["char"][chosen].astype(int)).argsort(stable=True)].reshape(
        -1, 20, 196
    )


def drawn(images: Tensor, generator: torch.Generator, shots: int, queries: int) -> Tensor:
    """Rows of some characters, each of other drawers."""
    which = torch.randperm(len(images), generator=generator)[:WAYS]
    rows = torch.randperm(images.shape[1], generator=generator)[: shots + queries]
    return images[which][:, rows]


def tasks_of(draw: Draw, number: int, seed: int, shots: int = 1) -> vm.TaskSet:
    generator, queries, found = torch.Generator().manual_seed(seed), 5, []
    for _ in range(number):
        x = draw(generator, shots, queries)
        y = torch.arange(WAYS).unsqueeze(1).expand(x.shape[:2])
        parts = [(x[:, rows].flatten(0, 1), y[:, rows].flatten())
                 for rows in (slice(shots), slice(shots, None))]  # fmt: skip
        found.append(vm.Task(parts[0], query=parts[1]))
    return vm.TaskSet(found)


def body(features: int, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(features, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, WAYS)
        )


HELD_OUT = "least squares, temperature by held-out tasks"


def methods() -> dict[str, tuple[vm.likelihoods.Likelihood, vm.Strategy]]:
    squares, closed = vm.likelihoods.LeastSquaresClasses, vm.ClosedForm()
    ridge = vm.Implicit("delta", "query", minimizer=closed)
    return {
        "least squares, temperature learned": (squares(WAYS), ridge),
        HELD_OUT: (squares(WAYS), ridge),
        "least squares, temperature 1": (squares(WAYS, learn_temperature=False), ridge),
        "prototypes": (vm.likelihoods.Categorical(WAYS), vm.Prototypes()),
        "Laplace, elbo": (vm.likelihoods.Categorical(WAYS), vm.Implicit("laplace")),
        "Laplace, query_predictive": (
            vm.likelihoods.Categorical(WAYS), vm.Implicit("laplace", "query_predictive")
        ),
    }  # fmt: skip


def joined(tasks: vm.TaskSet) -> vm.TaskSet:
    """Query rows join the support, as in `vm.compare`: "elbo" learns from support rows alone."""
    found = []
    for task in tasks:
        assert task.support is not None and task.query is not None
        (x, y), (more, labels) = task.support, task.query
        found.append(vm.Task((torch.cat([x, more]), torch.cat([y, labels]))))
    return vm.TaskSet(found)


def run(name: str, parts: list[vm.TaskSet], steps: int, seed: int) -> list[float]:
    """The four numbers of a method; parts: the tasks known, held out and unseen."""
    train, held_out, test = parts
    likelihood, strategy = methods()[name]
    net = body(train.batch().support.x.shape[-1], seed)
    prior = vm.GaussianPrior(learn_precision="shared", precision=32.0)
    if isinstance(strategy, vm.Prototypes):  # which have no use for a prior
        prior = vm.GaussianPrior(32.0)
    model = vm.TaskModel(net, likelihood, prior, shared=["0.*", "2.*"])
    rows = joined(train) if strategy.outer == "elbo" else train
    begin = time.perf_counter()
    fit = vm.fit(
        model, rows, strategy, steps, lambda p: torch.optim.Adam(p, 1e-2),
        batch_size=16, seed=seed, progress=False, compile=False,
        validate=vm.Validation(held_out, every=50, calibrate=True) if name == HELD_OUT else None,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    row = fit.adapt(test).score(num_samples=200).loc["all"]
    return [*row[["error_rate", "log_density", "calibration_error"]], seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--data", type=Path, default=None)
    options = parser.parse_args()
    sets: dict[str, list[Draw]] = {"made": [made, made, made]}
    if options.data is not None:
        sets["omniglot"] = [
            partial(drawn, characters(options.data, part))
            for part in ("known", "held out", "unseen")
        ]
    print(f"{'set':<10}{'head':<46}{'error':>8}{'log p':>8}{'calib.':>8}{'s':>8}")
    for label, draws in sets.items():
        numbers = zip(draws, (1000, 100, 100), (1, 3, 2), strict=True)
        parts = [tasks_of(draw, number, seed) for draw, number, seed in numbers]
        for name in methods():
            found = np.array(
                [run(name, parts, options.steps, seed) for seed in range(options.seeds)]
            )
            shown = "".join(f"{value:>8.3f}" for value in found.mean(0))
            print(f"{label:<10}{name:<46}{shown}", flush=True)


if __name__ == "__main__":
    main()
