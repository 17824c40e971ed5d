"""The experiment of the closed form runs in its smallest size, and its tasks are the protocol's."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch

from experiments.closed_form import sinusoids, speed
from tests.conftest import shared_data


def test_the_sinusoids_are_the_protocol() -> None:
    tasks = sinusoids.tasks(3, 5, seed=1)
    data = tasks.batch()
    assert data.support.x.shape == (3, 5, 1) and float(data.support.x.abs().max()) <= 5
    assert data.query is not None and data.query.x.shape == (3, 200, 1)
    # noise-free: a sine of one amplitude and phase through all points of a task
    x, y = (torch.cat([part[k] for part in (tasks[0].support, tasks[0].query)]) for k in (0, 1))  # type: ignore[index]
    columns = torch.cat([x.sin(), x.cos()], -1).double()
    left = y.double() - columns @ torch.linalg.lstsq(columns, y.double()).solution
    assert float(left.abs().max()) < 1e-5


def test_the_sinusoids_run(tmp_path: Path, capsys: object) -> None:
    sinusoids.run(argparse.Namespace(out=tmp_path, size="smoke", seeds=1))
    table = pd.read_csv(tmp_path / "closed_form_sinusoids.csv")
    assert table["shots"].tolist() == [5, 10] and bool((table["mse"] > 0).all())


def test_the_speed_runs(tmp_path: Path) -> None:
    folder = shared_data("sleepstudy").parent
    speed.run(argparse.Namespace(out=tmp_path, size="smoke", data=folder))
    table = pd.read_csv(tmp_path / "closed_form_speed.csv").set_index(["data", "by"])
    assert table.loc[("sleepstudy", "varmeta"), "log_likelihood"] == -875.96967
