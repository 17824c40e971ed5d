"""Ctrl-C and SIGTERM, wherever they come: what has been learned is kept, and nothing is claimed
that was not.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import warnings
from typing import Any

import pytest
import torch

import varmeta as vm
from tests.cases import adam, linear_model, net_model, ragged_tasks
from varmeta.graphs import capture
from varmeta.results.resume import run_to_resume

PRIOR = vm.GaussianPrior(3.0, "shared")


def test_an_interruption_while_compiling_claims_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It warned of precisions that ran away, after 0 steps."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(capture, "_compile", interrupted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = vm.fit(net_model(PRIOR), ragged_tasks(3), vm.Joint("normal"), 5, adam, compile=True)
    assert fit.stop == "interrupted before the first step was done: nothing has been learned yet"
    assert not fit.converged and len(fit.history) == 0
    assert "interrupted before the first step" in str(fit)
    monkeypatch.undo()
    again = vm.fit(net_model(PRIOR), ragged_tasks(3), num_steps=3, optimizer=adam, resume=fit)
    assert again.run.step == 3


def test_the_bar_says_that_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []

    class Bar:
        disable = False

        def set_description(self, text: str | None) -> None:
            said.append(text)

        def update(self, n: int) -> None:
            said.append(n)

        def set_postfix(self, **_: Any) -> None: ...

        def close(self) -> None:
            said.append("closed")

    monkeypatch.setattr(sys.modules["varmeta.verbs.progress"], "_bar", lambda *_: Bar())
    monkeypatch.setattr(capture, "_compile", lambda graph, examples: graph)
    capture._COMPILED.graphs.clear()
    vm.fit(net_model(PRIOR, 4), ragged_tasks(3), vm.Joint("normal"), 2, adam, compile=True)
    capture._COMPILED.graphs.clear()
    assert said == ["compiling", None, 1, 1, "closed"]
    assert capture.watcher.get() is None


def test_a_bar_is_closed_after_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(row: dict[str, float]) -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        vm.fit(
            linear_model(PRIOR),
            ragged_tasks(2),
            vm.Joint("normal"),
            3,
            adam,
            callback=fails,
            progress=True,
        )
    assert capture.watcher.get() is None


# -- SIGTERM ---------------------------------------------------------------------------------------


def terminate_at(step: int) -> Any:
    return lambda row: os.kill(os.getpid(), signal.SIGTERM) if row["step"] == step else None


def test_sigterm_ends_a_fit_and_the_block_goes_on() -> None:
    ended: list[int] = []
    before = signal.signal(
        signal.SIGTERM, lambda number, frame: ended.append(number)
    )  # what comes after the block
    mine = signal.getsignal(signal.SIGTERM)
    try:
        with vm.sigterm_ends_fit():
            fit = vm.fit(
                linear_model(PRIOR),
                ragged_tasks(2),
                vm.Joint("normal"),
                50,
                adam,
                callback=terminate_at(4),
            )
            assert fit.stop.startswith("interrupted after 4 steps") and not ended
        assert ended == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_a_fit_sigterm_waits_for_the_end_of_the_block() -> None:
    ended: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: ended.append("after"))
    try:
        with vm.sigterm_ends_fit():
            os.kill(os.getpid(), signal.SIGTERM)
            ended.append("saved")
        assert ended == ["saved", "after"]
        with vm.sigterm_ends_fit():
            pass
        assert len(ended) == 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_signals_reach_the_main_thread_alone() -> None:
    caught: list[str] = []

    def run() -> None:
        try:
            with vm.sigterm_ends_fit():
                pass
        except ValueError as error:
            caught.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert caught == ["sigterm_ends_fit must stand in the main thread, which alone gets signals"]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of another kind")
def test_the_process_ends_by_the_signal(tmp_path: Any) -> None:
    code = f"""
import os, signal, torch, varmeta as vm
model = vm.TaskModel(torch.nn.Linear(1, 1), vm.likelihoods.Gaussian())
stop = lambda row: os.kill(os.getpid(), signal.SIGTERM) if row["step"] == 3 else None
with vm.sigterm_ends_fit():
    adam = lambda p: torch.optim.Adam(p)
    fit = vm.fit(model, vm.datasets.lines(5), vm.Joint("normal"), 50, adam, callback=stop)
    fit.save({str(tmp_path / "fit.pt")!r})
print("never")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGTERM and "never" not in done.stdout, done.stderr
    model = vm.TaskModel(torch.nn.Linear(1, 1), vm.likelihoods.Gaussian())
    assert vm.load(tmp_path / "fit.pt", model).stop.startswith("interrupted after 3 steps")


# -- small things ----------------------------------------------------------------------------------


def test_strategies_that_hold_a_tensor_can_be_compared() -> None:
    """`fit` refuses one, but a file of an older version may hold it: `==` of its entries ended in a
    RuntimeError.
    """

    def holding(*betas: float) -> vm.Joint:
        minimizer = vm.Adam()
        object.__setattr__(minimizer, "betas", torch.tensor(betas))
        return vm.Joint("normal", minimizer=minimizer)

    fit = vm.fit(linear_model(PRIOR), ragged_tasks(2), vm.Joint("normal"), 2, adam)
    kept = vm.Fit(fit.model, fit.tasks, holding(0.9, 0.99), 0, fit.run)
    assert run_to_resume(kept, fit.model, fit.tasks, holding(0.9, 0.99), 0).step == 2
    with pytest.raises(ValueError, match="resume is a fit by Joint"):
        run_to_resume(kept, fit.model, fit.tasks, holding(0.9, 0.98), 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_eta_that_is_not_finite_is_refused(value: float) -> None:
    model = linear_model(vm.GaussianPrior(3.0))
    eta = model.init(torch.zeros((), dtype=torch.float64))
    eta["bias"] = torch.full_like(eta["bias"], value)
    with pytest.raises(
        ValueError, match=r"eta\['bias'\] is not finite: a gradient is taken at finite numbers"
    ):
        vm.meta_gradient(model, ragged_tasks(2), vm.Implicit(), eta=eta)
