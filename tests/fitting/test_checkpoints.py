"""Checkpoints: a run that is cut short goes on as if it had not been, or says why it cannot."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import varmeta as vm
from tests import kill_checkpoints
from tests.cases import GUIDES, adam, linear_model, net_model, ragged_tasks, seeded
from tests.verbs.test_fit import STRATEGIES, assert_same_fit, stop_at
from tests.verbs.test_streams import ENDLESS, Lines
from tests.verbs.test_streams import fit as fit_stream
from tests.verbs.test_streams import model as stream_model
from varmeta.files import columns
from varmeta.files.folder import numbered
from varmeta.graphs import capture
from varmeta.results import checkpoints, schema, storage
from varmeta.results.resume import moved

PRIOR = vm.GaussianPrior(3.0)
STEPS = 8


def halves(
    fit: Callable[..., vm.Fit], folder: Path, steps: int = STEPS, at: int = STEPS // 2
) -> tuple[vm.Fit, vm.Fit]:
    """A run that is cut short at a step and goes on from its folder, and one that is not."""
    with pytest.raises(_Gone):
        fit(
            num_steps=steps,
            checkpoint=vm.Checkpoints(folder, every=1),
            callback=_gone_after(at + 1),
        )
    # the last one was written behind that step's callback
    assert next(iter(numbered(folder))) == at
    on = fit(num_steps=steps, checkpoint=folder, resume=folder)
    return on, fit(num_steps=steps)


class _Gone(BaseException):
    """As SIGKILL: nobody catches it."""


def _gone_after(step: int) -> Callable[[Any], None]:
    def callback(row: dict[str, float]) -> None:
        if row["step"] == step:
            raise _Gone

    return callback


# -- 100 steps and 100 more are 200 steps ----------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_goes_on_bit_for_bit(
    name: str, batch_size: int | None, tmp_path: Path
) -> None:
    tasks, model = ragged_tasks(5), linear_model(PRIOR)

    def fit(**options: Any) -> vm.Fit:
        options = {"batch_size": batch_size, "seed": 1, "compile": False} | options
        return vm.fit(model, tasks, STRATEGIES[name](), optimizer=adam, **options)

    assert_same_fit(*halves(fit, tmp_path))


# Joint refuses a guide that is at a mode
BY_GUIDE = [(vm.Joint, 2, guide) for guide in GUIDES if guide != "laplace"]


@pytest.mark.parametrize(
    ("kind", "batch_size", "guide"), [*BY_GUIDE, *((vm.Implicit, None, guide) for guide in GUIDES)]
)
def test_every_guide_goes_on_bit_for_bit(
    kind: Any, guide: Any, batch_size: int | None, tmp_path: Path
) -> None:
    tasks, model = ragged_tasks(4), linear_model(PRIOR)

    def fit(**options: Any) -> vm.Fit:
        options = {"batch_size": batch_size, "compile": False} | options
        return vm.fit(model, tasks, kind(guide), optimizer=adam, **options)

    assert_same_fit(*halves(fit, tmp_path, 4, 2))


def stochastic() -> vm.Stochastic:
    inner = vm.Unrolled("delta", inner_steps=1)
    return vm.Stochastic(inner, vm.StochasticAlg(num_steps=2, lr=0.001, start_scale=1.0))


def lbfgs(params: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(params, max_iter=3, line_search_fn="strong_wolfe")


STEP_LR = partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.5)
OTHERS: dict[str, dict[str, Any]] = {
    "momentum": {"optimizer": lambda params: torch.optim.SGD(params, 1e-3, momentum=0.9)},
    "default Adam": {"batch_size": 2},
    "L-BFGS": {"optimizer": lbfgs, "strategy": vm.Implicit("laplace")},
    "its default": {"strategy": vm.Implicit("laplace")},
    "a scheduler": {"optimizer": adam, "schedule": STEP_LR},
    "clipped": {"optimizer": adam, "clip": 0.5},
    "stochastic": {"optimizer": adam, "strategy": stochastic()},
    "a budget": {"optimizer": adam, "budget": 30.0},
    "learned rates": {
        "optimizer": adam,
        "strategy": vm.Unrolled("delta", "query", 2, vm.GradientDescent(vm.LearnedRates(0.01))),
    },
    "compiled": {"optimizer": adam, "compile": True},
}


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_moves_eta_goes_on_bit_for_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a graph that is not compiled, which takes long, is the same graph
    monkeypatch.setattr(capture, "_compile", lambda graph, examples: graph)
    tasks, model = ragged_tasks(5), linear_model(PRIOR)

    def fit(**options: Any) -> vm.Fit:
        options = {"strategy": vm.Joint("normal"), "compile": False} | OTHERS[name] | options
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return vm.fit(model, tasks, **options)

    # L-BFGS is there soon
    assert_same_fit(*halves(fit, tmp_path, at=1 if name == "its default" else 4))


@pytest.mark.parametrize("kind", [*ENDLESS, "with a length"])
def test_every_stream_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    if kind.startswith("iterator"):
        pytest.skip("it goes on from where it stands, which another process cannot know")

    def fit(**options: Any) -> vm.Fit:
        source, own = (Lines(), {"batch_size": 4}) if kind == "with a length" else ENDLESS[kind]()
        return fit_stream(source, schedule="cosine", **(own | options))

    assert_same_fit(*halves(fit, tmp_path))


def test_a_loader_that_shuffles_goes_on_in_its_order(tmp_path: Path) -> None:
    """It draws from torch's own generator, which another process has elsewhere."""
    after: list[torch.Tensor] = []

    def fit(**options: Any) -> vm.Fit:
        source = DataLoader(Lines(), batch_size=4, shuffle=True, collate_fn=list)  # type: ignore[arg-type]
        made = stream_model()
        torch.manual_seed(7 if options.get("resume") is None else 100)
        found = fit_stream(source, model=made, **options)
        after.append(torch.get_rng_state())
        return found

    # past the first epoch, of five steps
    assert_same_fit(*halves(fit, tmp_path, 9, 6))
    assert torch.equal(after[0], after[1])


@pytest.mark.parametrize(("at", "patience"), [(3, None), (5, None), (12, 2)])
def test_validation_goes_on_bit_for_bit(at: int, patience: int | None, tmp_path: Path) -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)))
    model = vm.TaskModel(net, vm.likelihoods.Gaussian(), PRIOR, shared=["0.*"])
    tasks, dense = ragged_tasks(4, noise=1.0), vm.Joint("multivariate_normal")
    look = vm.Validation(ragged_tasks(5, seed=3), every=5, patience=patience)

    def fit(**options: Any) -> vm.Fit:
        fast = lambda params: torch.optim.Adam(params, 0.1)  # noqa: E731
        return vm.fit(model, tasks, dense, optimizer=fast, validate=look, **options)

    on, whole = halves(fit, tmp_path, 30, at)
    assert_same_fit(on, whole)
    assert on.stop == whole.stop and on.loss == whole.loss and on.run.kept == whole.run.kept
    again = fit(num_steps=30, resume=tmp_path)
    assert_same_fit(again, whole)
    assert again.stop == whole.stop


def test_an_ensemble_goes_on_bit_for_bit(tmp_path: Path) -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)))
    model = vm.TaskModel(net, vm.likelihoods.Gaussian(), PRIOR, shared=["0.*"])
    dense = vm.Joint("multivariate_normal")

    def fit(**options: Any) -> vm.Fit:
        return vm.fit(model, ragged_tasks(6), dense, optimizer=adam, ensemble=2, **options)

    on, whole = halves(fit, tmp_path)
    assert_same_fit(on, whole)
    assert on.members is not None and whole.members is not None
    assert torch.equal(on.members.losses, whole.members.losses)
    some = vm.load(next(iter(numbered(tmp_path).values())), model)
    assert some.adapt(ragged_tasks(2)).score().shape[0] == 3
    with pytest.raises(ValueError, match="ensemble=2, not 3"):
        vm.fit(model, ragged_tasks(6), dense, 9, adam, ensemble=3, resume=tmp_path)


# -- Newton's method -------------------------------------------------------------------------------

DENSE = vm.GaussianPrior(learn_precision="full")
COUNTS = vm.TaskSet(
    [vm.Task((task.support[0], task.support[1].exp().round()), None, task.name)
     for task in ragged_tasks(8)]
)  # fmt: skip
POISSON = vm.TaskModel(seeded(lambda: nn.Linear(1, 1)), vm.likelihoods.Poisson(), PRIOR)
NEWTON: dict[str, Callable[..., vm.Fit]] = {
    "closed form": lambda **o: vm.fit(linear_model(DENSE), ragged_tasks(8), **o),
    "joint": lambda **o: vm.fit(POISSON, COUNTS, vm.Joint("normal"), **o),
    "evidence": lambda **o: vm.fit(POISSON, COUNTS, **o),
    "hyperguide": lambda **o: vm.fit(
        linear_model(vm.GaussianPrior(learn_precision="shared")),
        ragged_tasks(8),
        vm.Joint("multivariate_normal"),
        hyperguide="normal",
        **o,
    ),
}


@pytest.mark.parametrize("name", NEWTON)
def test_newton_goes_on_to_the_same_place(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        whole = NEWTON[name]()
        with pytest.raises(_Gone):
            NEWTON[name](checkpoint=vm.Checkpoints(tmp_path, every=1), callback=_gone_after(2))
        # a posterior of eta is found whole or not at all
        assert next(iter(numbered(tmp_path))) == (0 if name == "hyperguide" else 1)
        on = NEWTON[name](checkpoint=tmp_path, resume=tmp_path)
        assert on.converged and on.loss == pytest.approx(whole.loss, abs=1e-7)
        again = NEWTON[name](checkpoint=tmp_path, resume=tmp_path)
    assert_same_fit(again, on)
    assert again.stop == on.stop and again.loss == on.loss and again.converged
    if on.hyper is not None:
        assert again.hyperparameters().equals(on.hyperparameters())


# -- how often, and what stays ---------------------------------------------------------------------


def simple(**options: Any) -> vm.Fit:
    options = {"optimizer": adam, "num_steps": 20, "model": linear_model(PRIOR)} | options
    tasks = options.pop("tasks", ragged_tasks(4))
    return vm.fit(options.pop("model"), tasks, vm.Joint("normal"), **options)


def test_the_last_ones_stay_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    left = folder / ".step-000000003.fit.0a1b2c3d.part"
    folder.mkdir(parents=True)
    left.write_text("what a killed process leaves")
    (folder / "notes.txt").write_text("mine")
    simple(checkpoint=vm.Checkpoints(folder, every=3, keep=2))
    assert {path.name for path in folder.iterdir()} == {
        "step-000000018.fit", "step-000000020.fit", "notes.txt", ".lock"
    }  # fmt: skip


def test_without_a_number_it_is_written_by_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simple(checkpoint=vm.Checkpoints(tmp_path / "quick", keep=99))
    assert list(numbered(tmp_path / "quick")) == [20, 0]  # half a minute has not passed
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "TIMES", 0.0)
    simple(checkpoint=vm.Checkpoints(tmp_path / "always", keep=99))
    assert list(numbered(tmp_path / "always")) == list(range(20, -1, -1))


def test_a_checkpoint_holds_no_data_and_is_read_by_load(tmp_path: Path) -> None:
    model = linear_model(PRIOR)
    tasks = vm.TaskSet(
        [vm.Task((torch.ones(5000, 1), torch.arange(5000.0) / 5000)) for _ in range(6)],
        dtype=torch.float64,
    )
    with pytest.raises(_Gone):
        simple(
            model=model, tasks=tasks, checkpoint=vm.Checkpoints(tmp_path, every=5),
            callback=_gone_after(6),
        )  # fmt: skip
    file = next(iter(numbered(tmp_path).values()))
    assert (
        file.stat().st_size < 100_000 < 6 * 2 * 8 * 5000
    )  # one task of six tells the model's inputs
    fit = vm.load(file, model)
    again = f"go on with fit(..., resume={str(tmp_path)!r})"
    assert fit.stop == f"checkpoint after 5 steps: {again}" and not fit.converged
    assert fit.run.step == 5 and "6 tasks" in repr(fit)
    assert fit.adapt(ragged_tasks(2)).score().shape[0] == 3
    with pytest.raises(ValueError, match="saved without its tasks"):
        fit.posterior()
    whole = simple(model=model, tasks=tasks)
    assert_same_fit(simple(model=model, tasks=tasks, resume=fit), whole)
    assert_same_fit(simple(model=model, tasks=tasks, resume=file), whole)


def test_a_history_is_columns_of_a_file_and_of_older_ones_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = simple(validate=HELD_OUT)
    fit.save(tmp_path / "new.fit")
    monkeypatch.setattr(storage, "columns_of", lambda rows: rows)
    fit.save(tmp_path / "old.fit")
    for name in ("new.fit", "old.fit"):
        back = vm.load(tmp_path / name, linear_model(PRIOR))
        assert back.run.history == fit.run.history and back.history.equals(fit.history)
    assert columns.rows_of(columns.columns_of([]), 0) == []
    sound = columns.columns_of(fit.run.history)
    at, values = sound["validation"]
    assert schema.columns(sound) and schema.columns({})
    for wrong in ((at + 20, values), (at - 99, values), (at, values[1:]), (at.double(), values)):
        assert not schema.columns({**sound, "validation": wrong})
    assert not schema.columns({**sound, "loss": sound["validation"]})
    assert not schema.columns({"step": sound["step"]})


def test_a_run_from_a_file_moves_to_where_the_tasks_are(tmp_path: Path) -> None:
    with pytest.raises(_Gone):
        simple(
            checkpoint=vm.Checkpoints(tmp_path, every=5), validate=HELD_OUT,
            callback=_gone_after(11),
        )  # fmt: skip
    fit = vm.load(next(iter(numbered(tmp_path).values())), linear_model(PRIOR))
    run = moved(fit.run, torch.device("meta"))
    best = run.checkpoint.watched["best"]  # type: ignore[union-attr, index]
    for tree in (run.eta, run.state.phi, best["eta"], best["phi"]):
        assert tree and all(value.is_meta for value in tree.values())
    assert run.step == 10 and run.checkpoint is not None and not run.checkpoint.random.is_meta
    assert moved(fit.run, torch.device("cpu")) is fit.run


# -- where one goes on, and where not --------------------------------------------------------------


def test_with_both_an_empty_folder_is_where_it_begins(tmp_path: Path) -> None:
    """One line for a job that is started again and again."""
    whole = simple()
    again = {"checkpoint": tmp_path / "run", "resume": tmp_path / "run"}
    for at in (7, 15):
        broken = simple(**again, callback=stop_at(at))
        assert broken.stop.startswith(f"interrupted after {at} steps") and broken.run.step == at
    for _ in range(2):  # and once more, where nothing is left to do
        assert_same_fit(found := simple(**again), whole)
        assert found.stop == whole.stop and found.loss == whole.loss
    with pytest.raises(FileNotFoundError, match=r"no checkpoints here: fit\(..., checkpoint="):
        simple(resume=tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="no checkpoints"):
        simple(resume=tmp_path / "elsewhere", checkpoint=tmp_path / "run2")


def test_a_finished_run_takes_more_steps(tmp_path: Path) -> None:
    options: dict[str, Any] = {"schedule": "constant"}
    simple(checkpoint=tmp_path, num_steps=10, **options)
    assert_same_fit(simple(resume=tmp_path, **options), simple(**options))
    with pytest.raises(ValueError, match="has taken 10 steps already: num_steps=9"):
        simple(resume=tmp_path, num_steps=9, **options)


def test_a_longer_run_under_the_cosine_is_another_and_says_so(tmp_path: Path) -> None:
    simple(checkpoint=tmp_path, callback=stop_at(10))
    with pytest.warns(RuntimeWarning, match="was to end after 20 steps, .* ends after 40"):
        simple(resume=tmp_path, num_steps=40)


def test_an_interrupted_fit_goes_on_in_its_folder(tmp_path: Path) -> None:
    part = simple(checkpoint=tmp_path, callback=stop_at(10))
    assert_same_fit(simple(checkpoint=tmp_path, resume=part), simple())
    assert next(iter(numbered(tmp_path))) == 20
    with pytest.raises(ValueError, match="holds the checkpoints of a run, the last after 20 step"):
        simple(checkpoint=tmp_path, resume=part)


def test_another_run_does_not_take_the_folder(tmp_path: Path) -> None:
    simple(checkpoint=tmp_path, num_steps=3)
    with pytest.raises(ValueError, match=r"after 3 steps: go on from them with resume='.*', or"):
        simple(checkpoint=tmp_path)
    assert list(numbered(tmp_path)) == [3, 0]


HELD_OUT = vm.Validation(ragged_tasks(3, seed=5), every=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": net_model(PRIOR)}, "is a fit of a model with weights"),
        ({"model": linear_model(vm.GaussianPrior(2.0))}, "another model: prior.precision was 3.0"),
        ({"tasks": ragged_tasks(5)}, "other tasks .by their names or numbers"),
        ({"seed": 1}, "resume was run with seed=0"),
        ({"batch_size": 3}, "of another fit: batch_size was 2, but is 3.  Give the same"),
        ({"clip": 1.0}, "clip was None, but is 1.0"),
        ({"schedule": "constant"}, "schedule was 'cosine', but is 'constant'"),
        ({"validate": HELD_OUT}, "validate was None, but is "),
        ({"optimizer": torch.optim.SGD}, "another kind of optimizer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_fit_is_refused_by_what_differs(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    simple(checkpoint=tmp_path, num_steps=5, batch_size=2)
    before = {path: path.read_bytes() for path in numbered(tmp_path).values()}
    for more in ({}, {"checkpoint": tmp_path}):
        with pytest.raises(ValueError, match=message):
            simple(**{"resume": tmp_path, "num_steps": 5, "batch_size": 2, **change, **more})
    if "optimizer" not in change:  # which is made when all else is known
        assert before == {path: path.read_bytes() for path in numbered(tmp_path).values()}


def test_other_strategies_and_validation_tasks_are_refused(tmp_path: Path) -> None:
    simple(checkpoint=tmp_path, num_steps=5, validate=HELD_OUT)
    other = vm.Validation(ragged_tasks(3, seed=6), every=5)
    with pytest.raises(ValueError, match="validate.tasks was '[0-9a-f]+', but is "):
        simple(resume=tmp_path, num_steps=5, validate=other)
    with pytest.raises(ValueError, match="validate was .*, but is None"):
        simple(resume=tmp_path, num_steps=5)
    with pytest.raises(ValueError, match=r"resume is a fit by Joint, not Implicit"):
        vm.fit(linear_model(PRIOR), ragged_tasks(4), vm.Implicit(), 5, adam, resume=tmp_path)


def test_a_guide_of_ones_own_is_code_that_fit_is_given(tmp_path: Path) -> None:
    from pyro.infer.autoguide import AutoNormal

    def fit(**options: Any) -> vm.Fit:
        strategy = vm.Joint(AutoNormal, expectation="monte_carlo")
        return vm.fit(linear_model(PRIOR), ragged_tasks(3), strategy, optimizer=adam, **options)

    assert_same_fit(*halves(fit, tmp_path, 4, 2))


def test_other_versions_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(checkpoints.versions()) | {"torch": "1.0"}
    monkeypatch.setattr(checkpoints, "versions", lambda: before)
    simple(checkpoint=tmp_path, callback=stop_at(5))
    with pytest.warns(RuntimeWarning, match="written under torch 1.0, not 2"):
        simple(resume=tmp_path)


# -- what disks do ---------------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    simple(checkpoint=vm.Checkpoints(tmp_path, every=5), callback=stop_at(12))
    files = list(numbered(tmp_path).items())
    assert [step for step, _ in files] == [12, 10, 5]
    files[0][1].write_bytes(files[0][1].read_bytes()[:-5])
    with pytest.warns(RuntimeWarning, match="goes on after 10 steps, since a later .*checksum"):
        found = simple(checkpoint=tmp_path, resume=tmp_path)
    assert_same_fit(found, simple())
    assert 12 not in numbered(tmp_path)
    for file in numbered(tmp_path).values():
        file.write_bytes(b"varmeta fit 4\nno more")
    with pytest.raises(ValueError, match="no checkpoint in .* can be read: "):
        simple(resume=tmp_path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_told_before_any_work(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        simple(checkpoint=tmp_path / "run", callback=_gone_after(1))


def test_what_is_no_folder_is_told_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for given, error, message in (
        (tmp_path / "file", ValueError, "is a file: give the name of a folder"),
        (tmp_path / "file" / "below", OSError, "Not a directory"),
        (3, TypeError, r"checkpoint takes the path of a folder, or vm.Checkpoints"),
        (vm.Checkpoints, TypeError, "the class Checkpoints itself"),
    ):
        with pytest.raises(error, match=message):
            simple(checkpoint=given, callback=_gone_after(1))
    for options, message in (({"every": 0}, "every must be"), ({"keep": 0}, "keep must be")):
        with pytest.raises(ValueError, match=message):
            vm.Checkpoints(tmp_path, **options)
    with pytest.raises(TypeError, match="folder must be a path"):
        vm.Checkpoints(3)  # type: ignore[arg-type]


def test_a_disk_that_is_full_costs_the_checkpoint_and_not_the_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told at once where nothing has been done yet, and later by a warning, once."""
    written: list[int] = []
    write = checkpoints.Folder.write

    def full(self: Any, number: int, parts: Any) -> None:
        written.append(number)
        if 4 < number < 9 or number == stop:
            raise OSError(28, "No space left on device", "step")
        write(self, number, parts)

    monkeypatch.setattr(checkpoints.Folder, "write", full)
    stop = 0
    with pytest.raises(OSError, match="No space left"):
        simple(checkpoint=tmp_path / "a")
    stop = 20
    with pytest.warns(RuntimeWarning) as caught:
        found = simple(checkpoint=vm.Checkpoints(tmp_path / "b", every=2))
    assert_same_fit(found, simple())
    said = [str(one.message) for one in caught if "was not written" in str(one.message)]
    assert [text.partition(" was")[0] for text in said] == [
        "a checkpoint after 6 steps", "a checkpoint after 20 steps"
    ]  # fmt: skip
    assert written[1:8] == [0, 2, 4, 6, 8, 10, 12]
    assert list(numbered(tmp_path / "b")) == [18, 16, 14]


@pytest.mark.skipif(os.name == "nt", reason="locks of another kind")
def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    said: list[str] = []

    def other(row: dict[str, float]) -> None:
        if row["step"] == 2:
            process = os.fork()
            if process == 0:
                try:
                    simple(checkpoint=tmp_path, resume=tmp_path)
                except ValueError as error:
                    (tmp_path / "said").write_text(str(error))
                os._exit(0)
            os.waitpid(process, 0)
            said.append((tmp_path / "said").read_text())

    simple(checkpoint=tmp_path, callback=other)
    assert len(said) == 1 and said[0].startswith("another process writes its checkpoints into ")
    simple(checkpoint=tmp_path, resume=tmp_path)  # it is free again


# -- signals ---------------------------------------------------------------------------------------


class Torn(torch.optim.SGD):
    """Is interrupted between two of its parameters, once."""

    at, by = 3, signal.SIGINT

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=1e-3, momentum=0.9)
        self.taken = 0

    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        loss = closure()
        self.taken += 1
        for leaf in groups[0]["params"]:
            self.param_groups = [{**groups[0], "params": [leaf]}]
            super().step(None)
            if self.taken == self.at:
                os.kill(os.getpid(), self.by)
        self.param_groups = groups
        return loss


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_step_is_taken_whole_or_not_at_all(
    by: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Torn, "by", by)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    # a process that runs in the background may be told to ignore it
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        broken = simple(optimizer=Torn, checkpoint=tmp_path)
        assert broken.stop.startswith("interrupted after 3 steps") and broken.run.step == 3
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, ignored)
    monkeypatch.setattr(Torn, "at", 0)
    whole = simple(optimizer=Torn)
    assert_same_fit(simple(optimizer=Torn, resume=broken), whole)
    assert_same_fit(simple(optimizer=Torn, resume=tmp_path), whole)


@pytest.mark.parametrize("evaluation", range(7, 13))
def test_an_interrupted_line_search_goes_back_to_where_it_began(
    evaluation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from varmeta.fitting.compiled_step import Step

    take, calls = Step.__call__, itertools.count(1)

    def interrupted(*given: Any) -> Any:
        if next(calls) == evaluation:
            raise KeyboardInterrupt
        return take(*given)

    def fit(**options: Any) -> vm.Fit:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return vm.fit(
                linear_model(PRIOR), ragged_tasks(4), vm.Implicit("laplace"), 6, lbfgs, **options
            )

    monkeypatch.setattr(Step, "__call__", interrupted)
    broken = fit()
    assert broken.stop.startswith("interrupted after") and 1 <= broken.run.step < 6
    monkeypatch.setattr(Step, "__call__", take)
    assert_same_fit(fit(resume=broken), fit())


def test_an_interrupted_look_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from varmeta.fitting.validation import Watch

    look, calls = Watch.look, itertools.count(1)

    def interrupted(*given: Any) -> float:
        if next(calls) == 3:  # at steps 0, 5, and 10
            raise KeyboardInterrupt
        return look(*given)

    monkeypatch.setattr(Watch, "look", interrupted)
    broken = simple(checkpoint=tmp_path, validate=HELD_OUT)
    assert broken.stop.startswith("interrupted after 10 steps")
    monkeypatch.setattr(Watch, "look", look)
    on, whole = simple(resume=tmp_path, validate=HELD_OUT), simple(validate=HELD_OUT)
    assert_same_fit(on, whole)
    assert on.stop == whole.stop


def test_an_exit_of_the_programs_own_keeps_all(tmp_path: Path) -> None:
    """As of `signal.signal(SIGTERM, lambda *_: sys.exit(143))`."""

    def leave(row: dict[str, float]) -> None:
        if row["step"] == 6:
            sys.exit(143)

    with pytest.raises(SystemExit):
        simple(checkpoint=tmp_path, callback=leave)
    assert next(iter(numbered(tmp_path))) == 6
    assert_same_fit(simple(resume=tmp_path), simple())


@pytest.mark.skipif(os.name == "nt", reason="signals of another kind")
def test_kills_lose_an_interval_and_terminations_nothing() -> None:
    """Some of the hundreds that `python -m tests.kill_checkpoints` runs."""
    killed = kill_checkpoints.strike(4, signal.SIGKILL, 0)
    assert killed["most steps lost"] <= kill_checkpoints.EVERY and killed["ends"] == {"-9": 4}
    ended = kill_checkpoints.strike(3, signal.SIGTERM, 0)
    assert ended["most steps lost"] == 0 and ended["ends"] == {"-15": 3}
    for found in (killed, ended):
        assert found["unreadable"] == [] and found["the same bits"]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of another kind")
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_compiling_ends_it_with_all_written(
    by: signal.Signals, tmp_path: Path
) -> None:
    """The compiler is really at work, in a process of its own, and finds nothing on disk."""
    code = f"""
import os, signal, threading, time, torch, varmeta as vm
from varmeta.verbs import progress
torch.manual_seed(0)
signal.signal(signal.SIGINT, signal.default_int_handler)
net = torch.nn.Sequential(torch.nn.Linear(1, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1))
model = vm.TaskModel(net, vm.likelihoods.Gaussian(), vm.GaussianPrior())
tasks, said = vm.datasets.sinusoids(20, num_query=3), []
options = dict(strategy=vm.Joint("normal"), optimizer=torch.optim.Adam, schedule="constant")
class Bar:
    disable = False
    def set_description(self, text):
        said.append(text)
        if text == "compiling" and len(said) == 1:
            threading.Timer(1.5, os.kill, (os.getpid(), {int(by)})).start()
    def update(self, n): ...
    def set_postfix(self, **_): ...
    def close(self): ...
progress._bar = lambda *_: Bar()
begin = time.perf_counter()
half = vm.fit(model, tasks, num_steps=3, compile=False, checkpoint="run", **options)
with vm.sigterm_ends_fit():
    fit = vm.fit(model, tasks, num_steps=6, compile=True, checkpoint="run", resume="run", **options)
    assert fit.run.step == 3 and fit.stop.startswith("interrupted after 3 steps"), fit.stop
    assert said == ["compiling", None], said
    assert fit.adapt(tasks[:2]).score().shape[0] == 3
    on = vm.fit(model, tasks, num_steps=6, compile=False, resume="run", **options)
    assert on.run.step == 6
    print("usable", flush=True)
print("after")
"""
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    env["PYTHONPATH"] = str(Path(vm.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env=env,
    )  # fmt: skip
    assert "usable" in done.stdout, done.stderr
    if by == signal.SIGTERM:
        assert done.returncode == -signal.SIGTERM and "after" not in done.stdout
    else:
        assert done.returncode == 0 and "after" in done.stdout, done.stderr
