"""Few-shot characters, streamed: every strategy on the same body, episodes and number of steps.

    python -m experiments.omniglot --data DIR [--steps 4000] [--only "ridge head" MAML]
    python -m experiments.omniglot --data DIR --alphabets full [--steps 8000]

DIR holds omniglot/data.npz.  The first draws 5-way one-shot tasks anew at every step from the
characters of 22 alphabets, each turned by a random quarter, and judges 600 episodes of characters
from five other alphabets.  The second learns 20-way one-shot tasks within an alphabet, from the
full background or the small one (five alphabets), and is judged on 20 runs of one drawer's
characters against another's, from the same five other alphabets (omniglot/val_runs.npz).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import varmeta as vm

BODY = tuple(f"{4 * block + layer}.*" for block in range(4) for layer in (0, 1))


def conv4(width: int, outputs: int, seed: int) -> nn.Module:
    """Four blocks of convolution, group norm, ReLU and pooling, and a linear head."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for block in range(4):
            channels = width if block else 1
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(4, width)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, outputs))


@dataclass(frozen=True)
class Method:
    """A strategy with its likelihood and prior; shared: whether the body is."""

    strategy: vm.Strategy
    classes: Any = vm.likelihoods.Categorical
    precision: float = 1e-6
    shared: bool = True


def methods() -> dict[str, Method]:
    """By the name that the table shows; step sizes are of the field's recipes (means over rows)."""
    step = vm.GradientDescent(0.4, per_point=True)
    learned_step = vm.GradientDescent(vm.LearnedRates(0.4), per_point=True)
    ridge = vm.Implicit("delta", "query", minimizer=vm.ClosedForm())
    return {
        "prototypes": Method(vm.Prototypes()),
        "ridge head (R2-D2)": Method(ridge, vm.likelihoods.LeastSquaresClasses, 1.0),
        "head by iMAML": Method(vm.Implicit("delta", "query"), precision=1.0),
        "head by 5 steps (ANIL)": Method(vm.Unrolled("delta", "query", 5, step)),
        "MAML, 1 step, learned rates": Method(
            vm.Unrolled("delta", "query", 1, learned_step), shared=False
        ),
        "MAML, 1 step": Method(vm.Unrolled("delta", "query", 1, step), shared=False),
        "first-order MAML, 3 steps": Method(vm.FirstOrder("delta", "query", 3, step), shared=False),
    }


class Characters:
    """Omniglot's images, ink near 1, and whose they are."""

    def __init__(self, folder: Path) -> None:
        data = np.load(folder / "omniglot" / "data.npz")
        self.images = torch.from_numpy(data["images"]).float().div(255).unsqueeze(1)
        self.character, self.alphabet = data["char"].astype(int), data["alphabet"].astype(int)
        self.unseen, self.small = data["fold"] == 1, data["in_small1"]

    def episodes(
        self, rows: np.ndarray, ways: int, queries: int, seed: int, **options: Any
    ) -> vm.Episodes:
        """One-shot episodes of the images where `rows` is True."""
        return vm.episodes(
            self.images[rows], self.character[rows], ways, 1, queries, seed, **options
        )


def turned(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Each character by a random quarter, all its drawings alike."""
    quarters = torch.randint(4, (len(rows),), generator=generator).tolist()
    return torch.stack(
        [torch.rot90(own, k, (-2, -1)) for own, k in zip(rows, quarters, strict=True)]
    )


def bent(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Every drawing a little turned, stretched, slanted and moved, another time for each."""
    flat = rows.flatten(0, 1)
    by = 2 * torch.rand(len(flat), 6, generator=generator) - 1
    angle, move = by[:, 0] * 0.25, 0.15 * by[:, 4:]
    width, height, slant = 1 + 0.2 * by[:, 1], 1 + 0.2 * by[:, 2], 0.3 * by[:, 3]
    cos, sin = angle.cos(), angle.sin()
    first = torch.stack([width * cos, width * (slant * cos - sin), move[:, 0]], -1)
    second = torch.stack([height * sin, height * (slant * sin + cos), move[:, 1]], -1)
    grid = nn.functional.affine_grid(
        torch.stack([first, second], 1), list(flat.shape), align_corners=False
    )
    return nn.functional.grid_sample(flat, grid, align_corners=False).reshape(rows.shape)


def turned_and_bent(rows: Tensor, generator: torch.Generator) -> Tensor:
    return bent(turned(rows, generator), generator)


def learned(
    method: Method, tasks: vm.Episodes, width: int, steps: int, batch: int, seed: int, **more: Any
) -> vm.Fit:
    """The fit, by Adam at 1e-3 that falls to zero."""
    ways = int(tasks[0].support[1].max()) + 1  # type: ignore[index]
    net = conv4(width, ways, seed)
    model = vm.TaskModel(
        net,
        method.classes(ways),
        vm.GaussianPrior(method.precision),
        shared=BODY if method.shared else (),
    )
    return vm.fit(
        model, tasks, method.strategy, steps, lambda p: torch.optim.Adam(p, 1e-3),
        batch_size=batch, seed=seed, compile=False, **more,
    )  # fmt: skip


def minutes_since(begin: float) -> float:
    return (time.perf_counter() - begin) / 60


def five_way(data: Characters, options: argparse.Namespace) -> None:
    train = data.episodes(~data.unseen, 5, 5, seed=0, augment=turned)
    test = data.episodes(data.unseen, 5, 15, seed=1).take(options.episodes)
    print(f"{'strategy':<30}{'accuracy':>38}{'log p':>12}{'min':>7}{'test min':>9}", flush=True)
    for name, method in methods().items():
        if options.only and name not in options.only:
            continue
        begin = time.perf_counter()
        fit = learned(method, train, 32, options.steps, options.batch, options.seed)
        took, begin = minutes_since(begin), time.perf_counter()
        posterior = fit.adapt(test)
        shown, density = str(posterior.accuracy()), posterior.score()["log_density"].iloc[-1]
        print(
            f"{name:<30}{shown:>38}{density:>12.3f}{took:>7.1f}{minutes_since(begin):>9.1f}",
            flush=True,
        )


def within_alphabets(data: Characters, options: argparse.Namespace) -> None:
    rows = ~data.unseen & (data.small if options.alphabets == "small" else True)
    train = data.episodes(rows, 20, 3, seed=0, within=data.alphabet[rows], augment=turned_and_bent)
    runs = np.load(options.data / "omniglot" / "val_runs.npz")
    images = {
        part: torch.from_numpy(runs[f"{part}_images"]).float().div(255).unsqueeze(2)
        for part in ("train", "test")
    }
    label = torch.from_numpy(runs["test_label"].astype(int))
    test = vm.TaskSet(
        vm.Task((images["train"][k], torch.arange(20)), (images["test"][k], label[k]), f"run {k}")
        for k in range(len(label))
    )
    for name, method in methods().items():
        if name not in (options.only or ["prototypes", "ridge head (R2-D2)"]):
            continue
        begin = time.perf_counter()
        fit = learned(method, train, options.width, options.steps, options.batch, options.seed)
        took = minutes_since(begin)
        error = fit.adapt(test).score()["error_rate"]
        spread = error.iloc[:-1].std() / len(label) ** 0.5
        print(
            f"{name}, {options.alphabets} background: error {error['all']:.3f} +- {spread:.3f} "
            f"over {len(label)} runs, {took:.1f} min",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=4, help="tasks a step")
    parser.add_argument("--episodes", type=int, default=600, help="unseen ones to judge")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--alphabets", choices=("full", "small"), default=None)
    options = parser.parse_args()
    data = Characters(options.data)
    if options.alphabets is None:
        five_way(data, options)
    else:
        within_alphabets(data, options)


if __name__ == "__main__":
    main()
