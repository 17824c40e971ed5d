"""The export under whichever ArviZ is installed.  `make test-arviz1` runs this file under 1.x,
where there is no torch: `varmeta/__init__.py` would need it, so there the package is entered beside
it.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

PACKAGE = Path(__file__).parents[2] / "varmeta"
FILE = PACKAGE / "posteriors" / "arviz.py"
if importlib.util.find_spec("torch") is None:
    bare = types.ModuleType("varmeta")
    bare.__path__ = [str(PACKAGE)]
    sys.modules["varmeta"] = bare
inference_data = importlib.import_module("varmeta.posteriors.arviz")

ARVIZ_1 = not importlib.metadata.version("arviz").startswith("0.")
to_arviz, save, load = inference_data.to_arviz, inference_data.save, inference_data.load
pareto_k, loo_elpd = inference_data.pareto_k, inference_data.loo_elpd

NAMES = ["south", "north", "east"]  # not sorted: the order of the tasks must survive
SIZES = [6, 12, 8]
TASK_OF = np.repeat(NAMES, SIZES)
QUERY_OF = ["south", "south", "east", "east"]
DRAWS = 2000


def gaussian(seed=0):
    """Exact posterior draws of y_ij ~ N(m_i, 1), m_i ~ N(0, 10^2): everything is known."""
    rng = np.random.default_rng(seed)
    index = np.repeat(range(3), SIZES)
    y = rng.normal(np.array([-1.0, 0.0, 3.0])[index])
    precision = np.array(SIZES) + 0.01
    mean = np.bincount(index, y) / precision
    m = mean + rng.normal(size=(DRAWS, 3)) / np.sqrt(precision)
    log_likelihood = -0.5 * (y - m[:, index]) ** 2 - 0.5 * np.log(2 * np.pi)
    return y, index, m, log_likelihood, mean, precision


def export(**attrs):
    y, index, m, log_likelihood, *_ = gaussian()
    query = np.zeros((DRAWS, 4))
    return to_arviz(
        {
            "posterior": {"m": m},
            "posterior_predictive": {"y": m[:, index]},
            "predictions": {"y": query},
            "log_likelihood": {"y": log_likelihood},
            "observed_data": {"y": y},
            "constant_data": {"x": np.ones((len(y), 2)), "theta0": np.arange(2.0)},
            "predictions_constant_data": {"x": np.ones((4, 2))},
            "fit": {"loss": np.array([3.0, 2.0, 1.0])},
            "prior": {},
        },
        {
            "m": ["task"],
            "y": ["obs"],
            "predictions/y": ["obs_query"],
            "x": ["obs", "feature"],
            "predictions_constant_data/x": ["obs_query", "feature"],
            "theta0": ["weight"],
            "loss": ["step"],
        },
        {"task": NAMES, "weight": ["bias", "slope"], "feature": ["a", "b"]},
        {
            **dict.fromkeys(
                ("posterior_predictive", "log_likelihood", "observed_data", "constant_data"),
                TASK_OF,
            ),
            **dict.fromkeys(("predictions", "predictions_constant_data"), QUERY_OF),
        },
        {
            "objective": "joint",
            "seed": np.int64(3),
            "precision": 0.5,
            "config": {"steps": 10, "flag": True},
            **attrs,
        },
    )


def check(data):
    """Everything `export` put in, found again."""
    y, index, m, *_ = gaussian()
    assert dict(data["posterior"].sizes) == {"chain": 4, "draw": DRAWS // 4, "task": 3}
    assert data["posterior"]["task"].values.tolist() == NAMES
    assert np.array_equal(data["posterior"]["m"].values.reshape(m.shape), m)
    assert np.array_equal(data["posterior_predictive"]["y"].values.reshape(DRAWS, -1), m[:, index])
    assert np.array_equal(data["observed_data"]["y"].values, y)
    assert data["observed_data"]["task_id"].dims == ("obs",)
    assert data["observed_data"]["task_id"].values.tolist() == TASK_OF.tolist()
    assert data["predictions"]["y"].dims == ("chain", "draw", "obs_query")
    assert data["predictions"]["task_id"].values.tolist() == QUERY_OF
    assert data["constant_data"]["theta0"].sel(weight="slope").item() == 1.0
    assert data["fit"]["loss"].dims == ("step",)
    assert "prior" not in data
    assert data.attrs["objective"] == "joint"
    assert data.attrs["seed"] == 3
    assert data.attrs["precision"] == 0.5
    assert json.loads(data.attrs["config"]) == {"steps": 10, "flag": True}


def test_what_goes_in_comes_out():
    check(export())


def test_the_container_is_the_installed_arvizs():
    assert type(export()).__name__ == ("DataTree" if ARVIZ_1 else "InferenceData")


def test_files_round_trip_and_can_be_written_again(tmp_path):
    path = tmp_path / "draws.nc"
    save(export(names=["a", "b"]), path)
    data = load(path)
    check(data)
    assert list(data.attrs["names"]) == ["a", "b"]
    save(data, path)  # the file must not be open any more
    check(load(str(path)))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        load(tmp_path / "nothing.nc")


def test_arviz_reads_the_export():
    import arviz

    _, _, m, *_ = gaussian()
    summary = arviz.summary(export(), var_names=["m"], kind="stats", round_to=6)
    assert np.allclose(summary["mean"].to_numpy(dtype=float), m.mean(0), atol=1e-5)


def test_loo_by_task():
    import arviz

    y, index, _, _, mean, precision = gaussian()
    elpd = loo_elpd(export())
    assert elpd["task_id"].values.tolist() == NAMES
    # exact leave-one-out: N(y | mean without y, 1 + 1 / precision without y)
    left = precision[index] - 1
    spread = 1 + 1 / left
    exact = -0.5 * (y - (mean[index] * precision[index] - y) / left) ** 2 / spread - 0.5 * np.log(
        2 * np.pi * spread
    )
    # Monte Carlo error of 2,000 draws, some 0.01 an observation
    assert np.allclose(elpd.values, np.bincount(index, exact), atol=0.1)
    total = arviz.loo(export(), reff=1.0)
    assert elpd.sum().item() == pytest.approx(float(total["elpd" if ARVIZ_1 else "elpd_loo"]))


def test_loo_refuses_a_delta_posterior():
    with pytest.raises(ValueError, match="delta posterior"):
        loo_elpd(export(posterior_kind="delta"))


def test_loo_needs_a_log_likelihood_with_tasks():
    with pytest.raises(ValueError, match="'log_likelihood' group"):
        loo_elpd(to_arviz({"posterior": {"m": np.zeros(5)}}))
    log_likelihood = gaussian()[3]
    data = to_arviz(
        {"posterior": {"m": np.zeros(DRAWS)}, "log_likelihood": {"y": log_likelihood[:, 2:7]}},
        {"y": ["obs"]},
    )
    with pytest.raises(ValueError, match="task_id"):
        loo_elpd(data)


@pytest.mark.parametrize("index", [0.25, 1.0, 2.0])
def test_pareto_k_of_pareto_weights(index):
    # weights u^(-k) of uniform u have the tail index k exactly
    u = np.random.default_rng(1).uniform(size=(20, 4000))
    k = pareto_k(-index * np.log(u))
    assert k.shape == (20,)
    # 190 tail draws a row: sd about (1 + k) / sqrt(190), 20 rows
    assert k.mean() == pytest.approx(index, abs=4 * (1 + index) / np.sqrt(190 * 20))


def test_pareto_k_distinguishes_the_sign():
    # uniform weights have a bounded tail (k < 0), their inverses an infinite mean (k = 1): a sign
    # error would swap them
    u = np.random.default_rng(2).uniform(size=(1, 4000))
    assert pareto_k(np.log(u))[0] < 0 < 0.7 < pareto_k(-np.log(u))[0]


def test_pareto_k_by_row_and_up_to_a_constant():
    weights = np.random.default_rng(3).normal(size=(4, 500)) * np.array(
        [[0.1], [1.0], [3.0], [10.0]]
    )
    k = pareto_k(weights)
    assert (np.diff(k) > 0).all()
    assert np.allclose(pareto_k(weights - 50.0), k, atol=1e-6)
    assert np.allclose(pareto_k(weights[2:3]), k[2])


def test_pareto_k_of_equal_weights_and_of_zero_weights():
    weights = np.random.default_rng(4).normal(size=(3, 500))
    weights[0] = -1234.5 + 1e-11 * weights[0]
    k = pareto_k(weights)
    assert k[0] == -np.inf
    none = weights.copy()
    none[1, weights[1].argmin()] = -np.inf
    assert np.allclose(pareto_k(none), k)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.zeros(100), "task, draw"),
        (np.zeros((3, 29)), "at least 30"),
        (np.where(np.eye(3, 100) > 0, np.nan, 0.0)[:2], r"\[0, 1\]"),
        (np.vstack([np.zeros(50), np.full(50, -np.inf)]), r"\[1\]"),
        (np.vstack([np.zeros(50), np.full(50, np.inf)]), r"\[1\]"),
    ],
)
def test_pareto_k_refuses(weights, message):
    with pytest.raises(ValueError, match=message):
        pareto_k(weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dims": {}}, r"posterior/m has shape \(5, 3\)"),
        ({"groups": {"observed_data": {"m": np.zeros((5, 3))}}}, "observed_data/m"),
        (
            {"groups": {"posterior": {"m": np.zeros((5, 3)), "n": np.zeros((6, 3))}}},
            "'posterior' disagree",
        ),
        ({"coords": {"task": ["a"]}}, r"coords\['task'\] has 1 labels"),
        ({"obs_task": {"prior": NAMES}}, "not given"),
        ({"obs_task": {"posterior": NAMES}}, "call one 'obs'"),
        (
            {"dims": {"m": ["obs"]}, "obs_task": {"posterior": NAMES[:2]}},
            r"obs_task\['posterior'\]",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments, message):
    given = {
        "groups": {"posterior": {"m": np.zeros((5, 3))}},
        "dims": {"m": ["task"], "n": ["task"]},
        "coords": {},
        "obs_task": {},
    }
    with pytest.raises(ValueError, match=message):
        to_arviz(**{**given, **arguments})


@pytest.mark.parametrize("value", [None, True, [True], ["a", 1], [None], object()])
def test_attributes_that_a_file_cannot_hold_are_refused(value):
    with pytest.raises(TypeError, match="note"):
        to_arviz({"posterior": {"m": np.zeros(5)}}, attrs={"note": value})


def test_the_exporter_alone_imports_nothing_heavy():
    code = f"import runpy, sys; runpy.run_path({str(FILE)!r}); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert "numpy" in loaded
    assert not {"torch", "pyro", "varmeta", "arviz", "xarray", "pandas"} & set(loaded)
