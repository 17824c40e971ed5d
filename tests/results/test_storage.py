"""Fits on disk: what is read back is what was written, bit for bit, and what is no fit is
refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import varmeta as vm
from tests.cases import adam, known, linear_model, net_model, ragged_tasks, scalar_model, seeded
from varmeta.files.container import packed, unpacked
from varmeta.results.schema import PRESENT

PRIOR = vm.GaussianPrior(3.0)
STRATEGIES = [
    vm.Joint("normal"),
    vm.Joint("delta", minimizer=vm.Adam(lr=0.02, betas=(0.8, 0.99), eps=1e-7), adapt_steps=7),
    vm.Joint(
        "multivariate_normal",
        minimizer=vm.GradientDescent(lr=1e-3),
        expectation="monte_carlo",
        num_particles=4,
    ),
    vm.Reinit("normal", every=3),
    vm.Implicit("delta", "query", linear_solver=vm.Neumann(), on_unconverged="ignore"),
    vm.Implicit(
        "normal",
        "query_elbo",
        warm_start=True,
        linear_solver=vm.CG(rtol=1e-8, max_steps=9),
        tolerance=1e-6,
    ),
    vm.Implicit("delta", "elbo", 4, vm.Adam(lr=0.1), vm.Direct(), on_unconverged="ignore"),
    vm.Implicit("delta", "query_predictive", minimizer=vm.NewtonCG(damping=1e-6)),
    vm.Unrolled("delta", inner_steps=2, minimizer=vm.GradientDescent(lr=0.05)),
    vm.FirstOrder("normal", "query", 3, vm.Adam()),
    vm.Reptile(inner_steps=4),
]


def round_trip(fit: vm.Fit, folder: Path, **arguments: Any) -> vm.Fit:
    fit.save(folder / "fit.pt")
    return vm.load(folder / "fit.pt", fit.model, **arguments)


def assert_same(a: Any, b: Any) -> None:
    """Equal to the last bit, all the way down."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.describe())
def test_everything_comes_back(strategy: vm.Joint, tmp_path: Path) -> None:
    fit = vm.fit(linear_model(PRIOR), ragged_tasks(3), strategy, 4, adam, seed=5)
    back = round_trip(fit, tmp_path)
    assert back.strategy == strategy and back.seed == 5
    assert (back.stop, back.converged, back.loss, back.loss_name) == (
        fit.stop,
        fit.converged,
        fit.loss,
        fit.loss_name,
    )
    assert_same(back.eta, fit.eta)
    assert_same(back.run.history, fit.run.history)
    assert_same(back.run.state.phi, fit.run.state.phi)
    assert_same(back.run.state.inner, fit.run.state.inner)
    assert_same(back.run.optimizer_state, fit.run.optimizer_state)
    assert back.history.equals(fit.history)
    assert_same(
        [(t.name, t.support, t.query) for t in back.tasks],
        [(t.name, t.support, t.query) for t in fit.tasks],
    )
    assert_same(back.posterior().q.phi, fit.posterior().q.phi)
    assert back.posterior().score(num_samples=20).equals(fit.posterior().score(num_samples=20))
    assert str(back) == str(fit)


@pytest.mark.parametrize(
    "make",
    [
        lambda: linear_model(vm.GaussianPrior(2.0, "full")),
        lambda: net_model(vm.GaussianPrior(2.0, "per_module", hyperprior=dist.Gamma(2.0, 1.0))),
        lambda: scalar_model(vm.GaussianPrior(2.0, "shared")),
    ],
    ids=["full", "per module with a hyperprior", "program with a shared parameter"],
)
def test_learned_precisions_come_back(make: Callable[[], vm.TaskModel], tmp_path: Path) -> None:
    fit = vm.fit(make(), ragged_tasks(3), vm.Joint("normal"), 5, adam)
    fit.save(tmp_path / "fit.pt")
    back = vm.load(tmp_path / "fit.pt", make())  # the same code, another object
    assert_same(back.eta, fit.eta)
    assert_same(back.prior.covariance, fit.prior.covariance)


def test_newton_and_quasi_newton_fits_come_back(tmp_path: Path) -> None:
    for strategy in (vm.Joint("multivariate_normal"), vm.Implicit("delta", "query")):
        fit = vm.fit(linear_model(PRIOR), ragged_tasks(4), strategy)
        back = round_trip(fit, tmp_path)
        assert_same(back.run.history, fit.run.history)
        assert_same(back.run.optimizer_state, fit.run.optimizer_state)


@pytest.mark.parametrize("strategy", [vm.Joint, vm.Reinit, vm.Implicit])
def test_a_closed_form_asked_for_comes_back(strategy: type, tmp_path: Path) -> None:
    """It was written and not known on the way back."""
    asked = strategy("multivariate_normal", minimizer=vm.ClosedForm())
    back = round_trip(vm.fit(linear_model(PRIOR), ragged_tasks(4), asked), tmp_path)
    assert back.strategy == asked


def test_whole_numbers_and_precision_come_back(tmp_path: Path) -> None:
    tasks = vm.TaskSet(
        [vm.Task((np.zeros((2, 1)), [0, 2]), name="a"), vm.Task(name="empty")], dtype=torch.float32
    )
    model = vm.TaskModel(seeded(lambda: nn.Linear(1, 3)), vm.likelihoods.Categorical(3), PRIOR)
    fit = known(model, tasks, vm.Implicit("normal"))
    back = round_trip(vm.Fit(fit.model, fit.tasks, fit.strategy, np.int64(3), fit.run), tmp_path)  # type: ignore[arg-type]
    assert back.tasks.dtype == torch.float32 and back.seed == 3
    assert back.tasks["a"].support is not None and back.tasks["a"].support[1].tolist() == [0, 2]
    assert back.tasks["empty"].support is None


def test_the_file_holds_no_code(tmp_path: Path) -> None:
    fit = known(linear_model(PRIOR), ragged_tasks(2), vm.Joint())
    fit.save(tmp_path / "fit.pt")
    data = (tmp_path / "fit.pt").read_bytes()
    magic, digest, length, rest = data.split(b"\n", 3)
    assert (
        magic == b"varmeta fit 4"
        and digest.decode() == hashlib.sha256(length + b"\n" + rest).hexdigest()
    )
    words = json.loads(
        rest[: int(length)]
    )  # numbers, strings and the shapes of tensors, whose bytes follow
    assert {name for name, _ in words["dict"]} == set(PRESENT)


def test_the_baselines_of_a_comparison_can_be_saved(tmp_path: Path) -> None:
    tasks = ragged_tasks(3)
    report = vm.compare(
        {"joint": vm.Joint()}, linear_model(PRIOR), tasks, tasks, seeds=1, budget=5, num_samples=10
    )
    for name in ("pooled", "no pooling"):
        back = round_trip(report.fits[name, 0], tmp_path)
        assert_same(back.eta, report.fits[name, 0].eta)


# -- code is the caller's --------------------------------------------------------------------------


def test_a_guide_of_the_users_own_is_passed_in_again(tmp_path: Path) -> None:
    strategy = vm.Joint(AutoNormal)
    fit = vm.fit(linear_model(PRIOR), ragged_tasks(3), strategy, 4, adam)
    with pytest.raises(
        ValueError, match="'AutoNormal', which is code and is not stored: pass load"
    ):
        round_trip(fit, tmp_path)
    back = round_trip(fit, tmp_path, strategy=strategy)
    assert_same(back.posterior().mean, fit.posterior().mean)


def test_a_preconditioner_is_code_too(tmp_path: Path) -> None:
    strategy = vm.Implicit("delta", "query", linear_solver=vm.CG(preconditioner=lambda tree: tree))
    fit = known(linear_model(PRIOR), ragged_tasks(2), strategy)
    with pytest.raises(ValueError, match="is code and is not stored"):
        round_trip(fit, tmp_path)
    assert round_trip(fit, tmp_path, strategy=strategy).strategy is strategy


def test_a_strategy_of_another_kind_is_refused(tmp_path: Path) -> None:
    fit = known(linear_model(PRIOR), ragged_tasks(2), vm.Joint())
    with pytest.raises(ValueError, match="is a fit by Joint, not by Implicit"):
        round_trip(fit, tmp_path, strategy=vm.Implicit())


# -- not a fit, or not of this model ---------------------------------------------------------------


def write_text(path: Path) -> None:
    path.write_text("no fit")


def write_table(path: Path) -> None:
    path.write_text("county,floor\n1,0\n")


def write_weights(path: Path) -> None:
    torch.save(nn.Linear(1, 1).state_dict(), path)


def write_code(path: Path) -> None:
    torch.save({"format": "varmeta fit 3", "eta": nn.Linear(1, 1)}, path)


@pytest.mark.parametrize(
    "write", [write_text, write_table, write_weights, write_code, Path.mkdir, Path.touch]
)
def test_what_is_not_a_fit_is_refused(write: Callable[[Path], object], tmp_path: Path) -> None:
    write(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other' is not a (file|varmeta fit)") as caught:
        vm.load(tmp_path / "other", linear_model(PRIOR))
    # torch would advise to let the file run code, in colours
    assert "weights_only" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_a_file_with_parts_missing_is_refused(tmp_path: Path) -> None:
    known(linear_model(PRIOR), ragged_tasks(2), vm.Joint()).save(tmp_path / "fit.pt")
    content = unpacked((tmp_path / "fit.pt").read_bytes())
    short = packed({key: value for key, value in content.items() if key not in ("eta", "tasks")})
    (tmp_path / "fit.pt").write_bytes(b"".join(short))
    with pytest.raises(ValueError, match=r"fit.pt' is damaged: it lacks \['eta', 'tasks'\]"):
        vm.load(tmp_path / "fit.pt", linear_model(PRIOR))


def test_where_a_fit_cannot_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = known(linear_model(PRIOR), ragged_tasks(2), vm.Joint())
    with pytest.raises(ValueError, match=r"the folder of '.*fit.pt' does not exist: make it first"):
        fit.save(tmp_path / "results" / "fit.pt")
    with pytest.raises(ValueError, match="is a folder: give the name of a file"):
        fit.save(tmp_path)
    monkeypatch.chdir(tmp_path)
    fit.save("fit.pt")
    assert (tmp_path / "fit.pt").is_file()


def test_half_a_file_is_refused(tmp_path: Path) -> None:
    known(linear_model(PRIOR), ragged_tasks(2), vm.Joint()).save(tmp_path / "fit.pt")
    content = (tmp_path / "fit.pt").read_bytes()
    (tmp_path / "fit.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is not a varmeta fit"):
        vm.load(tmp_path / "fit.pt", linear_model(PRIOR))


def other_program(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    return pyro.sample(
        "y",
        dist.Normal(params["weight"][..., 0, 0] * x[..., 0] + params["bias"][..., 0], 1.0),
        obs=y,
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: net_model(PRIOR), "is a fit of a model with weights"),
        (
            lambda: linear_model(vm.GaussianPrior(3.0, "shared")),
            "prior.learn_precision was None, but is 'shared'",
        ),
        (lambda: linear_model(vm.GaussianPrior(4.0)), "prior.precision was 3.0, but is 4.0"),
        (
            lambda: vm.TaskModel(nn.Linear(1, 1), vm.likelihoods.StudentT(scale=0.7), PRIOR),
            r"likelihood was Gaussian\(scale=0.7, .*, but is StudentT",
        ),
        (
            lambda: vm.TaskModel(
                nn.Linear(1, 1), vm.likelihoods.Gaussian(scale=0.7, learn_scale=False), PRIOR
            ),
            "likelihood.learn_scale was True, but is False",
        ),
        (
            lambda: vm.TaskModel.from_pyro(other_program, {"weight": (1, 1), "bias": (1,)}, PRIOR),
            "net was Linear.*, but is not there",
        ),
    ],
    ids=[
        "weights",
        "learned precision",
        "fixed precision",
        "likelihood",
        "learned scale",
        "program",
    ],
)
def test_a_fit_of_another_model_is_refused(
    model: Callable[[], vm.TaskModel], message: str, tmp_path: Path
) -> None:
    known(linear_model(PRIOR), ragged_tasks(2), vm.Joint()).save(tmp_path / "fit.pt")
    with pytest.raises(ValueError, match=message):
        vm.load(tmp_path / "fit.pt", model())


def test_a_shared_parameter_of_another_shape_is_refused(tmp_path: Path) -> None:
    def model(width: int) -> vm.TaskModel:
        net = seeded(
            lambda: nn.Sequential(nn.Linear(1, 2), nn.Linear(2, width), nn.Linear(width, 1))
        )
        return vm.TaskModel(net, vm.likelihoods.Gaussian(), PRIOR, shared=("1.*", "2.*"))

    known(model(2), ragged_tasks(2), vm.Joint()).save(tmp_path / "fit.pt")
    with pytest.raises(
        ValueError, match="net.1 was 'Linear.*out_features=2.*, but is 'Linear.*out_features=3"
    ):
        vm.load(tmp_path / "fit.pt", model(3))


def test_the_model_must_be_one(tmp_path: Path) -> None:
    known(linear_model(PRIOR), ragged_tasks(2), vm.Joint()).save(tmp_path / "fit.pt")
    with pytest.raises(TypeError, match="model must be the TaskModel that was fitted, not Linear"):
        vm.load(tmp_path / "fit.pt", nn.Linear(1, 1))  # type: ignore[arg-type]
