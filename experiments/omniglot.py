"""Few-shot characters, streamed: every strategy on the same body and the same images.

    python -m experiments.omniglot --data DIR [--steps 3000] [--only "ridge head (R2-D2)" ...]
    python -m experiments.omniglot --data DIR --ways 20 --only prototypes --steps 5000 --turned 300
    python -m experiments.omniglot --data DIR --alphabets full --only prototypes --steps 4000

DIR holds omniglot/data.npz.  The first draws 5-way one-shot tasks anew at every step from the
characters of 22 alphabets, where a character turned by a quarter or mirrored is another, and judges
600 episodes of characters from five other alphabets.  The second learns from 20-way tasks and is
judged on the same episodes.  The third learns 20-way one-shot tasks within an alphabet, from the
full background or the small one (five alphabets), and is judged on 20 runs of one drawer's
characters against another's, from the same five other alphabets (omniglot/val_runs.npz).  Minutes
are those of all cores together.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import varmeta as vm


class Body(nn.Module):
    """Four blocks of convolution, group norm, pooling (but for the last) and ReLU.

    half: computed in bfloat16, the weights kept in single precision: twice as fast on processors
        that have it.  For a shared body.
    """

    def __init__(self, width: int, half: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for block in range(4):
            channels = width if block else 1
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(4, width)]
            layers += [nn.MaxPool2d(2)] if block < 3 else []
            layers += [nn.ReLU()]  # of fewer numbers than before pooling, and the same
        self.layers, self.half_precision = nn.Sequential(*layers, nn.Flatten()), half

    def forward(self, x: Tensor) -> Tensor:
        if not self.half_precision:
            return self.layers(x)  # type: ignore[no-any-return]
        with torch.autocast(x.device.type, torch.bfloat16):
            out: Tensor = self.layers(x)
        return out.float()


class Turned(nn.Module):
    """What a body sees in an image and in its three quarter turns, side by side.

    A body that learned turned characters as others takes the four for four looks at one.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.body(torch.rot90(x, k, (-2, -1))) for k in range(4)], -1)


def conv4(width: int, outputs: int, seed: int, half: bool) -> nn.Sequential:
    """The body, "0.*", and a linear head."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(Body(width, half), nn.Linear(9 * width, outputs))


def looking_four_times(fit: vm.Fit) -> nn.Sequential:
    """The network of a fit with its body `Turned`, and a head for as many features."""
    net = fit.model.net
    assert isinstance(net, nn.Sequential) and isinstance(net[1], nn.Linear)
    body = copy.deepcopy(net[0])
    body.load_state_dict({name: fit.eta[f"0.{name}"] for name, _ in body.named_parameters()})
    return nn.Sequential(Turned(body), nn.Linear(4 * net[1].in_features, net[1].out_features))


@dataclass(frozen=True)
class Method:
    """A strategy with its likelihood and prior; shared: whether the body is."""

    strategy: vm.Strategy
    likelihood: Callable[..., vm.likelihoods.Likelihood] = vm.likelihoods.Categorical
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

    def learned_from(self, rows: np.ndarray, ways: int, queries: int, within: bool) -> vm.Episodes:
        """Bent images where `rows` is True; turned or mirrored they are of other characters."""
        own = self.images[rows]
        looks = [torch.rot90(x, k, (-2, -1)) for x in (own, own.flip(-1)) for k in range(4)]
        images = torch.cat(looks)
        character, alphabet = (
            np.concatenate([8 * names[rows] + k for k in range(8)])
            for names in (self.character, self.alphabet)
        )
        groups = alphabet if within else None
        return vm.episodes(
            images, character, (ways, ways), 1, queries, seed=0, within=groups, augment=bent
        )

    def unseen_episodes(self, ways: int, queries: int) -> vm.Episodes:
        images, character = self.images[self.unseen], self.character[self.unseen]
        return vm.episodes(images, character, (ways, ways), 1, queries, seed=1)


def bent(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Every drawing a little turned, stretched, slanted and moved, another time for each."""
    flat = rows.flatten(0, 1)
    by = 2 * torch.rand(len(flat), 6, generator=generator) - 1
    angle, move = by[:, 0] * 0.15, 0.1 * by[:, 4:]
    width, height, slant = 1 + 0.12 * by[:, 1], 1 + 0.12 * by[:, 2], 0.18 * by[:, 3]
    cos, sin = angle.cos(), angle.sin()
    first = torch.stack([width * cos, width * (slant * cos - sin), move[:, 0]], -1)
    second = torch.stack([height * sin, height * (slant * sin + cos), move[:, 1]], -1)
    grid = nn.functional.affine_grid(
        torch.stack([first, second], 1), list(flat.shape), align_corners=False
    )
    return nn.functional.grid_sample(flat, grid, align_corners=False).reshape(rows.shape)


def learned(method: Method, tasks: vm.Episodes, options: argparse.Namespace) -> vm.Fit:
    """The fit, by Adam at 1e-3 that falls to zero; tasks of fewer ways than it learns are told.

    options.turned: then so many steps at 2e-4 of the same body that looks four times.
    """
    ways = tasks.ways[1] if isinstance(tasks.ways, tuple) else tasks.ways
    net = conv4(options.width, ways, options.seed, half=method.shared)

    def descended(net: nn.Module, steps: int, rate: float) -> vm.Fit:
        model = vm.TaskModel(
            net,
            method.likelihood(ways, ways="ways"),
            vm.GaussianPrior(method.precision),
            shared=["0.*"] if method.shared else (),
        )
        return vm.fit(
            model, tasks, method.strategy, steps, lambda p: torch.optim.Adam(p, rate),
            batch_size=options.batch, seed=options.seed, compile=False,
        )  # fmt: skip

    fit = descended(net, options.steps, 1e-3)
    return descended(looking_four_times(fit), options.turned, 2e-4) if options.turned else fit


def minutes_since(begin: float) -> float:
    return (time.process_time() - begin) / 60


def five_way(data: Characters, options: argparse.Namespace) -> None:
    train = data.learned_from(~data.unseen, options.ways, 5, within=False)
    test = data.unseen_episodes(5, 15).take(options.episodes)
    print(f"{'strategy':<30}{'accuracy':>38}{'log p':>12}{'min':>7}{'test min':>9}", flush=True)
    for name, method in methods().items():
        if options.only and name not in options.only:
            continue
        begin = time.process_time()
        fit = learned(method, train, options)
        took, begin = minutes_since(begin), time.process_time()
        posterior = fit.adapt(test)
        shown, density = str(posterior.accuracy()), posterior.score()["log_density"].iloc[-1]
        print(
            f"{name:<30}{shown:>38}{density:>12.3f}{took:>7.1f}{minutes_since(begin):>9.1f}",
            flush=True,
        )


def within_alphabets(data: Characters, options: argparse.Namespace) -> None:
    rows = ~data.unseen & (data.small if options.alphabets == "small" else True)
    train = data.learned_from(rows, 20, 5, within=True)
    runs = np.load(options.data / "omniglot" / "val_runs.npz")
    images = {
        part: torch.from_numpy(runs[f"{part}_images"]).float().div(255).unsqueeze(2)
        for part in ("train", "test")
    }
    label = torch.from_numpy(runs["test_label"].astype(int))
    test = vm.TaskSet(
        vm.Task(
            (images["train"][k], torch.arange(20)), (images["test"][k], label[k]), f"run {k}",
            {"ways": 20.0},
        )
        for k in range(len(label))
    )  # fmt: skip
    for name, method in methods().items():
        if name not in (options.only or ["prototypes", "ridge head (R2-D2)"]):
            continue
        begin = time.process_time()
        fit = learned(method, train, options)
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
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=4, help="tasks a step")
    parser.add_argument("--ways", type=int, default=5, help="of the tasks to learn from")
    parser.add_argument("--episodes", type=int, default=600, help="unseen ones to judge")
    parser.add_argument("--turned", type=int, default=0, help="steps of a body that looks 4 times")
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
