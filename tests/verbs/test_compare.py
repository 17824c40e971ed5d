"""`compare`: every method on the same tasks, seeds, start and budget; and honest intervals."""

from __future__ import annotations

import re
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import varmeta as vm
from tests.cases import linear_model, net_model, ragged_tasks, seeded
from varmeta.fitting.baselines import BASELINES, Pooled, baseline
from varmeta.models.initialised import initialised
from varmeta.verbs.report import interval

PRIOR = vm.GaussianPrior(3.0)
INNER: dict[str, Any] = {"inner_steps": 2, "minimizer": vm.GradientDescent(lr=0.01)}
STRATEGIES = {
    "joint": vm.Joint("normal", adapt_steps=200),
    "joint, delta": vm.Joint("delta"),
    "reinit": vm.Reinit("normal", every=10, adapt_steps=200),
    "implicit": vm.Implicit(
        "delta", "elbo", on_unconverged="ignore", linear_solver=vm.CG(max_steps=2), **INNER
    ),
    "imaml": vm.Implicit(
        "delta", "query", on_unconverged="ignore", linear_solver=vm.CG(max_steps=2), **INNER
    ),
    "maml": vm.Unrolled("delta", **INNER),
    "fomaml": vm.FirstOrder("delta", **INNER),
    "reptile": vm.Reptile("delta", **INNER),
}
METRICS = ["log_density", "rmse", "coverage", "calibration_error", "crps"]
TRAIN, TEST = ragged_tasks(4), ragged_tasks(3, seed=1)


Starts = dict[tuple[str, int], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def comparison() -> tuple[vm.Report, Starts]:
    """The report, and where each of its fits started."""
    starts: Starts = {}
    module = sys.modules["varmeta.verbs.compare_runs"]  # the attribute of that name is the function
    real = module.fit

    def spy(model: vm.TaskModel, tasks: vm.TaskSet, strategy: Any, **options: Any) -> vm.Fit:
        starts[f"{strategy!r} {model.prior.start}", options["seed"]] = model.init(
            torch.zeros((), dtype=tasks.dtype)
        )
        return real(model, tasks, strategy, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "fit", spy)
        return vm.compare(
            STRATEGIES, net_model(PRIOR), TRAIN, TEST, seeds=[3, 5], budget=30, num_samples=50
        ), starts


@pytest.fixture(scope="module")
def report(comparison: tuple[vm.Report, Starts]) -> vm.Report:
    return comparison[0]


def test_every_method_and_seed_is_there(report: vm.Report) -> None:
    methods = [*STRATEGIES, *BASELINES]
    assert list(report.table.index) == methods
    assert set(report.fits) == {(method, seed) for method in methods for seed in (3, 5)}
    assert list(report.runs.columns) == [
        "method",
        "seed",
        "hyperguide",
        "solver",
        "steps",
        "evaluations",
        "adapting",
        "seconds",
        "failed",
        "converged",
        "moved",
        "stop",
        "warnings",
    ]
    assert set(report.runs["solver"]) == {"budget"}  # a network is not solved exactly
    assert len(report.runs) == 20 and not report.runs["failed"].any()
    # one row per method, seed and test task: every cell is there, so methods are compared on the
    # same ones
    counts = report.scores.groupby(["method", "seed", "task"]).size()
    assert len(counts) == 20 * len(TEST) and (counts == 1).all()
    assert set(report.scores["task"]) == set(TEST.names)
    assert list(report.scores.columns) == ["task", "n", *METRICS, "method", "seed"]


def test_columns_of_the_table(report: vm.Report) -> None:
    report = replace(
        report,
        runs=report.runs.assign(converged=report.runs["method"].str.contains("joint|pooled")),
    )
    table = report.table
    ends = [column for metric in METRICS for column in (metric, f"{metric}_low", f"{metric}_high")]
    assert list(table.columns) == [
        *ends,
        "steps",
        "evaluations",
        "adapting",
        "seconds",
        "failed",
        "settled",
        "solver",
        "overspent",
    ]
    settled = table["settled"].astype(bool)
    assert settled.any() and not settled.all()
    for metric in METRICS:
        by_hand = report.scores.groupby("method")[metric].mean()
        assert table[metric].to_numpy() == pytest.approx(by_hand[table.index].to_numpy(), abs=1e-12)
        low, high = table[f"{metric}_low"], table[f"{metric}_high"]
        # also of what has not settled: its interval is marked where it is shown
        assert ((low <= table[metric]) & (table[metric] <= high)).all()
        for method, row in table.iterrows():
            cells = report.scores[report.scores["method"] == method]
            wide = cells.pivot(index="seed", columns="task", values=metric).to_numpy()
            assert (row[f"{metric}_low"], row[f"{metric}_high"]) == interval(wide)


def test_scores_are_those_of_the_fits(report: vm.Report) -> None:
    fit = report.fits["maml", 5]
    own = fit.adapt(TEST).score(num_samples=50, seed=5).drop(index="all")
    there = report.scores.query("method == 'maml' and seed == 5").set_index("task")
    pd.testing.assert_frame_equal(there[METRICS], own[METRICS])


def test_what_adaptation_took_is_told_beside_what_the_budget_bought(report: vm.Report) -> None:
    adapting = report.table["adapting"]
    assert adapting["joint"] == 200  # adapt_steps
    for name in ("maml", "imaml"):  # two steps, and the loss at the end
        assert adapting[name] == 2.5
        posterior = report.fits[name, 3].adapt(TEST)
        assert posterior.evaluations is not None
        assert posterior.evaluations.tolist() == [2.5] * len(TEST)
        few = posterior.take(TEST.names[:1]).evaluations
        assert few is not None and few.tolist() == [2.5]
    assert np.isnan(adapting["pooled"])  # nothing is adapted


def test_the_budget_is_the_same_for_all(report: vm.Report) -> None:
    for (method, _), fit in report.fits.items():
        spent = fit.history["evaluations"]
        assert 30 <= spent.iloc[-1] < 30 + spent.diff().max() + 1e-9, method
        assert "spent its budget of 30" in fit.stop


def test_every_method_starts_at_the_same_point(comparison: tuple[vm.Report, Starts]) -> None:
    starts = comparison[1]
    assert len(starts) == 20
    one = {seed: next(start for (_, s), start in starts.items() if s == seed) for seed in (3, 5)}
    for (_, seed), start in starts.items():
        assert all(torch.equal(value, one[seed][name]) for name, value in start.items())
    assert not torch.equal(one[3]["0.weight"], one[5]["0.weight"])


def test_a_method_does_not_depend_on_the_others(report: vm.Report) -> None:
    alone = vm.compare(
        {"reinit": STRATEGIES["reinit"]},
        net_model(PRIOR),
        TRAIN,
        TEST,
        seeds=[5],
        budget=30,
        num_samples=50,
        baselines=False,
    )
    assert list(alone.table.index) == ["reinit"]
    there = report.scores.query("method == 'reinit' and seed == 5").reset_index(drop=True)
    pd.testing.assert_frame_equal(alone.scores, there)


def test_a_new_initialisation_is_pytorchs_own() -> None:
    model = net_model(PRIOR)
    fresh = initialised(model, 7)
    again = seeded(lambda: nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)), seed=7)
    # drawn in double precision here, in single there; the same layers in the same order
    assert {n: v.shape for n, v in fresh.start.items()} == {
        n: v.shape for n, v in again.named_parameters()
    }
    limit = {"0.weight": 1.0, "0.bias": 1.0, "2.weight": 3**-0.5, "2.bias": 3**-0.5}
    assert all(bool((value.abs() <= limit[name]).all()) for name, value in fresh.start.items())
    assert all(
        torch.equal(value, initialised(model, 7).start[name]) for name, value in fresh.start.items()
    )
    assert not torch.equal(model.start["0.weight"], fresh.start["0.weight"])


def test_a_start_given_to_the_prior_and_frozen_statistics_stay() -> None:
    net = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    net(torch.randn(50, 1) + 5.0)  # running statistics
    prior = vm.GaussianPrior(3.0, loc={"2.bias": 1.25})
    model = vm.TaskModel(net, vm.likelihoods.Gaussian(), prior, batch_norm="frozen")
    fresh = initialised(model, 5)
    assert fresh.start["2.bias"].tolist() == [1.25]
    assert not torch.equal(fresh.start["2.weight"], model.start["2.weight"])
    assert fresh.net is not None and model.net is not None
    for name, value in model.net.named_buffers():
        assert torch.equal(value, dict(fresh.net.named_buffers())[name])
    assert fresh.net[1].running_mean.abs().max() > 0.1  # type: ignore[index, union-attr, operator]


def test_programs_start_where_they_start() -> None:
    model = vm.TaskModel.from_pyro(lambda params, x, y: None, {"w": ()})
    assert initialised(model, 3) is model


# -- baselines -------------------------------------------------------------------------------------


def test_the_pooled_baseline_is_least_squares() -> None:
    """All tasks as one: with Adam to convergence, ordinary least squares and the residual's
    maximum-likelihood sd.
    """
    tasks = ragged_tasks(5)
    fit = vm.fit(linear_model(PRIOR), tasks, Pooled(), 1500, lambda p: torch.optim.Adam(p, 5e-2))
    x, y = (
        torch.cat([task.support[i] for task in tasks if task.support is not None]) for i in (0, 1)
    )
    design = torch.cat([x, torch.ones_like(x)], -1)
    solution = torch.linalg.lstsq(design, y.unsqueeze(-1)).solution.flatten()
    assert float(fit.eta["weight"]) == pytest.approx(float(solution[0]), abs=1e-4)
    assert float(fit.eta["bias"]) == pytest.approx(float(solution[1]), abs=1e-4)
    residual = y - design @ solution
    assert float(fit.eta["log_scale"].exp()) == pytest.approx(
        float(residual.square().mean().sqrt()), rel=1e-3
    )
    # nothing is adapted
    assert all(bool((value == value[:1]).all()) for value in fit.adapt(tasks).mean.values())


def test_no_pooling_lets_every_task_go_its_own_way() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, 1, generator=generator, dtype=torch.float64)
    slopes = torch.tensor([-3.0, 0.0, 3.0], dtype=torch.float64)
    y = slopes[:, None] * x[..., 0] + 0.1 * torch.randn(
        3, 40, generator=generator, dtype=torch.float64
    )
    tasks = vm.TaskSet(
        [vm.Task((a[:30], b[:30]), (a[30:], b[30:])) for a, b in zip(x, y, strict=True)]
    )
    model = vm.TaskModel(
        nn.Linear(1, 1),
        vm.likelihoods.Gaussian(scale=0.1, learn_scale=False),
        vm.GaussianPrior(1e4),
    )
    report = vm.compare({"joint": vm.Joint("normal")}, model, tasks, tasks, seeds=1, budget=50)
    mean = report.fits["no pooling", 0].adapt(tasks).mean["weight"].flatten()
    torch.testing.assert_close(mean, slopes, rtol=0, atol=0.1)
    assert report.table.loc["no pooling", "rmse"] < 0.2 < report.table.loc["pooled", "rmse"]


def test_no_pooling_steps_and_adapts_as_the_first_joint_does() -> None:
    joint = vm.Joint("multivariate_normal", minimizer=vm.Adam(lr=0.3), adapt_steps=7)
    _, own = baseline("no pooling", net_model(PRIOR), TRAIN, [vm.Implicit(), joint, vm.Joint()])
    assert own == joint
    assert baseline("no pooling", net_model(PRIOR), TRAIN, [vm.Implicit()])[1] == vm.Joint(
        "multivariate_normal"
    )


# -- failures and warnings -------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken(vm.Joint):
    """Fails where its seed is odd."""

    def adapt(self, problem: Any, batch: Any, eta: Any) -> Any:
        if problem.seed % 2:
            raise RuntimeError("no luck with this seed")
        return super().adapt(problem, batch, eta)


def test_failures_are_kept_and_do_not_stop_the_others() -> None:
    strategies = {"broken": Broken("normal"), "joint": vm.Joint("normal")}
    report = vm.compare(
        strategies,
        linear_model(PRIOR),
        TRAIN,
        TEST,
        seeds=[0, 1],
        budget=5,
        num_samples=5,
        baselines=False,
    )
    runs = report.runs.set_index(["method", "seed"])
    assert runs["failed"].to_dict() == {
        ("broken", 0): 0,
        ("joint", 0): 0,
        ("broken", 1): 1,
        ("joint", 1): 0,
    }
    assert runs.loc[("broken", 1), "stop"] == "RuntimeError: no luck with this seed"
    assert report.table["failed"].to_dict() == {"broken": 1, "joint": 0}
    assert np.isfinite(report.table.loc["broken", METRICS].to_numpy(dtype=float)).all()
    assert "broken" in str(report)


def test_a_method_that_always_fails_keeps_its_row() -> None:
    strategies = {"broken": Broken("normal"), "joint": vm.Joint("normal")}
    report = vm.compare(
        strategies,
        linear_model(PRIOR),
        TRAIN,
        TEST,
        seeds=[1],
        budget=5,
        num_samples=5,
        baselines=False,
    )
    assert list(report.table.index) == ["broken", "joint"]
    assert np.isnan(report.table.loc["broken", "rmse"]) and "nan" in str(report)
    with pytest.raises(
        RuntimeError, match="every strategy failed; the first: RuntimeError: no luck"
    ):
        vm.compare(
            {"broken": Broken()},
            linear_model(PRIOR),
            TRAIN,
            TEST,
            seeds=[1],
            budget=5,
            baselines=False,
        )


def test_warnings_stand_in_the_report() -> None:
    """An uncertified gradient must not vanish between the runs."""
    short = vm.Implicit("delta", "query", **INNER)
    with warnings.catch_warnings(record=True) as caught:
        report = vm.compare(
            {"imaml": short},
            net_model(PRIOR),
            TRAIN,
            TEST,
            seeds=1,
            budget=20,
            num_samples=5,
            baselines=False,
        )
    assert not caught
    assert "the implicit gradient is not certified for" in report.runs["warnings"].iloc[0]


# -- intervals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, 2, 3, 5, 20])
def test_the_interval_covers_other_seeds_and_tasks(seeds: int) -> None:
    """Simulated tables with effects of seeds, tasks and both: 95 % intervals cover the true mean,
    0, as often as they say.
    """
    rng = np.random.default_rng(seeds)
    scale = 0.0 if seeds == 1 else 2.0  # a single seed tells nothing about the others
    covered = []
    for _ in range(1000):
        cells = (
            scale * rng.normal(size=(seeds, 1))
            + 3.0 * rng.normal(size=(1, 25))
            + rng.normal(size=(seeds, 25))
        )
        low, high = interval(cells)
        covered.append(low < 0.0 < high)
    assert 0.93 <= np.mean(covered) <= 0.985


def test_the_interval_of_many_seeds_has_the_known_width() -> None:
    rng = np.random.default_rng(0)
    cells = 2.0 * rng.normal(size=(20, 1)) + 3.0 * rng.normal(size=(1, 40))
    low, high = interval(cells)
    sd = np.sqrt(cells.mean(1).var(ddof=1) / 20 + cells.mean(0).var(ddof=1) / 40)
    assert high - low == pytest.approx(2 * 2.0 * sd, rel=0.03)  # t with about 50 degrees of freedom


def test_a_score_that_is_not_a_number_is_not_averaged_away() -> None:
    cells = np.ones((2, 3))
    for value in (np.nan, -np.inf):
        cells[1, 2] = value
        assert all(np.isnan(end) for end in interval(cells))
    assert interval(np.ones((2, 3))) == (1.0, 1.0)


def test_differences_are_paired(report: vm.Report) -> None:
    table = report.differences("joint")
    assert "joint" not in table.index and set(table.index) < set(report.table.index)
    mean = report.table.loc["maml", "rmse"] - report.table.loc["joint", "rmse"]
    assert table.loc["maml", "rmse"] == pytest.approx(mean)
    assert (table["rmse_low"] < table["rmse"]).all() and (table["rmse"] < table["rmse_high"]).all()
    with pytest.raises(ValueError, match="reference must be one of the methods"):
        report.differences("nobody")


# -- what is written and drawn ---------------------------------------------------------------------


def test_save_writes_three_tables(report: vm.Report, tmp_path: Path) -> None:
    report.save(tmp_path / "new" / "folder")
    read = {
        name: pd.read_csv(tmp_path / "new" / "folder" / f"{name}.csv")
        for name in ("scores", "runs", "table")
    }
    assert read["scores"]["rmse"].to_numpy() == pytest.approx(
        report.scores["rmse"].to_numpy(), rel=1e-12
    )
    assert read["runs"]["method"].tolist() == report.runs["method"].tolist()
    assert read["table"].set_index("method")["crps"].to_numpy() == pytest.approx(
        report.table["crps"].to_numpy(), rel=1e-12
    )


def test_the_callback_sees_every_run() -> None:
    rows: list[dict[str, Any]] = []
    report = vm.compare(
        {"joint": vm.Joint()},
        linear_model(PRIOR),
        TRAIN,
        TEST,
        seeds=2,
        budget=3,
        num_samples=5,
        callback=rows.append,
    )
    assert pd.DataFrame(rows).equals(report.runs)


def test_print_marks_intervals_of_what_has_not_settled(report: vm.Report) -> None:
    # nothing overspent, nothing hardly begun
    report = replace(report, budget=100.0, runs=report.runs.assign(steps=50))
    settled = replace(report, runs=report.runs.assign(converged=True))
    row, text = settled.table.loc["maml"], str(settled)
    shown = f"{row['rmse']:.2f} [{row['rmse_low']:.2f}, {row['rmse_high']:.2f}]"
    assert shown in text and "*" not in text
    # two lines of head, and one that says what the numbers are
    assert "not settled" not in text and len(text.splitlines()) == 13
    assert text.splitlines()[-1] == (
        "means over tasks and seeds [95 % intervals for other tasks and seeds] of each task's "
        "score, in the units of the tasks as given; rmse is averaged over tasks, where the row "
        '"all" of score() pools their observations; coverage is of 90 % intervals; adapting: '
        "gradient evaluations for a test task, outside the budget"
    )
    single = replace(settled, scores=report.scores[report.scores["seed"] == 5])
    assert "means over tasks [95 % intervals for other tasks, with one seed]" in str(single)

    nothing = replace(report, runs=report.runs.assign(converged=False))
    text = str(nothing)
    assert shown + "*" in text
    assert "\n* not settled" in text and text.splitlines()[-2].endswith(": every method")

    some = report.runs.assign(converged=report.runs["method"].isin(["maml", "pooled"]))
    text = str(replace(report, runs=some))
    assert text.splitlines()[-2].endswith(": every method but maml, pooled")
    assert shown + " " in text and shown + "*" not in text
    # one seed is enough
    one = report.runs.assign(
        converged=(report.runs["method"] != "maml") | (report.runs["seed"] == 5)
    )
    assert str(replace(report, runs=one)).splitlines()[-2].endswith("(report.runs): maml")
    # a difference is as unsettled as either side
    assert not replace(report, runs=one).differences("maml")["settled"].any()
    from_joint = replace(report, runs=one).differences("joint")
    assert list(from_joint.index[~from_joint["settled"]]) == ["maml"]


def test_by_how_much_the_objective_still_moves_is_said(report: vm.Report) -> None:
    for row in report.runs.to_dict("records"):
        told = re.search(r"mean objective (fell|rose) by (\S+) nats, (.*)", row["stop"])
        if "above where it began" in row["stop"]:
            continue
        if told is None or "hides" in told[3]:
            assert np.isnan(row["moved"])
        else:
            by = float(told[2]) * (1 if told[1] == "fell" else -1)
            assert row["moved"] == pytest.approx(by / len(TRAIN), rel=0.06)
    runs = report.runs.assign(converged=report.runs["method"].str.contains("joint"), moved=np.nan)
    runs.loc[runs["method"] == "maml", "moved"] = [0.2, 1.234]
    runs.loc[runs["method"] == "pooled", "moved"] = [-3.0, 0.1]
    said = (
        "  over the last third of its steps its objective fell by, in nats per task: maml 1.2, "
        "pooled -3 (it rose); too few steps, or too much noise, to say how far it still moves: "
        "reinit, implicit, imaml, fomaml, reptile, no pooling"
    )
    assert said in str(replace(report, runs=runs)).splitlines()


def test_outer_steps_are_told_with_their_range_over_seeds(report: vm.Report) -> None:
    by = report.runs.groupby("method")["steps"]
    assert (by.mean()[report.table.index] == report.table["steps"]).all()
    runs = report.runs.assign(steps=40)
    assert " outer step" not in str(replace(report, runs=runs))
    maml = runs["method"] == "maml"
    runs.loc[maml, "steps"] = [9, 12]
    text = str(replace(report, runs=runs))
    assert "steps" in text.splitlines()[0] and "9 to 12" in text
    assert text.splitlines()[-1].startswith("maml took 9 to 12 outer steps: what is judged is")
    runs.loc[runs["method"].isin(["reptile", "pooled"]), "steps"] = 3
    text = str(replace(report, runs=runs.assign(steps=runs["steps"].where(~maml, 10))))
    assert text.splitlines()[-1].startswith("reptile, pooled took 3 outer steps: what is judged is")
    # few steps of a fit that has settled are enough
    assert " outer step" not in str(replace(report, runs=runs.assign(converged=True)))


# -- what is solved exactly, and what is overspent -------------------------------------------------


def raw_lines(num: int, seed: int) -> vm.TaskSet:
    """Lines far from where a network starts: y around 10,000, slopes around -40."""
    rng = np.random.default_rng(seed)
    tasks = []
    for i in range(num):
        x = 10.0 * rng.normal(size=(9, 1))
        y = (
            1e4
            + 300 * rng.normal()
            - (40.0 + 30.0 * rng.normal()) * x[:, 0]
            + 20.0 * rng.normal(size=9)
        )
        tasks.append(vm.Task((x[:5], y[:5]), (x[5:], y[5:]), name=f"{seed}-{i}"))
    return vm.TaskSet(tasks)


def test_what_fit_solves_exactly_compare_does_too() -> None:
    train, test = raw_lines(12, 0), raw_lines(6, 1)
    model = vm.TaskModel(
        nn.Linear(1, 1),
        vm.likelihoods.Gaussian(),
        vm.GaussianPrior(learn_precision="per_parameter"),
    )
    dense = vm.Joint("multivariate_normal")
    maml = vm.Unrolled("delta", inner_steps=1, minimizer=vm.GradientDescent(lr=1e-9))
    report = vm.compare(
        {"dense": dense, "maml": maml}, model, train, test, 2, budget=20, num_samples=50
    )
    fit = vm.fit(model, train.merged(), dense)
    assert report.runs.groupby("method")["solver"].first().to_dict() == {
        "dense": "exact", "maml": "budget", "pooled": "exact", "no pooling": "exact",
    }  # fmt: skip
    for seed in (0, 1):
        own = fit.adapt(test).score(num_samples=50, seed=seed).drop(index="all")
        there = report.scores.query(f"method == 'dense' and seed == {seed}").set_index("task")
        np.testing.assert_allclose(
            there[["rmse", "log_density"]], own[["rmse", "log_density"]], rtol=0, atol=1e-6
        )
    # found once: no seed and no start matters
    assert report.fits["dense", 0] is report.fits["dense", 1]
    assert (
        "solved exactly, outside the budget and alike for every seed: dense, pooled, no pooling"
        in str(report)
    )
    # the others start where fit would: at the pooled fit, not a million steps of Adam away from it
    table = report.table
    assert (
        table.loc["maml", "rmse"] < 1.5 * table.loc["pooled", "rmse"]
        and table.loc["dense", "settled"]
    )
    assert table.loc["dense", "log_density"] > table["log_density"].drop("dense").max()


def test_an_optimizer_of_ones_own_is_used_for_all() -> None:
    report = vm.compare(
        {"joint": vm.Joint()}, linear_model(PRIOR), TRAIN, TEST, 1, budget=10, num_samples=5,
        optimizer=lambda params: torch.optim.Adam(params, 1e-2),
    )  # fmt: skip
    assert set(report.runs["solver"]) == {"budget"}


def test_what_overspends_its_budget_is_said() -> None:
    to_tolerance = vm.Implicit("delta", "query")
    report = vm.compare(
        {"imaml": to_tolerance}, net_model(PRIOR), TRAIN, TEST, 1, budget=3, num_samples=5
    )
    spent = report.runs.set_index("method")["evaluations"]
    assert spent["imaml"] > 3.3
    over = report.table["overspent"]
    assert over["imaml"] == spent["imaml"] / 3 and np.isnan(over["pooled"])
    text = str(report)
    assert f"({over['imaml']:.1f} x budget)" in text
    assert "overspent, since one step took more than was left of the budget: imaml" in text
    # the budget bought one step, so that theta0 is almost the one that it started from
    taken = report.runs.set_index("method")["steps"]
    assert taken["imaml"] == report.table.loc["imaml", "steps"] == 1
    assert taken["imaml"] == len(report.fits["imaml", 0].history)
    assert (
        "imaml took 1 outer step: what is judged is nearly where the model starts, and what "
        "adaptation makes of that" in text
    )
    names = [" ".join(label.get_text().split()) for label in report.plot().get_yticklabels()]
    assert any(
        name.startswith("imaml (") and f"{over['imaml']:.1f} x budget" in name for name in names
    )


def test_the_figure_marks_what_has_not_settled(report: vm.Report) -> None:
    half = report.runs.assign(converged=report.runs["method"] == "maml")
    ax = replace(report, runs=half).plot("rmse")
    assert "open circle: not settled" in ax.get_xlabel()
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert [name for name in names if "not settled" not in name] == ["maml"]
    assert [len(drawn.get_segments()) for drawn in ax.collections] == [1, len(names) - 1]


@dataclass(frozen=True)
class Stopped(vm.Joint):
    """Ctrl-C in the run with one of the seeds."""

    seed: int = 1

    def loss(self, problem: Any, batch: Any, eta: Any, state: Any) -> Any:
        if problem.seed == self.seed and state.step == 1:
            raise KeyboardInterrupt
        return super().loss(problem, batch, eta, state)


def test_ctrl_c_keeps_the_seeds_that_are_complete() -> None:
    few: dict[str, Any] = {"seeds": 3, "budget": 3, "num_samples": 5}
    with pytest.warns(
        RuntimeWarning, match="interrupted after 5 of 12 runs: the report holds the first 4"
    ):
        report = vm.compare(
            {"joint": vm.Joint(), "stopped": Stopped()}, linear_model(PRIOR), TRAIN, TEST, **few
        )
    assert len(report.runs) == len(report.fits) == 4 and set(report.scores["seed"]) == {0}
    assert np.isfinite(report.table["rmse"]).all()


def test_ctrl_c_in_the_first_seed_keeps_the_methods_that_have_run() -> None:
    few: dict[str, Any] = {"seeds": 3, "budget": 3, "num_samples": 5}
    with pytest.warns(
        RuntimeWarning, match="interrupted after 1 of 12 runs: the report holds the first 1"
    ):
        report = vm.compare(
            {"joint": vm.Joint(), "stopped": Stopped(seed=0)},
            linear_model(PRIOR),
            TRAIN,
            TEST,
            **few,
        )
    assert list(report.table.index) == ["joint"]

    def late(row: dict[str, Any]) -> None:
        if row["seed"] == 1:
            raise KeyboardInterrupt

    with pytest.warns(
        RuntimeWarning, match="interrupted after 4 of 9 runs: the report holds the first 3"
    ):
        report = vm.compare(
            {"joint": vm.Joint()}, linear_model(PRIOR), TRAIN, TEST, **few, callback=late
        )
    assert set(report.fits) == {(method, 0) for method in ("joint", *BASELINES)}
    with pytest.raises(KeyboardInterrupt):
        vm.compare({"stopped": Stopped(seed=0)}, linear_model(PRIOR), TRAIN, TEST, **few)


# -- bad input -------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no strategies": ({"strategies": {}}, ValueError, "dict of at least one"),
    "a list": ({"strategies": [vm.Joint()]}, ValueError, "strategies must be a dict"),
    "a name": ({"strategies": {"a": "joint"}}, TypeError, "strategy must be one of"),
    "a baseline's name": (
        {"strategies": {"pooled": vm.Joint()}},
        ValueError,
        "names of the baselines",
    ),
    "no seeds": ({"seeds": 0}, ValueError, "seeds must be a number of at least 1"),
    "seeds twice": ({"seeds": [1, 1]}, ValueError, "different seeds"),
    "level": ({"level": 90}, ValueError, "level must be a probability"),
    "budget": ({"budget": 0}, ValueError, "budget must be a number of at least 1"),
    "num_samples": (
        {"num_samples": 0},
        ValueError,
        "num_samples must be a whole number of at least 1",
    ),
    "models": (
        {"models": {"imaml": linear_model(PRIOR)}},
        ValueError,
        r"models names \['imaml'\], but the strategies are",
    ),
    "no query": (
        {"test": vm.TaskSet([vm.Task(([[0.0]], [0.0]), name="bare")])},
        ValueError,
        "but 'bare' has none",
    ),
    "train": ({"train": [1]}, TypeError, "tasks must be a TaskSet, not a list"),
    "test": ({"test": None}, TypeError, "tasks must be a TaskSet, not None"),
    "model": ({"model": nn.Linear(1, 1)}, TypeError, "model must be a TaskModel"),
    "a strategy that cannot work": (
        {
            "model": linear_model(vm.GaussianPrior(1.0, "shared")),
            "strategies": {"a": vm.Joint("delta")},
        },
        ValueError,
        "hyperprior",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    change, error, message = BAD[name]
    arguments = {
        "strategies": {"joint": vm.Joint()},
        "model": linear_model(PRIOR),
        "train": TRAIN,
        "test": TEST,
    }
    with pytest.raises(error, match=message):
        vm.compare(**{**arguments, "seeds": 1, "num_samples": 2, **change})


# -- a posterior of eta ----------------------------------------------------------------------------

DENSE = vm.Joint("multivariate_normal")
LINES, UNSEEN = (
    vm.datasets.lines(6, 4, 2, noise=0.3),
    vm.datasets.lines(30, 3, 4, seed=1, noise=0.3),
)


def learned() -> vm.TaskModel:
    return linear_model(vm.GaussianPrior(learn_precision="per_parameter"))


def test_a_posterior_of_eta_for_some_strategies() -> None:
    """The run is what `fit` makes of it, its scores those of its `adapt`, and the report says who
    had one.
    """
    both = {"point": DENSE, "posterior": DENSE}
    report = vm.compare(
        both,
        learned(),
        LINES,
        UNSEEN,
        1,
        hyperguide={"posterior": "multivariate_normal"},
        budget=40,
        num_samples=100,
        compile=False,
    )
    assert report.runs["hyperguide"].tolist() == ["delta", "multivariate_normal", "delta", "delta"]
    assert not report.runs["failed"].any()
    fit = report.fits["posterior", 0]
    assert fit.hyper is not None and report.fits["point", 0].hyper is None
    alone = vm.fit(
        fit.model, LINES.merged(), DENSE, hyperguide="multivariate_normal", compile=False
    )
    assert alone.hyper is not None and alone.hyper.log_evidence == pytest.approx(
        fit.hyper.log_evidence, rel=1e-6
    )
    score = fit.adapt(UNSEEN, compile=False).score(num_samples=100, seed=0)
    assert report.table.loc["posterior", "log_density"] == pytest.approx(
        score["log_density"].iloc[:-1].mean()
    )
    assert "outside the budget\n  posterior (multivariate_normal)" in str(report)
    assert "posterior of eta" not in str(
        vm.compare({"point": DENSE}, learned(), LINES, UNSEEN, 1, budget=5, compile=False)
    )


def test_a_posterior_of_eta_for_all_strategies() -> None:
    report = vm.compare(
        {"a": DENSE, "b": vm.Joint("normal")},
        learned(),
        LINES,
        UNSEEN,
        [4],
        hyperguide="reml",
        baselines=False,
        num_samples=50,
        compile=False,
    )
    assert report.runs["hyperguide"].tolist() == ["reml", "reml"]
    assert all(
        fit.hyper is not None and fit.hyper.hyperguide == "reml" for fit in report.fits.values()
    )


@pytest.mark.parametrize(
    ("hyperguide", "error", "message"),
    [
        (
            {"who": "reml"},
            ValueError,
            r"hyperguide names \['who'\], but the strategies are \['imaml', 'joint'\]",
        ),
        (
            "reml",
            ValueError,
            r"strategy 'imaml': hyperguide='reml' goes with vm.Joint.* give a dict for some "
            "strategies only",
        ),
        (
            {"joint": "full"},
            ValueError,
            "strategy 'joint': hyperguide must be one of .* not 'full'$",
        ),
        ({"joint": True}, TypeError, "strategy 'joint': hyperguide must be one of .* not True$"),
    ],
)
def test_a_posterior_of_eta_that_there_is_not_is_refused(
    hyperguide: Any, error: type[Exception], message: str
) -> None:
    strategies = {"joint": DENSE, "imaml": STRATEGIES["imaml"]}
    with pytest.raises(error, match=message):
        vm.compare(strategies, learned(), LINES, UNSEEN, 1, hyperguide=hyperguide)
