"""Two threads give, bit for bit, what one gives."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import varmeta as vm
from varmeta.graphs.process import ALONE


def tasks_of(seed: int, counts: bool = False) -> vm.TaskSet:
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for _ in range(4):
        x = torch.randn(8, 2, generator=generator, dtype=torch.float64)
        y = x.sum(-1) + torch.randn(8, generator=generator, dtype=torch.float64)
        y = torch.poisson((0.3 * y).exp(), generator=generator).long() if counts else y
        tasks.append(vm.Task((x[:5], y[:5]), (x[5:], y[5:])))
    return vm.TaskSet(tasks)


def program(params: dict[str, Tensor], x: Tensor, y: Tensor | None = None) -> Tensor:
    mean = (x * params["w"]).sum(-1)
    found: Tensor = pyro.sample("y", dist.StudentT(4.0, mean, 0.5), obs=y)
    return found


NUMBERS, COUNTS = tasks_of(1), tasks_of(2, counts=True)
LINEAR = vm.LinearPredictor(["a", "b"])
PRIOR = vm.GaussianPrior(learn_precision="per_parameter")


def network(shared: list[str] | None = None) -> vm.TaskModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    return vm.TaskModel(net, vm.likelihoods.Gaussian(), vm.GaussianPrior(1.0), shared=shared or [])


def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 0.05)


def numbers(fit: vm.Fit) -> list[Tensor]:
    return [torch.as_tensor(fit.loss), *(value.detach() for value in fit.eta.values())]


def jobs() -> dict[str, Callable[[], list[Tensor]]]:
    # one model, and one fit, for both threads: they share its modules
    net, shared = network(), network(shared=["0.*"])
    own = vm.TaskModel.from_pyro(program, {"w": (2,)}, vm.GaussianPrior(1.0))
    regression = vm.TaskModel(LINEAR, vm.likelihoods.Gaussian(), PRIOR)
    poisson = vm.TaskModel(LINEAR, vm.likelihoods.Poisson(), PRIOR)
    fitted = vm.fit(poisson, COUNTS)
    maml = vm.Unrolled("delta", "query", 2, vm.GradientDescent(0.05))
    auto = vm.Joint(lambda model: AutoNormal(model))
    new = torch.ones(2, 2, dtype=torch.float64)
    return {
        "newton": lambda: numbers(vm.fit(regression, NUMBERS)),
        "joint": lambda: numbers(vm.fit(net, NUMBERS, vm.Joint("normal"), 4, adam)),
        "shared": lambda: numbers(vm.fit(shared, NUMBERS, vm.Joint("normal"), 4, adam)),
        "maml": lambda: numbers(vm.fit(net, NUMBERS, maml, 3, adam)),
        "imaml": lambda: numbers(vm.fit(net, NUMBERS, vm.Implicit("delta", "query"), 2, adam)),
        "program": lambda: numbers(vm.fit(own, NUMBERS, vm.Joint("normal"), 4, adam)),
        "Pyro guide": lambda: numbers(vm.fit(own, NUMBERS, auto, 3, adam)),
        "score": lambda: [torch.tensor(fitted.adapt(COUNTS).score().to_numpy(dtype=float))],
        "draws": lambda: [fitted.adapt(COUNTS).predict(new, num_samples=20, seed=3).samples],
    }


@pytest.fixture
def often() -> Iterator[None]:
    """Threads take turns a thousand times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("often")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_two_threads_are_right() -> None:
    known = jobs()
    right = {name: job() for name, job in known.items()}
    wrong, names = list[str](), list(known)

    def work(first: int) -> None:
        for name in names[first:] + names[:first]:
            try:
                found = known[name]()
            except Exception as error:
                wrong.append(f"{name}: {type(error).__name__}: {error}")
                continue
            pairs = zip(found, right[name], strict=True)
            if not all(torch.allclose(a, b, 0, 0, equal_nan=True) for a, b in pairs):
                wrong.append(f"{name}: other numbers")

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(pyro.get_param_store()) == 0
    assert poutine.runtime._PYRO_STACK == []


def test_the_lock_is_free_while_a_fit_goes_backward() -> None:
    """On a GPU backward passes run in a thread of torch's own, which must not wait for a fit's."""
    free = list[bool]()

    def take() -> None:
        free.append(ALONE.acquire(timeout=2.0))
        if free[-1]:
            ALONE.release()

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            thread = threading.Thread(target=take)
            thread.start()
            thread.join()
            return gradient

    def watched(params: dict[str, Tensor], x: Tensor, y: Tensor | None = None) -> Tensor:
        return program({"w": Watched.apply(params["w"])}, x, y)

    model = vm.TaskModel.from_pyro(watched, {"w": (2,)}, vm.GaussianPrior(1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vm.fit(model, NUMBERS, vm.Joint("normal"), 1, adam)
        vm.fit(model, NUMBERS, vm.Implicit("normal", inner_steps=2), 1, adam)
    assert free
    assert all(free)
