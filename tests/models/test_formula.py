"""A formula's tasks and model against the design written by hand, and what a formula may not be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch

import varmeta as vm

DENSE = vm.Joint("multivariate_normal")


def radon() -> pd.DataFrame:
    return vm.datasets.radon(as_frame=True)


def table(groups: int = 20, rows: int = 9) -> pd.DataFrame:
    """Every kind of column: numbers, a factor of text, one of categories, counts, weights."""
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(groups), rows)
    n = g.size
    frame = pd.DataFrame(
        {
            "g": [f"g{i}" for i in g],
            "x": rng.normal(2.0, 1.0, n),
            "z": rng.uniform(1.0, 3.0, n),
            "arm": rng.choice(["a", "b", "c"], n),
            "dose": pd.Categorical(rng.choice(["low", "high"], n), categories=["low", "high"]),
            "w": rng.uniform(0.5, 4.0, n),
            "trials": rng.integers(5, 9, n),
        }
    )
    own = rng.multivariate_normal([0.0, 0.0, 0.0], np.diag([1.0, 0.4, 0.3]), groups)[g]
    frame["mean"] = 1.0 + own[:, 0] + (0.5 + own[:, 1]) * frame["x"] + own[:, 2] * frame["z"]
    of_arm = rng.normal(size=(groups, 3))[g, frame["arm"].map({"a": 0, "b": 1, "c": 2})]
    frame["y"] = frame["mean"] + (frame["arm"] == "b") + of_arm + 0.5 * rng.normal(size=n)
    frame["cost"] = np.exp(0.3 * frame["y"])
    frame["count"] = rng.poisson(np.exp(0.3 * frame["mean"]))
    frame["hits"] = rng.binomial(frame["trials"], 1 / (1 + np.exp(1.0 - 0.3 * frame["mean"])))
    frame["answer"] = np.where(rng.logistic(size=n) < frame["mean"] - 3.0, "yes", "no")
    return frame


def by_hand(
    frame: pd.DataFrame, columns: dict[str, Any], prior: vm.GaussianPrior, **options: Any
) -> vm.Fit:
    """The fit of the same model with its columns made by numpy."""
    response = options.pop("response", "y")
    made = frame[["g", *([response] if isinstance(response, str) else response)]].assign(**columns)
    tasks = vm.TaskSet.from_frame(made, task="g", x=list(columns), y=response)
    likelihood = options.pop("likelihood", vm.likelihoods.Gaussian())
    offset = options.pop("offset", ())
    net = vm.LinearPredictor(list(columns), offset=offset)
    return vm.fit(vm.TaskModel(net, likelihood, prior, **options), tasks)


def same(formula: str, hand: vm.Fit, frame: pd.DataFrame, **options: Any) -> vm.Fit:
    tasks, model = vm.from_formula(formula, frame, **options)
    fit = vm.fit(model, tasks)
    assert fit.loss == pytest.approx(hand.loss, abs=1e-6)
    torch.testing.assert_close(
        torch.tensor(sorted(fit.prior._sd.tolist())),
        torch.tensor(sorted(hand.prior._sd.tolist())),
        rtol=1e-4,
        atol=0,
    )
    return fit


FULL = vm.GaussianPrior(learn_precision="full")
EACH = vm.GaussianPrior(learn_precision="per_parameter")


def test_a_factor_an_interaction_and_a_correlated_slope() -> None:
    frame = table()
    columns = {
        "x": frame["x"],
        "b": frame["arm"] == "b",
        "c": frame["arm"] == "c",
        "xb": frame["x"] * (frame["arm"] == "b"),
        "xc": frame["x"] * (frame["arm"] == "c"),
    }
    hand = by_hand(frame, columns, FULL, shared=["b", "c", "xb", "xc"])
    fit = same("y ~ x * arm + (x | g)", hand, frame)
    assert fit.prior.labels == ("Intercept", "x")
    assert list(fit.prior.shared) == ["arm[b]", "arm[c]", "x:arm[b]", "x:arm[c]"]
    assert float(fit.prior.shared["x:arm[c]"]) == pytest.approx(
        float(hand.prior.shared["xc"]), abs=1e-6
    )


def test_categories_keep_their_order() -> None:
    tasks, _ = vm.from_formula("y ~ dose + (1 | g)", table())
    assert tasks.x_names == ("dose[high]",)


def test_an_uncorrelated_slope_that_has_no_fixed_effect() -> None:
    frame = table()
    columns = {"x": frame["x"], "z": frame["z"]}
    prior = vm.GaussianPrior(learn_precision="per_parameter", learn_loc=["intercept", "x"])
    fit = same("y ~ x + (x + z || g)", by_hand(frame, columns, prior), frame)
    assert fit.prior.held == ("z",) and float(fit.prior.loc["z"]) == 0.0


def test_terms_of_one_group_are_independent() -> None:
    frame = table()
    prior = vm.GaussianPrior(learn_precision="full", blocks=[["intercept", "x"], ["z"]])
    hand = by_hand(frame, {"x": frame["x"], "z": frame["z"]}, prior)
    fit = same("y ~ x + z + (x | g) + (0 + z | g)", hand, frame)
    correlation = fit.prior.correlation
    assert float(correlation[0, 2]) == float(correlation[1, 2]) == 0.0
    assert float(correlation[0, 1]) != 0.0


def test_a_factor_that_varies_apart_from_the_intercept() -> None:
    """`(arm || g)` is an intercept, and beside it all levels with a covariance, as in lme4."""
    _, model = vm.from_formula("y ~ arm + (arm || g)", table())
    assert model.prior.blocks == (("Intercept",), ("arm[a]", "arm[b]", "arm[c]"))
    assert tuple(model.weights.fixed) == ("arm[a]",)


def test_levels_that_vary_beside_their_fixed_effects() -> None:
    """theta0 of the levels themselves is the same model; the columns of this one are collinear."""
    frame = table()
    levels = {level: (frame["arm"] == level) * 1.0 for level in "abc"}
    made = frame[["g", "y"]].assign(**levels)
    tasks = vm.TaskSet.from_frame(made, task="g", x=list(levels), y="y")
    net = vm.LinearPredictor(list(levels), intercept=False)
    model = vm.TaskModel(net, vm.likelihoods.Gaussian(), FULL)
    ours = vm.from_formula("y ~ arm + (0 + arm | g)", frame)
    for options in ({}, {"hyperguide": "reml"}):
        hand, fit = vm.fit(model, tasks, **options), vm.fit(ours[1], ours[0], **options)  # type: ignore[arg-type]
        assert fit.loss == pytest.approx(hand.loss, abs=1e-8)
        assert "in closed form" in fit.stop
        both = fit.prior.loc | fit.prior.shared
        for level in "bc":
            mean = float(both["Intercept"] + both[f"arm[{level}]"])
            assert mean == pytest.approx(float(hand.prior.loc[level]), abs=1e-5)


def test_an_offset_and_counts() -> None:
    frame = table()
    columns = {"x": frame["x"], "log_z": np.log(frame["z"])}
    hand = by_hand(
        frame,
        columns,
        EACH,
        response="count",
        likelihood=vm.likelihoods.Poisson(),
        shared=["x"],
        offset="log_z",
    )
    poisson = vm.likelihoods.Poisson()
    same("count ~ x + offset(log(z)) + (1 | g)", hand, frame, likelihood=poisson)


def test_proportions_and_answers() -> None:
    frame = table()
    binomial, bernoulli = vm.likelihoods.Binomial(), vm.likelihoods.Bernoulli()
    hand = by_hand(
        frame,
        {"x": frame["x"]},
        EACH,
        response=["hits", "trials"],
        likelihood=binomial,
        shared=["x"],
    )
    same("proportion(hits, trials) ~ x + (1 | g)", hand, frame, likelihood=binomial)
    frame["yes"] = (frame["answer"] == "yes") * 1
    hand = by_hand(
        frame, {"x": frame["x"]}, EACH, response="yes", likelihood=bernoulli, shared=["x"]
    )
    same("answer['yes'] ~ x + (1 | g)", hand, frame, likelihood=bernoulli)


def test_weights_are_precisions_of_a_gaussian_and_frequencies_of_counts() -> None:
    frame = table()
    likelihood = vm.likelihoods.Weighted(vm.likelihoods.Gaussian(), precision=True)
    hand = by_hand(frame, {"x": frame["x"]}, FULL, response=["y", "w"], likelihood=likelihood)
    same("y ~ x + (x | g)", hand, frame, weights="w")
    _, model = vm.from_formula(
        "count ~ x + (1 | g)", frame, weights="w", likelihood=vm.likelihoods.Poisson()
    )
    assert repr(model.likelihood) == "Weighted(Poisson())"


def shifted(column: pd.Series) -> pd.Series:
    return column + 1.0


def test_functions_of_the_caller_and_names_with_dots() -> None:
    frame, knots = table(), np.array([1.5, 2.5])
    tasks, model = vm.from_formula(
        "log(cost) ~ shifted(z) + np.sqrt(z) + bs(x, knots=knots, degree=2) + (1 | g)", frame
    )
    assert len(knots) == 2
    assert tasks.x_names is not None and tasks.x_names[:2] == ("shifted(z)", "np.sqrt(z)")
    fit = vm.fit(model, tasks)
    assert "np.sqrt(z)" in str(fit.prior) and "np_sqrt(z)" in fit.prior.shared


def test_a_group_of_two_columns() -> None:
    frame = table()
    tasks, _ = vm.from_formula("y ~ x + (1 | g:dose)", frame)
    first = frame.iloc[0]
    assert len(tasks) == len(frame[["g", "dose"]].drop_duplicates())
    assert tasks.names[0] == f"{first['g']}:{first['dose']}"


def test_names_that_look_like_patterns_are_shared_alone() -> None:
    _, model = vm.from_formula("y ~ I(x * 2) + (I(x * 3 + z * 2) | g)", table())
    assert model.shared == ("I(x * 2)",)


def test_hyperpriors_are_named_as_the_formula_names() -> None:
    normal = dist.Normal(0.0, 10.0)
    _, model = vm.from_formula(
        "y ~ np.log(z) + (np.log(z) | g)",
        table(),
        loc_hyperprior={"Intercept": normal, "np.log(z)": normal},
        scale_hyperprior=dist.HalfNormal(1.0),
        lkj=2.0,
    )
    assert set(model.prior.loc_hyperprior) == {"Intercept", "np_log(z)"}
    assert model.prior.lkj == 2.0


def test_a_noise_of_each_groups_own_is_independent_of_the_slopes() -> None:
    _, model = vm.from_formula(
        "y ~ x + (x | g)", table(), likelihood=vm.likelihoods.Gaussian(per_task=True)
    )
    assert model.prior.blocks == (("Intercept", "x"),) and model.weights.size == 3


# -- other tables ----------------------------------------------------------------------------------


def test_another_table_goes_through_the_same_design() -> None:
    frame = table()
    formula = "y ~ scale(z) + bs(x, df=5) + arm * dose + C(trials) + (center(x) | g)"
    tasks, model = vm.from_formula(formula, frame)
    some = frame[frame["g"].isin(["g3", "g4"])]  # whose means, knots and levels are others
    again = model.tasks(some)
    assert again.names == ("g3", "g4") and again.x_names == tasks.x_names
    for name in again.names:
        mine, theirs = again[name].support, tasks[name].support
        assert mine is not None and theirs is not None
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    assert model.formula == formula
    x = model.x(some.drop(columns=["y", "g"]))  # needs neither response nor groups
    first, second = (again[name].support for name in again.names)
    assert first is not None and second is not None
    torch.testing.assert_close(x, torch.cat([first[0], second[0]]))


def test_new_groups_are_adapted_to_and_judged() -> None:
    frame = table()
    frame["held"] = np.arange(len(frame)) % 3 == 0
    known, new = frame[:144], frame[144:]
    tasks, model = vm.from_formula("y ~ x + arm + (x | g)", known)
    fit = vm.fit(model, tasks)
    scores = fit.adapt(model.tasks(new, query="held")).score()
    assert len(scores) == 4 + 1 and bool((scores["rmse"] < 2.0).all())
    predicted = fit.posterior().predict(model.x(new[:2]), 10)
    assert predicted.samples.shape == (10, 16, 2)


def test_query_rows_are_marked_by_a_column() -> None:
    frame = table().assign(held=lambda d: d.index % 2)
    tasks, _ = vm.from_formula("y ~ x + (x | g)", frame, query="held")
    assert len(tasks.query_rows.x) == len(frame) // 2


def test_levels_that_were_not_there_are_refused_by_name() -> None:
    _, model = vm.from_formula("y ~ arm + (1 | g)", table())
    with pytest.raises(ValueError, match=r"The levels \(placebo\) in 'arm'.*leave its rows out"):
        model.tasks(table().assign(arm="placebo"))


def test_columns_that_a_new_table_lacks_are_named() -> None:
    _, model = vm.from_formula("y ~ x + arm + (1 | g)", table())
    with pytest.raises(ValueError, match="the table has no column 'x'"):
        model.x(table().drop(columns="x"))
    with pytest.raises(ValueError, match="the table has no column 'g'"):
        model.tasks(table().drop(columns="g"))


def test_missing_values_are_counted_and_refused_or_dropped() -> None:
    frame = table()
    frame.loc[[5, 7], "x"] = np.nan
    frame.loc[9, "arm"] = None
    formula = "y ~ x + arm + (1 | g)"
    with pytest.raises(
        ValueError, match="3 rows of 180 lack a value of x or arm, first row 5: missing='drop'"
    ):
        vm.from_formula(formula, frame)
    with pytest.warns(RuntimeWarning, match="left out: 3 rows of 180 .* first row 5$"):
        tasks, model = vm.from_formula(formula, frame, missing="drop")
    assert len(tasks.support_rows.x) == 177
    with pytest.warns(RuntimeWarning, match="left out: 3 rows of 180"):
        assert len(model.tasks(frame).support_rows.x) == 177
    # predictions stand row by row, so that none may go
    with pytest.raises(ValueError, match=r"3 rows of 180 lack .*: drop them with frame.dropna"):
        model.x(frame)
    # of a column that is not used nothing is said
    assert len(vm.from_formula("y ~ z + (1 | g)", frame)[0].support_rows.x) == 180


def test_numbers_that_are_text_are_told() -> None:
    frame = table()
    frame["text"] = frame["trials"].astype(str) + ".5"  # four levels, as codes may be
    vm.from_formula("y ~ text + (1 | g)", frame)
    frame["text"] = (frame["z"] * 10).round().astype(str)
    with pytest.warns(RuntimeWarning, match="'text' is text, and so a factor of 21 levels"):
        vm.from_formula("y ~ text + (1 | g)", frame)
    with pytest.raises(TypeError, match=r"'text' in 'log\(text\)' holds text.*pandas.to_numeric"):
        vm.from_formula("y ~ log(text) + (1 | g)", frame)
    with pytest.raises(ValueError, match=r"a power is written \*\*"):
        vm.from_formula("y ~ I(x^2) + (1 | g)", frame)


def test_groups_that_lack_all_are_named() -> None:
    frame = table()
    frame.loc[frame["g"].isin(["g3", "g11"]), "x"] = np.nan
    formula, lost = "y ~ x + (1 | g)", r"18 rows .* among them all rows of 2 groups \(g11, g3\)"
    with pytest.raises(ValueError, match=lost):
        vm.from_formula(formula, frame)
    with pytest.warns(RuntimeWarning, match=lost):
        tasks, model = vm.from_formula(formula, frame, missing="drop")
    assert len(tasks) == 18
    with pytest.raises(ValueError, match="9 rows of 9 lack a value of x.*: no others are left"):
        model.tasks(frame[frame["g"] == "g3"])


def test_a_fit_is_kept_and_read(tmp_path: Path) -> None:
    tasks, model = vm.from_formula("log_radon ~ floor + (floor | county)", radon())
    fit = vm.fit(model, tasks)
    fit.save(tmp_path / "radon.fit")
    again = vm.load(tmp_path / "radon.fit", vm.from_formula(model.formula, radon())[1])
    assert again.prior.labels == fit.prior.labels and again.loss == fit.loss


@pytest.mark.parametrize(
    ("formula", "other", "match"),
    [
        ("y ~ center(x) + (1 | g)", None, r"made 'center\(x\)' = .* but makes .* now: means"),
        ("y ~ scale(x) + (scale(x) | g)", None, r"made 'scale\(x\)'"),
        ("y ~ bs(x, df=4) + (1 | g)", None, "made 'bs"),
        ("center(y) ~ x + (1 | g)", None, r"made 'center\(y\)'"),
        ("y ~ x + (1 | g)", "np.exp(y) ~ x + (1 | g)", "response was 'y', but is"),
        ("y ~ double(x) + (1 | g)", None, r"made 'double\(x\)'"),
    ],
)
def test_a_file_refuses_another_reading(
    formula: str, other: str | None, match: str, tmp_path: Path
) -> None:
    def double(x: np.ndarray) -> np.ndarray:
        return 2.0 * x

    frame = table()
    tasks, model = vm.from_formula(formula, frame)
    fit = vm.fit(model, tasks)
    fit.save(tmp_path / "whole.fit")
    fit.save(tmp_path / "bare.fit", data=False)
    same = vm.from_formula(formula, frame.sample(frac=1.0, random_state=0))[1]
    assert vm.load(tmp_path / "whole.fit", same).loss == fit.loss

    def double(x: np.ndarray) -> np.ndarray:  # type: ignore[no-redef]  # noqa: F811
        return 2.1 * x

    part = frame[frame["y"] > frame["y"].quantile(0.3)]
    changed = vm.from_formula(formula if other is None else other, part)[1]
    for name in ("whole.fit", "bare.fit"):
        with pytest.raises(ValueError, match=match):
            vm.load(tmp_path / name, changed)


def test_a_formula_without_means_is_read_with_any_table(tmp_path: Path) -> None:
    frame = table()
    tasks, model = vm.from_formula("y ~ np.log(z) + arm + (x | g)", frame)
    fit = vm.fit(model, tasks)
    fit.save(tmp_path / "a.fit")
    other = vm.from_formula(model.formula, frame[60:])[1]
    assert vm.load(tmp_path / "a.fit", other).loss == fit.loss


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formula", "error", "match"),
    [
        (3, TypeError, "a formula is a text"),
        ("y", ValueError, "no formula with a response"),
        ("~ x + (1 | g)", ValueError, "no formula with a response"),
        ("y ~ x", ValueError, "has no term that varies"),
        ("y ~ x + 1 | g", ValueError, "write each as"),
        ("y ~ x:(1 | g)", ValueError, "write each as"),
        ("y ~ x + (1 | g | h)", ValueError, "write each as"),
        ("y ~ x - (1 | g)", ValueError, "leave it out instead"),
        ("y ~ x + (1 | g) + (1 | arm)", ValueError, r"g, arm, which are crossed.*lme4"),
        ("y ~ x + (1 | g/arm)", ValueError, "g, arm:g, which are nested.*one, the tasks"),
        ("y ~ x + (1 | g) + (1 | g:arm)", ValueError, "g, arm:g, which are nested"),
        ("y ~ x + (1 | g + arm)", ValueError, "g, arm, which are crossed"),
        ("y ~ x + (1 | factor(g))", ValueError, "make a column of them first"),
        ("y ~ x + (1 | school)", ValueError, "the table has no column 'school'"),
        ("y ~ x + (x | g) + (1 | g)", ValueError, "'Intercept' varies in several terms"),
        ("y ~ arms + (1 | g)", ValueError, "'arms' in .* is neither .*; did you mean 'arm'"),
        ("y ~ sine(x) + (1 | g)", ValueError, "'sine' in 'sine.x.' is neither a column nor"),
        ("y ~ x + I(2 * x) + (1 | g)", ValueError, r"\['I\(2 \* x\)'\] .* follow from those"),
        ("y ~ x ^ 2 + (1 | g)", ValueError, "cannot be read"),
        ("arm ~ x + (1 | g)", ValueError, r"name the level that counts as 1, such as arm\['a'\]"),
        ("y + x ~ z + (1 | g)", ValueError, "is 2 columns: write one"),
        ("y ~ y + (1 | g)", ValueError, "is among x and among y"),
        ("y ~ log(x - 100) + (1 | g)", ValueError, "column 'log.x - 100.' is missing"),
        ("y ~ day + (1 | g)", TypeError, "column 'day' holds dates or times"),
        ("day ~ x + (1 | g)", TypeError, "column 'day' holds dates or times"),
        ("y ~ x + (0 | g)", ValueError, "has no term that varies"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_no_formula(formula: Any, error: type[Exception], match: str) -> None:
    frame = table().assign(day=pd.Timestamp("2024-01-01"))
    with pytest.raises(error, match=match):
        vm.from_formula(formula, frame)


def test_what_is_no_table() -> None:
    with pytest.raises(TypeError, match="expected a pandas DataFrame, got list"):
        vm.from_formula("y ~ x + (1 | g)", [1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the table has no rows"):
        vm.from_formula("y ~ x + (1 | g)", table()[:0])
    with pytest.raises(ValueError, match="missing must be one of"):
        vm.from_formula("y ~ x + (1 | g)", table(), missing="keep")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no column 'precision'"):
        vm.from_formula("y ~ x + (1 | g)", table(), weights="precision")
    with pytest.raises(ValueError, match="several columns called 'x'"):
        vm.from_formula("y ~ x + (1 | g)", pd.concat([table(), table()[["x"]]], axis=1))
