"""What may not be compared is refused, with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import varmeta as vm
from tests.model_fits import DENSE, changed, lines, only, regression

Gaussian = vm.likelihoods.Gaussian


def one_more(tasks: vm.TaskSet) -> vm.Fit:
    zeros = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    new = vm.Task(zeros, name="new", features={"z": 0.0})
    return regression(vm.TaskSet([*tasks, new], x_names=tasks.x_names))


def two_responses(tasks: vm.TaskSet) -> vm.Fit:
    pairs = changed(tasks, lambda x, y: (x, torch.stack([y, y + x[:, 1]], 1)))
    prior = vm.GaussianPrior(learn_precision="per_parameter")
    return vm.fit(vm.TaskModel(nn.Linear(2, 2).double(), Gaussian(), prior), pairs)


def weighted(tasks: vm.TaskSet) -> vm.Fit:
    ones = changed(tasks, lambda x, y: (x, torch.stack([y, torch.ones_like(y)], 1)))
    twice = vm.likelihoods.Weighted(Gaussian())
    return regression(ones, "shared", ("a", "b"), twice, vm.Implicit("quadrature"))


def unfinished(tasks: vm.TaskSet) -> vm.Fit:
    return vm.fit(regression(tasks).model, tasks, DENSE, num_steps=1)


def of_the_query(tasks: vm.TaskSet) -> vm.Fit:
    strategy = vm.Implicit("multivariate_normal", outer="query_predictive")
    return regression(tasks.split(4), strategy=strategy)


def as_targets(tasks: vm.TaskSet) -> vm.Fit:
    classes = changed(tasks, lambda x, y: (x, (y > 1).long()))
    likelihood = vm.likelihoods.LeastSquaresClasses(2, learn_temperature=False)
    prior = vm.GaussianPrior(learn_precision="shared")
    return vm.fit(vm.TaskModel(nn.Linear(2, 2).double(), likelihood, prior), classes, DENSE)


REFUSED: dict[str, tuple[Callable[[vm.TaskSet], vm.Fit], str]] = {
    "fewer tasks": (lambda t: regression(t[1:]), "task 't0' is in 'model 1' only"),
    "more tasks": (one_more, "task 'new' is in 'model 2' only"),
    "fewer rows": (
        lambda t: regression(changed(t, lambda x, y: (x[1:], y[1:]))),
        "'t0' has 8 rows in 'model 1' and 7 in 'model 2'.*missing predictor",
    ),
    "standardised": (
        lambda t: regression(t.standardized(Gaussian())[0]),
        "'t0' has other y, such as .* in 'model 1' and .* in 'model 2'.*standardise",
    ),
    "two responses": (two_responses, r"shape \(\) in 'model 1' and \(2,\) in 'model 2'"),
    "unfinished": (unfinished, "'model 2' cannot be compared: it has not converged"),
    "posterior of eta": (
        lambda t: regression(t, "shared", hyperguide="normal"),
        "'model 2' cannot be compared: it has integrated over eta.*'delta'",
    ),
    "query objective": (of_the_query, "judges rows that .* not fitted to"),
    "point": (
        lambda t: regression(t, None, precision=4.0, strategy=vm.Joint("delta")),
        "guide is a point.*multivariate_normal",
    ),
    "weights": (weighted, "power, which is no density"),
    "targets": (as_targets, "fits classes as targets"),
    "REML beside ML": (
        lambda t: regression(t, hyperguide="reml"),
        "'model 2' is fitted by REML and others are not",
    ),
    "a bound beside exact": (
        lambda t: regression(t, strategy=vm.Joint("normal")),
        r"'model 2' by negative ELBO \(normal\), 'model 1' exactly",
    ),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_a_fit_that_may_not_stand_beside_another(case: str) -> None:
    make, why = REFUSED[case]
    tasks = lines()
    with pytest.raises(ValueError, match=why):
        vm.compare_models(regression(tasks, "per_parameter"), make(tasks))


def test_reml_with_other_fixed_effects() -> None:
    tasks = lines()
    fits = [regression(some, hyperguide="reml") for some in (tasks, only(tasks, "a"))]
    with pytest.raises(ValueError, match="same fixed effects only, and here .*'b'"):
        vm.compare_models(*fits)


def test_a_density_beside_probabilities() -> None:
    tasks = changed(lines(), lambda x, y: (x, (3 + y).round().clamp(min=0).long()))
    gaussian = regression(tasks, "shared", ("a", "b"))
    poisson = regression(
        tasks, "shared", ("a", "b"), vm.likelihoods.Poisson(), vm.Implicit("quadrature")
    )
    with pytest.raises(ValueError, match="a density of real numbers stands beside probabilities"):
        vm.compare_models(gaussian, poisson)


def test_columns_of_y_that_are_weights_to_one_of_them() -> None:
    tasks = changed(lines(), lambda x, y: (x, torch.stack([y, 1 + x[:, 0].square()], 1)))
    weights = vm.likelihoods.Weighted(Gaussian(), precision=True)
    prior = vm.GaussianPrior(learn_precision="shared")
    responses = vm.TaskModel(nn.Linear(2, 2).double(), Gaussian(), prior)
    with pytest.raises(ValueError, match="read the columns of y as other things"):
        vm.compare_models(regression(tasks, likelihood=weights), vm.fit(responses, tasks, DENSE))


def test_bad_arguments() -> None:
    one = regression(lines(), "shared")
    with pytest.raises(ValueError, match="two fits or more, not 1"):
        vm.compare_models(one)
    with pytest.raises(TypeError, match="one by one.*not a tuple"):
        vm.compare_models((one, one))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="names must be a list"):
        vm.compare_models(one, one, names="ab")
    for names in (["a"], ["a", "a"]):
        with pytest.raises(ValueError, match="as many as the 2 fits, each another one"):
            vm.compare_models(one, one, names=names)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_stands_there_without_criteria() -> None:
    tasks = lines()
    ml, believed = regression(tasks), regression(tasks, scale_hyperprior=dist.HalfNormal(1.0))
    found = vm.compare_models(ml, believed, names=["flat", "believed"], leave_one_task_out=False)
    frame = found.frame()
    # the hyperprior's density is not in it
    assert 0 < frame.loc["flat", "log_likelihood"] - frame.loc["believed", "log_likelihood"] < 0.5
    assert frame["AIC"].isna().tolist() == [False, True] and frame["p"].isna().all()
    assert any("believed" in note and "hyperpriors" in note for note in found.notes)
    bounds = [regression(tasks, learn, strategy=vm.Joint("normal")) for learn in ("shared", "full")]
    frame = vm.compare_models(*bounds, leave_one_task_out=False).frame()
    assert frame[["AIC", "BIC", "p"]].isna().all(axis=None)
    assert frame["log_likelihood"].tolist() == [-fit.loss for fit in bounds]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_network_s_hidden_layers_have_no_criteria() -> None:
    tasks = lines()
    fits = []
    for width in (1, 2):
        net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1)).double()
        prior = vm.GaussianPrior(learn_precision="shared")
        model = vm.TaskModel(net, Gaussian(), prior, shared=["0.*"])
        fits.append(vm.fit(model, tasks, DENSE))
    found = vm.compare_models(*fits, leave_one_task_out=False)
    frame = found.frame()
    assert (frame["by"] == "closed form").all() and frame["AIC"].isna().all()
    assert any("hidden layers" in note for note in found.notes)
    assert (frame["against"] == "").all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_trials_have_no_bic() -> None:
    tasks = changed(
        lines(), lambda x, y: (x, torch.stack([(3 + y).round().clamp(0, 9), 9 + 0 * y], 1).long())
    )
    fits = [
        regression(some, "shared", shared, vm.likelihoods.Binomial(), vm.Implicit("quadrature"))
        for some, shared in ((only(tasks), ()), (only(tasks, "a"), ("a",)))
    ]
    found = vm.compare_models(*fits)
    assert found.frame()["BIC"].isna().all() and found.frame()["AIC"].notna().all()
    assert any(note.startswith("no BIC of model 1, model 2") for note in found.notes)
