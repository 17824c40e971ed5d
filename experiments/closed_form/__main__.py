"""Gaussian tasks in closed form: python -m experiments.closed_form --out DIR.

speed: `y ~ x + (x | task)` by maximum likelihood, from the table to the printed fit, beside
lme_python, mixedlm and statsmodels where they are installed (extra `bench`), in one process after
all imports.  sinusoids: the last layer of a network as a Gaussian head, on the noise-free sinusoids
of Zhou et al. (2019), Efficient Meta Learning via Minibatch Proximal Update, figure 1b.  unseen:
the same head on other tasks, see `unseen.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.closed_form import sinusoids, speed, unseen

PARTS = {"speed": speed.run, "sinusoids": sinusoids.run, "unseen": unseen.run}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=speed.SHARED, help="a folder for each set")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--size", choices=("smoke", "full"), default="full")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for part in arguments.only:
        PARTS[part](arguments)


if __name__ == "__main__":
    main()
