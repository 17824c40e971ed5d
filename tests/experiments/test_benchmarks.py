"""The benchmarks do the same work on both sides, and their tables have the same columns whatever
failed.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.benchmarks import __main__ as command
from experiments.benchmarks import accuracy, episodes, pairs, report
from experiments.benchmarks.work import Unavailable

EXACT: dict[str, Any] = {"tasks": 3, "dtype": "float64", "timed": False, "compiled": False}
LIBRARIES = {
    "jax": "jax",
    "jaxopt": "jaxopt",
    "torchopt": "torchopt",
    "higher": "higher",
    "paper": "implicit_maml",
}


@pytest.mark.parametrize("case", ["imaml", "maml", "joint"])
def test_the_same_values_as_by_hand(case: str) -> None:
    found = pairs.compare(case, "torch eager", **EXACT)
    assert found["loss_gap"] < 1e-12
    assert found["gradient_gap"] < 1e-10


@pytest.mark.parametrize("case", ["anil", "maml"])
def test_episodes_have_the_same_values_as_by_hand(case: str) -> None:
    found = episodes.measure(case, 2, seconds=0.0, channels=4, dtype="float64")
    assert found["loss_gap"] < 1e-12
    assert found["gradient_gap"] < 1e-10


@pytest.mark.parametrize(
    ("case", "peer"),
    [(case, peer) for case in ("imaml", "maml") for peer in pairs.PEERS[case] if peer in LIBRARIES],
)
def test_the_same_values_as_a_library(case: str, peer: str) -> None:
    pytest.importorskip(LIBRARIES[peer])
    found = pairs.compare(case, peer, **EXACT)
    assert found["gradient_gap"] < 1e-10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("case", ["imaml", "maml", "joint"])
def test_the_same_values_on_a_gpu(case: str) -> None:
    asked = {"case": case, "peer": "torch eager", **EXACT, "device": "cuda"}
    assert command.in_process("pairs", asked, 300)["gradient_gap"] < 1e-10


def test_a_device_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for device, letters, says in (
        ("xpu", "a", "no device 'xpu'"),
        ("meta", "f", "only a, b, c and e"),
    ):
        with pytest.raises(SystemExit):
            command.main(["--out", str(tmp_path), "--device", device, "--only", letters])
        assert says in capsys.readouterr().err


def test_elbo_of_pyro_is_ours_on_average() -> None:
    found = pairs.compare("joint", "pyro", **EXACT)
    assert found["standard_errors"] < 4
    assert found["loss_gap"] < 0.01


def test_other_work_is_seen_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.benchmarks import by_torch

    with monkeypatch.context() as patch:
        patch.setattr(by_torch, "LR", 0.011)
        assert pairs.compare("imaml", "torch eager", **EXACT)["note"].startswith(
            "does other work: gradient_gap"
        )
    monkeypatch.setattr(by_torch, "HALF_LOG_2PI", 1.0)  # a constant, which no gradient shows
    assert pairs.compare("maml", "torch eager", **EXACT)["note"].startswith(
        "does other work: loss_gap"
    )


def test_both_sides_are_timed() -> None:
    found = pairs.compare("maml", "torch eager", tasks=2, seconds=0.0, compiled=False)
    assert found["ratio_low"] <= found["ratio"] <= found["ratio_high"]
    assert found["ours_q1_ms"] <= found["ours_ms"] <= found["ours_q3_ms"]


@pytest.mark.parametrize("module", ["by_jax", "by_torchopt", "by_higher", "by_imaml", "by_numpyro"])
def test_a_peer_that_is_missing_is_said(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = {*LIBRARIES.values(), "numpyro"}
    for name in {
        *libraries,
        *(name for name in sys.modules if name.partition(".")[0] in libraries),
    }:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"experiments.benchmarks.{module}", raising=False)
    with pytest.raises(Unavailable, match="not installed"):
        importlib.import_module(f"experiments.benchmarks.{module}")


def test_rows_without_numbers_keep_the_columns(tmp_path: Path) -> None:
    rows = [{"case": "imaml", "peer": "jax", "tasks": 3, "note": "not installed"}]
    command.collect(iter(rows), report.PAIR_COLUMNS, tmp_path, "pairs", report.plot_pairs)
    frame = pd.read_csv(tmp_path / "pairs.csv")
    assert tuple(frame.columns) == report.PAIR_COLUMNS
    assert frame.loc[0, "note"] == "not installed"
    assert (tmp_path / "pairs.png").exists()
    assert "not installed" in (tmp_path / "pairs.md").read_text()


def test_a_row_that_fails_or_takes_too_long_is_a_note() -> None:
    assert (
        "fails: "
        in command.in_process(
            "pairs", {"case": "no such case", "peer": "torch eager", "tasks": 1}, 60
        )["note"]
    )
    assert (
        "not done within"
        in command.in_process("pairs", {"case": "maml", "peer": "jax", "tasks": 1}, 0.01)["note"]
    )


def test_log_likelihood_is_that_of_the_dense_normal() -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"task": ["a"] * 3 + ["b"] * 2, "x": rng.normal(size=5), "y": rng.normal(size=5)}
    )
    at = accuracy.Answer(np.array([0.3, -0.2]), np.array([[1.0, 0.2], [0.2, 0.5]]), 0.7)
    expected = 0.0
    for _, rows in frame.groupby("task"):
        x = np.stack([np.ones(len(rows)), rows["x"]], -1)
        v = x @ at.covariance @ x.T + 0.49 * np.eye(len(rows))
        r = rows["y"].to_numpy() - x @ at.theta0
        expected -= 0.5 * (r @ np.linalg.solve(v, r) + np.linalg.slogdet(2 * np.pi * v)[1])
    assert accuracy.log_likelihood(frame, at) == pytest.approx(expected, rel=1e-12)


def test_the_shipped_fit_is_the_reference() -> None:
    found = accuracy.measure("radon", "varmeta")
    assert found["theta0_gap"] < 1e-3 and found["sd_gap"] < 1e-3 and found["sigma_gap"] < 1e-4
    assert found["loglik"] == pytest.approx(-1043.521340, abs=1e-4)
