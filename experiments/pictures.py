"""The pictures that are kept in docs/images: countries that a fit has never seen, for the README,
and the post's figures as `make landscape` drew them, made small.

    python -m experiments.pictures
    python -m experiments.pictures --landscape results/landscape
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import varmeta as vm

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
SHOWN = ("Costa Rica", "Greece", "Uganda")
YEARS = np.linspace(1945, 2015, 71)
COLOURS = 48  # of a picture in the repository; lines and bands need few


@dataclass(frozen=True)
class Ink:
    text: str
    line: str
    band: str
    paper: str


INKS = {
    "light": Ink("#24292f", "#1f3a5f", "#7fa6d6", "#ffffff"),
    "dark": Ink("#e6edf3", "#a9c9f5", "#4d7fc0", "#0d1117"),
}


def countries(part: vm.datasets.shipped.Split, query: str | None = None) -> vm.TaskSet:
    """A task per country: the year and life expectancy; `query="later"`: to extrapolate."""
    frame = vm.datasets.gapminder(part, as_frame=True).astype({"year": float})
    frame["later"] = 1 - frame["support"]
    return vm.TaskSet.from_frame(frame, task="country", x=["year"], y="life_exp", query=query)


def learned() -> tuple[vm.Fit, Any]:
    """A network whose last layer is each country's own, as in docs/prior-over-networks.md."""
    torch.manual_seed(0)
    noise = vm.likelihoods.Gaussian()
    known, scaling = countries("train").standardized(noise)
    held_out = vm.Validation(scaling.apply(countries("val", query="later")), every=20)
    net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    prior = vm.GaussianPrior(learn_precision="per_module")
    model = vm.TaskModel(net, noise, prior, shared=["0.*", "2.*"])
    head = vm.Joint("multivariate_normal")
    fit = vm.fit(model, known, head, 500, lambda p: torch.optim.Adam(p, 1e-2), validate=held_out)
    return fit, scaling


def unseen(fit: vm.Fit, scaling: Any, ink: Ink) -> Any:
    """Curves drawn from the prior, and three countries adapted to their years up to 1977."""
    import matplotlib.pyplot as plt

    x = scaling.x(YEARS).unsqueeze(-1)
    new = fit.adapt(vm.TaskSet([vm.Task(name="new")], dtype=torch.float64))
    shown = [task for task in countries("test", query="later") if task.name in SHOWN]
    posterior = fit.adapt(scaling.apply(vm.TaskSet(shown)))
    coloured = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10}
    style |= dict.fromkeys(coloured, ink.text)
    with plt.rc_context(style):
        size: dict[str, Any] = {"figsize": (10.0, 2.7), "sharey": True, "layout": "constrained"}
        figure, axes = plt.subplots(1, 4, facecolor=ink.paper, **size)
        curves = scaling.y_inverse(new.expected(x, 25, seed=1).samples[:, 0]).numpy()
        axes[0].plot(YEARS, curves.T, color=ink.band, lw=0.8, alpha=0.8)
        axes[0].set_title("drawn from the learned prior")
        predicted = posterior.predict(x)
        for number, ax in enumerate(axes[1:]):
            for level, alpha in ((0.9, 0.3), (0.5, 0.5)):
                ends = [scaling.y_inverse(end[number]).numpy() for end in predicted.interval(level)]
                ax.fill_between(YEARS, *ends, color=ink.band, alpha=alpha, lw=0)
            ax.plot(
                YEARS, scaling.y_inverse(predicted.mean[number]).numpy(), color=ink.line, lw=1.6
            )
            points(ax, shown[number], ink)
            ax.set_title(shown[number].name)
        axes[0].set_ylabel("life expectancy (years)")
        for ax in axes:
            ax.set_facecolor(ink.paper)
            ax.spines[["top", "right"]].set_visible(False)
            ax.set(ylim=(22, 92), xticks=[1950, 1980, 2010])
        axes[1].legend(loc="lower right", fontsize=7.5, frameon=False)
    return figure


def points(ax: Any, task: vm.Task, ink: Ink) -> None:
    """A country's years: those that it was adapted to, and those that came later."""
    for part, face, label in (
        (task.support, ink.line, "adapted to"),
        (task.query, ink.paper, "came later"),
    ):
        assert part is not None  # both are there: query="later"
        ax.scatter(part[0][:, 0], part[1], s=15, fc=face, ec=ink.line, lw=1, zorder=3, label=label)


def small(source: Path, target: Path) -> None:
    """A PNG with few colours, a fifth of its size; what moves keeps its frames."""
    from PIL import Image

    image = Image.open(source).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--landscape", type=Path, help="the folder that `make landscape` wrote")
    parser.add_argument("--out", type=Path, default=IMAGES)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if arguments.landscape is not None:
        for path in sorted(arguments.landscape.glob("*.png")):
            small(path, arguments.out / f"post-{path.name.replace('_', '-')}")
        return
    fit, scaling = learned()
    for name, ink in INKS.items():
        path = arguments.out / f"unseen-{name}.png"
        unseen(fit, scaling, ink).savefig(path, dpi=160)
        small(path, path)
    print(fit.adapt(scaling.apply(countries("test", query="later"))).score().loc["all"])


if __name__ == "__main__":
    main()
