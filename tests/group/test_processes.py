"""Two processes find what one does; one that ends is named by the other."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import varmeta as vm
from tests import many_processes
from tests.cases import linear_model, ragged_tasks
from tests.group import ends
from tests.many_processes import STRATEGIES, cases, difference, started
from varmeta.files.folder import numbered
from varmeta.group import processes as group_module
from varmeta.group.beats import Beats
from varmeta.group.processes import Processes, edges

distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch is built without torch.distributed"
)
# of those that `python -m tests.many_processes` compares, by 4 processes too
NAMES = [
    *STRATEGIES,
    *(f"{name}, minibatch" for name in ("joint by draws", "implicit, warm", "stochastic")),
    "closed form, minibatch", "an ensemble", "L-BFGS", "a hyperprior", "validation", "chunks",
    "Newton", "stream: numbered", "stream: function", "stream: a loader that shuffles",
]  # fmt: skip
FEW = 12


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return many_processes.by(2, NAMES, FEW, tmp_path_factory.mktemp("two") / "found")


@distributed
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_find_what_one_does(name: str, by_two: list[dict[str, Any]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        alone = many_processes.told(cases()[name](Processes(), FEW))
    # sums in another order; streams are of float32
    tolerance = 1e-3 if name.startswith("stream") else 1e-9
    for found in by_two:
        assert difference(alone, found[name]) < tolerance
        assert found[name]["stop"] == alone["stop"]
    # and the same bits as each other
    assert difference(by_two[0][name], by_two[1][name]) == 0.0


def end(kind: str, folder: Path, size: int = 2) -> list[dict[str, Any]]:
    """What each of the processes wrote down; empty for one that was killed."""
    running = started(size, ["-m", "tests.group.ends", kind, str(folder)], folder)
    for process in running:
        process.wait(120)
    files = [folder / f"{rank}.json" for rank in range(size)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


@distributed
def test_a_killed_process_is_named_and_the_rest_is_done_by_another_number(tmp_path: Path) -> None:
    begin = time.monotonic()
    (one, other), took = end("kill", tmp_path), time.monotonic() - begin
    assert not other and took < 100  # of which starting takes some
    kind, said = one["error"]
    assert kind == "ProcessError" and said.startswith("process 1 of 2 (") and "was killed" in said
    assert next(iter(numbered(tmp_path / "run"))) == 6
    on, whole = ends.fit(resume=tmp_path / "run"), ends.fit()
    assert difference(many_processes.told(on), many_processes.told(whole)) < 1e-9


@distributed
def test_what_one_process_raises_ends_the_other(tmp_path: Path) -> None:
    one, other = end("raise", tmp_path)
    assert other["error"] == ["ArithmeticError", "in one process alone"]
    kind, said = one["error"]
    assert kind == "ProcessError" and said.endswith(
        "ended: ArithmeticError('in one process alone')"
    )


@distributed
def test_all_end_at_the_same_step_and_go_on(tmp_path: Path) -> None:
    one, other = end("gently", tmp_path)
    whole, go_on = ends.fit(), "go on with fit(..., resume=this fit)"
    for found in (one, other):
        assert found["stopped"] == f"ended by the callback after 5 steps: {go_on}"
        assert found["callback"][2].startswith("ended by the callback's KeyError after 5 steps")
        assert found["interrupted"][:2] == [f"interrupted after 8 steps: {go_on}", 8]
        assert abs(found["resumed"][0] - whole.loss) < 1e-9
        assert found["lost"].startswith("eta is not finite at step 1, after a step from where")
    assert one["callback"][:2] == ["KeyError", "'mine'"]
    assert other["callback"][:2] == ["ProcessError", "process 0 of 2 ended: KeyError('mine')"]
    # the first alone calls callbacks
    assert (one["heard"], other["heard"]) == (8, 0)
    assert one["resumed"] == other["resumed"] and one["lost"] == other["lost"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert ends.fit(lr=30.0).stop == one["lost"]
    assert one["warned"] == [str(warning.message) for warning in caught]


# -- one process -----------------------------------------------------------------------------------


def test_without_torchrun_a_group_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    tasks = ragged_tasks(3)
    with vm.processes() as group:
        assert group.size == 1 and group.share(tasks) is tasks
        assert group.all("mine") == ["mine"]


def test_parts_are_equal_in_work_and_none_is_empty() -> None:
    def sized(*rows: int) -> vm.TaskSet:
        return vm.TaskSet([vm.Task((torch.zeros(n, 1), torch.zeros(n)), None) for n in rows])

    assert edges(sized(3, 3, 3, 3), 2) == [0, 2, 4]
    assert edges(sized(*[2] * 10), 4) == [0, 3, 5, 8, 10]
    # half by rows: 100 of 109 in one task, which is half of the work and half a tenth more
    assert edges(sized(100, *[1] * 9), 2) == [0, 1, 10]
    assert edges(sized(*[1] * 9, 100), 3) == [0, 7, 9, 10]
    with pytest.raises(ValueError, match="4 processes share 3 tasks, so that some would have none"):
        edges(sized(1, 1, 1), 4)


def test_what_is_no_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tasks = linear_model(vm.GaussianPrior(3.0)), ragged_tasks(3)
    with pytest.raises(TypeError, match=r"processes takes what `with vm.processes\(\) as group:`"):
        vm.fit(model, tasks, processes=2)  # type: ignore[arg-type]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="RANK.* not set.*: start the script with torchrun"):
        vm.processes().__enter__()


def test_a_guide_of_ones_own_is_not_shared() -> None:
    from pyro.infer.autoguide import AutoNormal

    with pytest.raises(ValueError, match="makes its module for all tasks at once"):
        vm.fit(
            linear_model(vm.GaussianPrior(3.0)),
            ragged_tasks(3),
            vm.Joint(AutoNormal),
            3,
            processes=Processes(0, 2),
        )


def test_who_is_silent_or_has_ended_is_named() -> None:
    beats = object.__new__(Beats)
    beats.rank, beats.size, beats._ended = 0, 3, {}
    now = time.monotonic()
    beats._heard = {0: ("7 here, process id 1", now - 99), 1: ("7 there, process id 2", now - 7)}
    assert beats.gone() is None
    said = beats.gone(closed=True)
    assert said is not None and said.startswith("process 1 of 3 (there, process id 2) has given no")
    beats._ended = {1: "ValueError('x')"}
    assert beats.gone() == "process 1 of 3 (there, process id 2) ended: ValueError('x')"
    beats._ended = {1: "process 2 of 3 has given no sign of life for 20 s"}
    assert beats.gone() == beats._ended[1]


def test_what_has_ended_is_not_used_again() -> None:
    group = Processes(0, 2, None)
    group._beats = object.__new__(Beats)
    group._over = "KeyError('x')"
    with pytest.raises(vm.ProcessError, match="do not work together any more: KeyError"):
        group.add(torch.zeros(1))
    assert group_module.LOOK.total_seconds() == 1
