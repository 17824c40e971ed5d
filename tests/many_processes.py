"""Fits by 1, 2 and 4 processes, compared: `python -m tests.many_processes` (minutes).

Every strategy, guide and way that a fit can go, with all tasks in each step and with minibatches,
and from streams.  The processes are started here, with the variables that torchrun sets, and speak
over the loopback; `tests/group/test_processes.py` starts two of them for some of the cases.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import varmeta as vm
from tests.cases import (
    GUIDES,
    OUTERS,
    adam,
    linear_model,
    net_model,
    ragged_tasks,
    scalar_model,
    seeded,
)
from tests.verbs.test_streams import ENDLESS, Lines
from tests.verbs.test_streams import fit as fit_stream
from tests.verbs.test_streams import model as stream_model
from varmeta.group.processes import Processes

Case = Callable[[Processes, int], vm.Fit]
PRIOR, TASKS = vm.GaussianPrior(3.0), ragged_tasks(7)
SHORT = vm.GradientDescent(0.02)
STEPS = 100


def of(strategy: Callable[[], Any], model: Any = None, **options: Any) -> Case:
    """A fit of such a strategy, by as many steps as are asked for."""

    def case(group: Processes, steps: int) -> vm.Fit:
        own = {"optimizer": adam, "compile": False, "seed": 1, "num_steps": steps} | options
        made = linear_model(PRIOR) if model is None else model()
        return vm.fit(made, own.pop("tasks", TASKS), strategy(), processes=group, **own)

    return case


STRATEGIES: dict[str, Callable[[], Any]] = {
    "joint": lambda: vm.Joint("normal"),
    "joint by draws": lambda: vm.Joint("normal", expectation="monte_carlo"),
    "reinit": lambda: vm.Reinit("normal", every=7),
    "implicit": lambda: vm.Implicit("delta", "query", 3, SHORT, on_unconverged="ignore"),
    "implicit, warm": lambda: vm.Implicit("normal", "elbo", 3, SHORT, warm_start=True),
    "implicit, to tolerance": lambda: vm.Implicit("normal", "query"),
    "unrolled": lambda: vm.Unrolled("delta", inner_steps=2),
    "first order, draws": lambda: vm.FirstOrder("normal", "query", 2, expectation="monte_carlo"),
    "reptile": lambda: vm.Reptile(inner_steps=2),
    "stochastic": lambda: vm.Stochastic(
        vm.Unrolled("delta", inner_steps=1),
        vm.StochasticAlg(num_steps=2, lr=0.001, start_scale=1.0),
    ),
}


def lbfgs(params: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(params, max_iter=3, line_search_fn="strong_wolfe")


def last_layer() -> vm.TaskModel:
    net = seeded(lambda: nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)))
    return vm.TaskModel(net, vm.likelihoods.Gaussian(), PRIOR, shared=["0.*"])


def dense() -> vm.Joint:
    return vm.Joint("multivariate_normal")


def joint() -> vm.Joint:
    return vm.Joint("normal")


WAYS: dict[str, Case] = {
    "closed form": of(dense, last_layer),
    "closed form, minibatch": of(dense, last_layer, batch_size=3),
    "an ensemble": of(dense, last_layer, ensemble=2),
    "L-BFGS": of(lambda: vm.Implicit("laplace"), optimizer=lbfgs),
    "the default L-BFGS": of(lambda: vm.Implicit("laplace"), optimizer=None),
    "a hyperprior": of(joint, lambda: linear_model(vm.GaussianPrior(learn_precision="shared"))),
    "a budget": of(joint, budget=30.0, batch_size=3),
    "clipped": of(joint, clip=0.5, batch_size=3),
    "validation": of(joint, validate=vm.Validation(ragged_tasks(5, seed=3), every=5)),
    "a network": of(joint, lambda: net_model(PRIOR)),
    "chunks": of(joint, task_chunk_size=2),
    "a step's graph": of(joint, compile=True),
    "in pieces": of(lambda: vm.Implicit("normal"), compile=True, batch_size=4),
    "a Pyro program": of(joint, lambda: scalar_model(vm.GaussianPrior(1.0))),
    "Newton": of(joint, optimizer=None),
    "reinit by Newton": of(lambda: vm.Reinit("normal"), optimizer=None),
    "the evidence in closed form": of(
        dense,
        lambda: linear_model(vm.GaussianPrior(learn_precision="full")),
        optimizer=None,
    ),
    "a posterior of eta": of(dense, optimizer=None, hyperguide="normal"),
}


def shuffled(group: Processes, steps: int) -> vm.Fit:
    """Through a loader that draws its order from torch's own generator."""
    source = DataLoader(Lines(), batch_size=4, shuffle=True, collate_fn=list)  # type: ignore[arg-type]
    made = stream_model()
    torch.manual_seed(group.rank)  # the first's decides
    return fit_stream(source, model=made, num_steps=steps, processes=group)


def streams() -> dict[str, Case]:
    def case(kind: str) -> Case:
        def made(group: Processes, steps: int) -> vm.Fit:
            source, own = ENDLESS[kind]()
            return fit_stream(source, num_steps=min(steps, 90), processes=group, **own)

        return made

    def some(group: Processes, steps: int) -> vm.Fit:
        return fit_stream(Lines(), num_steps=steps, batch_size=3, processes=group)

    found = {f"stream: {kind}": case(kind) for kind in ENDLESS if "workers" not in kind}
    return found | {"stream: with a length": some, "stream: a loader that shuffles": shuffled}


def cases() -> dict[str, Case]:
    found = WAYS | streams()
    for name, strategy in STRATEGIES.items():
        found[name] = of(strategy)
        found[f"{name}, minibatch"] = of(strategy, batch_size=3)
    for guide in GUIDES:
        if guide != "laplace":
            found[f"Joint({guide})"] = of(lambda g=guide: vm.Joint(g), batch_size=3)  # type: ignore[misc]
        found[f"Implicit({guide})"] = of(lambda g=guide: vm.Implicit(g))  # type: ignore[misc]
    for outer in OUTERS:
        found[f"outer={outer}"] = of(
            lambda o=outer: vm.Unrolled("normal", o, 2),  # type: ignore[misc]
            batch_size=3,
        )
    return found


# -- processes -------------------------------------------------------------------------------------


def started(
    size: int, program: Iterable[str], folder: Path, **environment: str
) -> list[subprocess.Popen[bytes]]:
    """So many processes of `python *program`, as torchrun would start them, each with a log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = []
    for rank in range(size):
        env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | environment
        env |= {"WORLD_SIZE": str(size), "RANK": str(rank), "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = str(Path(__file__).parents[1])
        with (folder / f"log.{rank}").open("wb") as log:
            made.append(
                subprocess.Popen(
                    [sys.executable, *program], env=env, stdout=log, stderr=log, cwd=folder
                )
            )
    return made


def by(size: int, names: Iterable[str], steps: int, folder: Path) -> list[dict[str, Any]]:
    """What each of `size` processes finds in the cases."""
    folder.mkdir(exist_ok=True)
    program = ["-m", "tests.many_processes", "--out", str(folder), "--steps", str(steps), *names]
    all_of_them = started(size, program, folder)
    codes = [process.wait(3600) for process in all_of_them]
    if any(codes):
        raise RuntimeError("\n".join((folder / f"log.{rank}").read_text() for rank in range(size)))
    return [torch.load(folder / f"found.{rank}", weights_only=False) for rank in range(size)]


def work(names: list[str], steps: int, out: Path) -> None:
    """What one of the processes does."""
    torch.set_num_threads(1)
    known, found = cases(), {}
    with vm.processes() as group:
        for name in names:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                fit = known[name](group, steps)
            found[name] = told(fit)
        torch.save(found, out / f"found.{group.rank}")


def told(fit: vm.Fit) -> dict[str, Any]:
    """What is compared of a fit."""
    return {
        "eta": fit.eta,
        "phi": fit.run.state.phi or {},
        "stop": fit.stop.partition(":")[0],
        "history": torch.tensor([*fit.history["loss"], fit.loss], dtype=torch.float64),
    }


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest, of eta, phi and all losses; infinite where the runs went different ways."""
    if len(one["history"]) != len(other["history"]):
        return float("inf")
    pairs = [(one[kind][name], other[kind][name]) for kind in ("eta", "phi") for name in one[kind]]
    pairs += [(one["history"], other["history"])]
    return max(float((a - b).abs().max()) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("names", nargs="*", metavar="case")
    given = parser.parse_args()
    names = given.names or list(cases())
    if given.out is not None:
        work(names, given.steps, given.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        one, two, four = (
            by(size, names, given.steps, Path(folder) / str(size)) for size in (1, 2, 4)
        )
    for name in names:
        alone = one[0][name]
        here = [difference(alone, found[name]) for found in (*two, *four)]
        print(f"{name:30} 2: {max(here[:2]):.1e}  4: {max(here[2:]):.1e}  {alone['stop']}")


if __name__ == "__main__":
    main()
