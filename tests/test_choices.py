"""What a signature lets one choose by name is what the check at run time accepts."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

import varmeta as vm
from varmeta.fitting.compiled_step import Compile, check_compile
from varmeta.fitting.schedule import DECAYS, ScheduleName, decay_of
from varmeta.fitting.validation import Metric
from varmeta.guides.laplace import HessianName
from varmeta.guides.make import GUIDES, GuideName, make_guide
from varmeta.hyper.integrate import check_hyperguide
from varmeta.landscape.landscape import AnchoredOuter, Route
from varmeta.models.check_net import BatchNorm, check_net
from varmeta.models.hyper_posterior import Hyperguide
from varmeta.numerics.learning_rates import Per
from varmeta.posteriors.calibration import ErrorKind, calibration_error
from varmeta.priors.check import LearnPrecision
from varmeta.strategies.alg import Estimator
from varmeta.strategies.expectation import ExpectationName, make_expectation
from varmeta.strategies.objective import OuterName, check_outer
from varmeta.strategies.strategy import OnUnconverged
from varmeta.tasks.formula_design import Missing

ROOT = Path(vm.__file__).parent
RADON = vm.datasets.radon(as_frame=True)
LINE = vm.datasets.lines(4, num_support=5, dtype=torch.float64)
MODEL = vm.TaskModel(
    vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian(), vm.GaussianPrior(learn_precision="shared")
)


def hyperguide(name: Any) -> None:
    strategy = vm.Joint("multivariate_normal")
    check_hyperguide(name, strategy.problem(MODEL, LINE, 0), LINE, strategy, True)


# for every alias, who is given such a name and refuses any other
CHOICES: dict[str, tuple[Any, Callable[[Any], object]]] = {
    "outer": (OuterName, check_outer),
    "guide": (GuideName, make_guide),
    "expectation": (ExpectationName, lambda name: make_expectation(name, 1, 2, True, True)),
    "on_unconverged": (OnUnconverged, lambda name: vm.Implicit(on_unconverged=name)),
    "estimator": (Estimator, lambda name: vm.StochasticAlg(temperature=1.0, estimator=name)),
    "hessian": (HessianName, vm.guides.Laplace),
    "metric": (
        Metric,
        lambda name: vm.Validation(vm.datasets.lines(2, num_query=2), name),
    ),
    "learn_precision": (LearnPrecision, lambda name: vm.GaussianPrior(learn_precision=name)),
    "batch_norm": (BatchNorm, lambda name: check_net(torch.nn.Linear(1, 1), name)),
    "hyperguide": (Hyperguide, hyperguide),
    "schedule": (ScheduleName, decay_of),
    "compile": (Compile, check_compile),
    "per": (Per, lambda name: vm.LearnedRates(per=name)),
    "kind": (ErrorKind, lambda name: calibration_error(torch.rand(9, 3), torch.rand(3), kind=name)),
    "split": (vm.datasets.shipped.Split, vm.datasets.gapminder),
    "missing": (
        Missing,
        lambda name: vm.from_formula("log_radon ~ 1 + (1 | county)", RADON, missing=name),
    ),
    "route": (Route, lambda name: vm.Landscape.of(torch.cos).derivative(0.5, name)),
    "outer of a landscape": (
        AnchoredOuter,
        lambda name: vm.Landscape.of(torch.cos).gradient(0.5, name),
    ),
}
# said by our own code only, nowhere checked
INTERNAL = {"RowOuter", "Kind", "Criterion"}


@pytest.mark.parametrize("what", CHOICES)
def test_what_is_offered_is_accepted_and_nothing_else(what: str) -> None:
    alias, take = CHOICES[what]
    for name in get_args(alias):
        take(name)
    with pytest.raises(ValueError, match="'nonsense'") as refused:
        take("nonsense")
    said = re.findall(r"'([^']+)'|(True|False)", str(refused.value))
    offered = [str(name) for name in get_args(alias)]
    named = [quoted or word for quoted, word in said if quoted != "nonsense"]
    assert named == offered


def test_tables_by_name_hold_what_is_offered() -> None:
    assert {name: made().name for name, made in GUIDES.items()} == {
        name: name for name in get_args(GuideName)
    }
    assert tuple(DECAYS) == get_args(ScheduleName)


def aliases() -> dict[str, Any]:
    """Every name of the package that stands for a Literal."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.value, ast.Subscript)
                and ast.unparse(node.value.value) == "Literal"
            ):
                parts = path.relative_to(ROOT.parent).with_suffix("").parts
                (target,) = node.targets
                name = ast.unparse(target)
                found[name] = getattr(importlib.import_module(".".join(parts)), name)
    return found


def test_every_alias_is_tried_here() -> None:
    tried = [alias for alias, _ in CHOICES.values()]
    assert {name for name, alias in aliases().items() if alias not in tried} == INTERNAL


@pytest.mark.parametrize(
    ("made", "name", "alias"),
    [
        (vm.Joint, "guide", GuideName),
        (vm.Implicit, "guide", GuideName),
        (vm.Implicit, "outer", OuterName),
        (vm.Unrolled, "outer", OuterName),
        (vm.Implicit, "expectation", ExpectationName),
        (vm.Implicit, "on_unconverged", OnUnconverged),
        (vm.Traits, "on_unconverged", OnUnconverged),
        (vm.StochasticAlg, "estimator", Estimator),
        (vm.guides.Laplace, "hessian", HessianName),
        (vm.GaussianPrior.__init__, "learn_precision", LearnPrecision),
        (vm.TaskModel.__init__, "batch_norm", BatchNorm),
        (vm.fit, "hyperguide", Hyperguide),
        (vm.fit, "schedule", ScheduleName),
        (vm.fit, "compile", Compile),
        (vm.meta_gradient, "compile", Compile),
        (vm.compare, "compile", Compile),
        (vm.Fit.adapt, "compile", Compile),
        (vm.Landscape.derivative, "route", Route),
        (vm.Landscape.gradient, "outer", AnchoredOuter),
    ],
)
def test_signatures_say_it(made: Any, name: str, alias: Any) -> None:
    hint = get_type_hints(made)[name]
    assert hint == alias or alias in get_args(hint)
