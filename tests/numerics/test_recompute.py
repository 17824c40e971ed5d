"""Steps whose graph is made again on the way back: the same derivative in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import varmeta as vm
from tests.cases import adam, net_model, ragged_tasks, seeded
from tests.common import F64, randn
from varmeta.numerics import tree
from varmeta.numerics.first_order import Adam, GradientDescent
from varmeta.numerics.learning_rates import LearnedRates
from varmeta.numerics.minimize import minimize
from varmeta.numerics.recompute import recomputed


class Held(TorchDispatchMode):
    """The most bytes of tensors made within it that are alive at once, looked at now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(one, Tensor):
                storage = one.untyped_storage()
                self.known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.calls += 1
        if self.calls % 100 == 0:
            self.known = {k: kept for k, kept in self.known.items() if not kept[0].expired()}
            self.most = max(self.most, sum(size for _, size in self.known.values()))
        return found


def test_a_function_is_run_twice_and_has_its_own_derivative() -> None:
    a, b = randn(3).requires_grad_(), randn(3, seed=1).requires_grad_()
    unused, runs = randn(2).requires_grad_(), []

    def function(at: dict[str, Tensor]) -> dict[str, Tensor]:
        runs.append(torch.is_grad_enabled())
        return {"y": (at["a"] * b).sin(), "z": at["fixed"] + at["a"] ** 2, "n": torch.ones(2)}

    found = recomputed(function, {"a": a, "fixed": randn(3, seed=2)}, [b, unused])
    expected = (a * b).sin().sum() + 2.0 * (a**2).sum()
    got = torch.autograd.grad(
        found["y"].sum() + 2.0 * found["z"].sum(), [a, b, unused], allow_unused=True
    )
    for one, other in zip(got, torch.autograd.grad(expected, [a, b]), strict=False):
        torch.testing.assert_close(one, other)
    assert got[2] is None and runs == [False, True]


@pytest.mark.parametrize(
    "rule",
    [
        GradientDescent(0.05),
        GradientDescent(0.03, momentum=0.6, clip=2.0),
        GradientDescent(LearnedRates()),
        Adam(0.02),
    ],
    ids=lambda rule: type(rule).__name__,
)
@pytest.mark.parametrize("steps", [1, 2, 23])
def test_the_derivative_is_that_of_the_graph_that_is_kept(rule: Any, steps: int) -> None:
    start = {"w": randn(4, 3).requires_grad_(), "v": randn(4, seed=1).requires_grad_()}
    centre, scale = randn(3, seed=2).requires_grad_(), randn(seed=3).requires_grad_()
    logs = {"w": randn(5, 1, 3, seed=4).requires_grad_(), "v": randn(1, 1, seed=5).requires_grad_()}
    learned = isinstance(rule, GradientDescent) and isinstance(rule.lr, LearnedRates)

    def fn(phi: dict[str, Tensor]) -> Tensor:
        return (phi["w"] - centre).cosh().sum(-1) + (scale * phi["v"]).cosh() + phi["v"] ** 2

    def gradient(**options: Any) -> tuple[Tensor, ...]:
        if learned:
            rates = {name: 0.02 * x.exp() for name, x in logs.items()}
            options |= {"rates": rates, "lr_scale": torch.tensor([1.0, 0.5, 0.2, 0.1], dtype=F64)}
        end = minimize(fn, start, rule, steps=steps, create_graph=True, **options)
        assert not any(stat.requires_grad for stat in end.stats.values())
        value = tree.flatten(end.value).sin().sum()
        inputs = [*start.values(), centre, scale, *(logs.values() if learned else ())]
        return (value.detach(), *torch.autograd.grad(value, inputs), *end.stats.values())

    for one, other in zip(gradient(), gradient(recompute=(centre, scale)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12, equal_nan=True)


STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "delta": ("delta", {"minimizer": GradientDescent(0.005)}),
    "normal": ("normal", {"minimizer": Adam(0.01)}),
    "learned": ("delta", {"minimizer": GradientDescent(LearnedRates(0.005, "weight", True))}),
}


@pytest.mark.parametrize("case", STRATEGIES)
@pytest.mark.parametrize("shared", [(), ("0.*",)])
def test_the_meta_gradient_is_the_same(case: str, shared: tuple[str, ...]) -> None:
    """Also where shared layers are run once, ahead of the steps."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))

    noise, prior = vm.likelihoods.Gaussian(0.5), vm.GaussianPrior(learn_precision="per_module")
    model, tasks = vm.TaskModel(seeded(make), noise, prior, shared), ragged_tasks()
    guide, options = STRATEGIES[case]
    kept, again = (
        vm.meta_gradient(model, tasks, vm.Unrolled(guide, "query", 12, recompute=how, **options))
        for how in (False, True)
    )
    assert again.value == pytest.approx(kept.value, rel=1e-12)
    for name, g in kept.grads.items():
        torch.testing.assert_close(again.grads[name], g, rtol=1e-9, atol=1e-10)


def test_memory_does_not_grow_with_the_steps() -> None:
    """Of live tensors; docs/strategies.md has what a larger network takes of the machine."""

    def make() -> nn.Module:
        layers = (nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
        return nn.Sequential(*layers)

    model = vm.TaskModel(seeded(make), vm.likelihoods.Gaussian(0.3), vm.GaussianPrior(0.1))
    tasks = vm.datasets.sinusoids(4, num_support=5, num_query=5)

    def held(steps: int, recompute: bool) -> float:
        rule = GradientDescent(1e-5)
        strategy = vm.Unrolled("delta", "query", steps, rule, recompute=recompute)
        with Held() as seen:
            vm.meta_gradient(model, tasks, strategy, compile=False, task_chunk_size=4)
        return seen.most / 2**20

    kept, again, longer = held(100, False), held(100, True), held(200, True)
    assert kept > 4 * again
    assert longer < 1.6 * again


def test_by_itself_it_is_done_beyond_fifty_steps_and_budgets_know() -> None:
    model, tasks = net_model(vm.GaussianPrior(3.0)), ragged_tasks(3)

    def spent(steps: int, **options: Any) -> float:
        rule = GradientDescent(1e-3)
        fit = vm.fit(model, tasks, vm.Unrolled("delta", "query", steps, rule, **options), 1, adam)
        return fit.run.evaluations

    assert spent(50) == 151.5 and spent(51) == 205.5
    assert spent(51, recompute=False) == 154.5 and spent(4, recompute=True) == 17.5


def test_a_task_that_breaks_is_found_there_too() -> None:
    target = torch.tensor([0.0, 1.0], dtype=F64, requires_grad=True)

    def fn(phi: dict[str, Tensor]) -> Tensor:
        return torch.where(phi["w"] < 0.8, phi["w"], torch.nan) * 0.0 + (phi["w"] - target) ** 2

    found = minimize(
        fn,
        {"w": torch.zeros(2, dtype=F64)},
        GradientDescent(0.2),
        steps=9,
        create_graph=True,
        recompute=(target,),
    )
    assert found.result.tolist() == [vm.Result.STEP_LIMIT, vm.Result.NON_FINITE]
    assert 0.5 < float(found.value["w"][1].detach()) < 0.8
