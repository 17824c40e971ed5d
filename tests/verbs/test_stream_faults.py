"""What goes wrong in the middle of a stream, or is given in a stream's place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.verbs.test_streams import by_step, fit, line, model, same


class FewRows(nn.Module):
    """A network that has places for four rows and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 4:
            raise RuntimeError("no place for more than 4 rows")
        return self.line(x)


def test_a_step_that_fails_loses_nothing() -> None:
    made = model(FewRows())

    def tasks(step: int, generator: torch.Generator) -> list[vm.Task]:
        return [line(step, rows=8)] if step == 3 else by_step(step, generator)

    with pytest.raises(RuntimeError, match="no place for more") as caught:
        fit(tasks, model=made)
    kept = caught.value.fit  # type: ignore[attr-defined]
    assert kept.run.step == 3 and "ended by the step's RuntimeError after 3 steps" in kept.stop
    assert kept.loss == fit(by_step, 3, model=made).loss
    same(fit(by_step, model=made, resume=kept), fit(by_step, model=made))


@pytest.mark.filterwarnings("ignore:x has mean 1e.30")
def test_the_first_step_that_fails_fails_as_it_is() -> None:
    def tasks(step: int, generator: torch.Generator) -> list[vm.Task]:
        far = torch.full((3, 1), 1e30)
        return [vm.Task((far, far[:, 0]), (far, far[:, 0]))]

    with pytest.raises(ValueError, match="not finite at step 0") as caught:
        fit(tasks)
    assert not hasattr(caught.value, "fit")


def test_the_wrong_one_of_a_list_is_named() -> None:
    for wrong, word in ((3, "an int"), (None, "None")):
        with pytest.raises(TypeError, match=f"a list with {word} at step 0"):
            fit(lambda step, generator, wrong=wrong: [line(0), wrong])
    with pytest.raises(TypeError, match="a list with an int at step 0"):
        fit(iter([line(0), 3]), batch_size=2)


def test_none_is_no_end() -> None:
    steps: list[Any] = [by_step(step, torch.Generator()) for step in range(3)]
    with pytest.raises(TypeError, match="gave None, expected a vm.Task") as caught:
        fit(iter([steps[0], None, steps[2]]))
    assert caught.value.fit.run.step == 1  # type: ignore[attr-defined]


def test_a_class_beyond_the_outputs_is_named_later_too() -> None:
    """Of a likelihood that does not say how many classes there are the network does."""
    made = vm.TaskModel(nn.Linear(1, 3), vm.likelihoods.Categorical(), vm.GaussianPrior(1.0))

    def tasks(step: int, generator: torch.Generator) -> list[vm.Task]:
        x, y = torch.randn(3, 1, generator=generator), torch.tensor([0, 1, 2])
        return [vm.Task((x, y), (x, y + 2 * (step == 2)))]

    with pytest.raises(ValueError, match="row 1: y = 3 is outside the support") as caught:
        fit(tasks, model=made)
    assert caught.value.fit.run.step == 2  # type: ignore[attr-defined]


def test_a_function_that_draws_from_elsewhere_is_told_so_where_it_is_resumed() -> None:
    generator = torch.Generator().manual_seed(0)

    def tasks(step: int, _: torch.Generator) -> list[vm.Task]:
        return [line(int(torch.randint(1000, (), generator=generator)))]

    with pytest.raises(ValueError, match="from the generator that it is given"):
        fit(tasks, resume=fit(tasks, 3))


@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        ("gpu", "device='gpu' is none that torch has here"),
        (4.5, "device=4.5 is none that torch has here"),
        ("meta", "device='meta' holds no numbers"),
    ],
)
def test_a_device_that_is_none_is_told_in_a_sentence(device: Any, sentence: str) -> None:
    for tasks in (by_step, vm.TaskSet([line(0)])):
        with pytest.raises(ValueError, match=sentence):
            fit(tasks, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU")
def test_without_a_gpu_the_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="device='cuda' is none that torch has here"):
        fit(by_step, device="cuda")
