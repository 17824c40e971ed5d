"""Which models are special cases of which others, by how they are built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import varmeta as vm
from tests.model_fits import lines, only
from varmeta.results.nested import Nested, nested, other_fixed_effects

TASKS = lines(6)


@dataclass(frozen=True)
class Built:
    """What of a fit nestedness looks at: nothing is fitted."""

    model: vm.TaskModel
    tasks: vm.TaskSet
    eta: dict[str, torch.Tensor] = field(default_factory=dict)


def built(
    columns: str = "ab",
    learn: Any = "full",
    shared: str = "",
    likelihood: Any = None,
    net: Any = None,
    tasks: vm.TaskSet = TASKS,
    **prior: Any,
) -> Any:
    net = vm.LinearPredictor(list(columns)) if net is None else net
    chosen = vm.GaussianPrior(learn_precision=learn, **prior)
    noise = vm.likelihoods.Gaussian() if likelihood is None else likelihood
    model = vm.TaskModel(net, noise, chosen, list(shared))
    return Built(model, only(tasks, *columns), model.init(torch.zeros(())))


Z = {"covariates": {"intercept": ["z"]}}
HELD = {"learn_loc": ["intercept", "a"], "loc": {"b": 0.0}}
# the smaller, the larger, and how many variances are 0 in the smaller
NESTED = {
    "a column": (built("a"), built("ab", shared="b"), 0),
    "a column, and its variance": (built("a"), built("ab"), 1),
    "columns in another order": (built("ba", shared="b"), built("ab"), 1),
    "a variance": (built(shared="b"), built(), 1),
    "two variances": (built(shared="ab"), built(), 2),
    "two variances of one size": (
        built(learn="per_module", shared="ab"), built(learn="per_parameter"), 2
    ),
    "correlations": (built(learn="per_parameter"), built(), 0),
    "equal sds": (built(learn="shared"), built(learn="per_parameter"), 0),
    "equal sds, uncorrelated": (built(learn="shared"), built(), 0),
    "one weight": (built(shared="ab"), built(learn="per_parameter", shared="b"), 1),
    "a given sd": (built(learn=None, precision=2.0), built(learn="shared"), 0),
    "given sds": (
        built(learn=None, precision={"intercept": 2.0, "a": 1.0, "b": 1.0}),
        built(learn="per_parameter"), 0,
    ),
    "a given covariance": (built(learn=None, covariance=torch.eye(3)), built(), 0),
    "theta0 held": (built(**HELD), built(), 0),
    "a column, held at 0": (built("a"), built(**HELD), 1),
    "a feature": (built(), built(**Z), 0),
    "a given noise": (built(likelihood=vm.likelihoods.Gaussian(0.5, False)), built(), 0),
    "another start of the noise": (built("a", likelihood=vm.likelihoods.Gaussian(0.5)), built(), 1),
    "low rank": (built(learn="low_rank", rank=1), built(), 0),
    "blocks": (built(blocks=[["intercept", "a"]]), built(), 0),
    "within a block": (built("a"), built(blocks=[["intercept", "a"]]), 1),
    "uncorrelated": (built(learn="per_parameter"), built(blocks=[["a", "b"]]), 0),
    "an intercept of another name": (
        built(net=vm.LinearPredictor(["a", "b"], "Intercept"), shared="b"),
        built(net=vm.LinearPredictor(["a", "b"], "Intercept")), 1,
    ),
    "a network's": (
        built(net=nn.Linear(2, 1), learn="per_parameter"), built(net=nn.Linear(2, 1)), 0
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NESTED)
def test_a_special_case_is_known_one_way(case: str) -> None:
    small, large, variances = NESTED[case]
    how = nested(small, large)
    assert isinstance(how, Nested) and how.is_regular, how
    assert how.variances == variances and bool(how.zero) == bool(variances)
    assert isinstance(nested(large, small), str)


def test_directions_are_nested_and_not_regular() -> None:
    flat, tilted = built(learn="per_parameter"), built(learn="low_rank", rank=1)
    how = nested(flat, tilted)
    assert isinstance(how, Nested) and not how.is_regular
    assert "too few" in str(nested(built(), tilted))


moved = lines(6)
moved.support_rows.x[:, 0] += 1.0
NOT = {
    "another column": (built("a"), built("b"), r"\['a'\] is in the smaller only"),
    "columns moved": (built("a", tasks=moved), built(), "the column 'a' differs"),
    "a variance more": (
        built("ab", "per_parameter", "a"), built("ab", shared="b"), r"\['b'\] varies in the smaller"
    ),
    "correlated": (built("a"), built(learn="per_parameter"), "correlated in the smaller only"),
    "correlated, in blocks": (
        built("a"), built(blocks=[["a", "b"]]), "in other blocks of the larger"
    ),
    "other blocks": (
        built(blocks=[["intercept", "a"]]), built(blocks=[["a", "b"]]), "in other blocks"
    ),
    "a group of variances": (
        built(learn="shared", shared="b"), built(learn="shared"), "the variance of other weights"
    ),
    "several precisions": (
        built(learn="per_parameter"), built(learn="shared"), "one precision in the larger"
    ),
    "a given variance": (
        built(learn=None, shared="b"), built(learn=None), r"variance of \['b'\] is given"
    ),
    "other given precisions": (
        built(learn=None), built(learn=None, precision=2.0), "not the smaller's"
    ),
    "held elsewhere": (
        built("a"), built(learn_loc=["intercept", "a"], loc={"b": 1.0}), "'b' is held"
    ),
    "another likelihood": (
        built("a", likelihood=vm.likelihoods.StudentT()), built(), "their likelihoods are StudentT"
    ),
    "another shape of the noise": (
        built("a", likelihood=vm.likelihoods.StudentT(3.0)),
        built(likelihood=vm.likelihoods.StudentT(5.0)), "their likelihoods",
    ),
    "a noise of each task": (
        built(), built(likelihood=vm.likelihoods.Gaussian(per_task=True)), "their likelihoods"
    ),
    "another network": (
        built(net=nn.Linear(2, 1)), built(net=nn.Sequential(nn.Linear(2, 1))), "one structure"
    ),
    "another intercept": (
        built("a"), built(net=vm.LinearPredictor(["a", "b"], intercept=False)), "intercept"
    ),
    "an offset": (
        built("a"), built(net=vm.LinearPredictor(["a", "b"], offset="b")), "offsets"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT)
def test_what_is_no_special_case_says_why(case: str) -> None:
    small, large, why = NOT[case]
    found = nested(small, large)
    assert isinstance(found, str)
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(found)


def test_programs_are_one_only_where_they_are_the_same_function() -> None:
    def program(params: Any, x: Any, y: Any) -> Any:
        raise NotImplementedError

    def made(run: Any, learn: str) -> Any:
        prior = vm.GaussianPrior(learn_precision=learn)  # type: ignore[arg-type]
        model = vm.TaskModel.from_pyro(run, {"level": (), "slope": ()}, prior)
        return Built(model, TASKS, model.init(torch.zeros(())))

    assert nested(made(program, "shared"), made(program, "per_parameter")) == Nested()
    other = made(lambda params, x, y: None, "per_parameter")
    assert "are code" in str(nested(made(program, "shared"), other))


def test_fixed_effects_are_the_same_whatever_varies() -> None:
    assert other_fixed_effects(built(shared="ab"), built(learn="shared")) is None
    assert "'b'" in str(other_fixed_effects(built(), built("a")))
    assert "'b'" in str(other_fixed_effects(built("a"), built()))
    assert "estimated" in str(other_fixed_effects(built(), built(**HELD)))
