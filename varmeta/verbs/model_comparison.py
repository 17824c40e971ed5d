"""What a comparison of fitted models found: a table, and what must be known to read it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from varmeta._checks import counted
from varmeta.display.shown import Shown
from varmeta.results.fitted import Criteria, Fitted
from varmeta.results.left_out_differences import LeftOut
from varmeta.results.likelihood_ratio import Ratio

if TYPE_CHECKING:
    import pandas as pd

# Columns of numbers that one reads together, and how.
FORMATS = {
    "log_likelihood": "{:.3f}", "AIC": "{:.2f}", "BIC": "{:.2f}", "left_out": "{:.2f}",
    "difference": "{:.2f}", "std_error": "{:.2f}", "chi2": "{:.3f}", "df": "{:.0f}", "p": "{:.3g}",
}  # fmt: skip
COUNTS = ["fixed", "covariance", "noise"]
TEST = ["against", "chi2", "df", "p"]


@dataclass(frozen=True, repr=False)
class ModelComparison(Shown):
    """Fitted models side by side, those with fewer parameters first.

    table: one row per model, see `frame`.
    head: what was compared, in a line.  notes: what must be known to read the table, a sentence
        each.

    >>> import torch, varmeta as vm
    >>> tasks = vm.datasets.lines(9, noise=0.1, dtype=torch.float64)
    >>> def fitted(learned):
    ...     net, prior = vm.LinearPredictor(["x"]), vm.GaussianPrior(learn_precision=learned)
    ...     return vm.fit(vm.TaskModel(net, vm.likelihoods.Gaussian(), prior), tasks)
    >>> both = [fitted("shared"), fitted("full")]
    >>> vm.compare_models(*both, names=["shared", "full"], leave_one_task_out=False)
    <ModelComparison: shared, full>
    """

    table: pd.DataFrame
    head: str
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        fitted: Sequence[Fitted],
        criteria: Sequence[Criteria],
        tasks: Sequence[LeftOut],
        tests: Mapping[str, tuple[str, Ratio]],
        notes: Sequence[str],
    ) -> ModelComparison:
        """Of the parts that were found of each fit, in their order."""
        import pandas as pd

        none = "", Ratio(math.nan, 0, math.nan)
        rows = []
        for one, by, out in zip(fitted, criteria, tasks, strict=True):
            known, (against, test) = one.known, tests.get(one.name, none)
            rows.append(
                {
                    "criterion": known.criterion, "by": known.by,
                    "log_likelihood": known.value, "fixed": known.fixed,
                    "covariance": known.covariance, "noise": known.noise,
                    "AIC": by.aic, "BIC": by.bic, "left_out": out.total,
                    "difference": out.difference, "std_error": out.std_error,
                    "against": against, "chi2": test.chi2,
                    "df": float(test.df) if against else math.nan, "p": test.p,
                }
            )  # fmt: skip
        table = pd.DataFrame(rows, index=pd.Index([one.name for one in fitted], name="model"))
        table["best"] = _best(table)
        return cls(table, _head(fitted), tuple(notes))

    def frame(self) -> pd.DataFrame:
        """One row per model, NaN where a number is not defined.

        criterion, by: what was maximised ("ML", "REML", "penalised": with hyperpriors), and how the
            log likelihood is known ("closed form", "quadrature", or which approximation).
        log_likelihood: nats.
        fixed, covariance, noise: estimated parameters of the mean, of how tasks' weights vary, and
            of the likelihood.
        AIC, BIC: -2 log_likelihood plus 2, or the logarithm of the number of rows, for each
            parameter: smaller is better.
        left_out: log density of every task given the others, summed, nats: larger is better;
            difference: from the best; std_error: of the difference, by tasks.
        against, chi2, df, p: likelihood-ratio test against a smaller model, by its name.
        best: by which of AIC, BIC and left_out this model is the best.
        """
        return self.table.copy()

    def _headline(self) -> str:
        return "\n".join([self.head, *self.notes])

    def __str__(self) -> str:
        """The table in two parts, the models and the tests, and the notes."""
        shown = self.table.copy()
        for name, pattern in FORMATS.items():
            shown[name] = [pattern.format(v) if v == v else "" for v in shown[name]]
        shown.insert(0, "log likelihood", shown.pop("log_likelihood"))
        known = [name for name in FORMATS if name in shown and (shown[name] != "").any()]
        models = ["log likelihood", *COUNTS, *(n for n in known if n not in TEST), "best"]
        parts = [self.head, _lines(shown[models])]
        tested = shown[shown["against"] != ""]
        if len(tested):
            parts += ["likelihood ratio", _lines(tested[TEST])]
        return "\n".join([*parts, *self.notes])

    def __repr__(self) -> str:
        return f"<ModelComparison: {', '.join(map(str, self.table.index))}>"


def _best(table: pd.DataFrame) -> list[str]:
    """By which criteria each model is the best of those that have one."""
    said: dict[str, list[str]] = {name: [] for name in table.index}
    for name, sign in (("AIC", 1.0), ("BIC", 1.0), ("left_out", -1.0)):
        known = sign * table[name].dropna()
        if len(known) > 1:
            said[known.idxmin()].append(name.replace("_", " "))
    return [", ".join(said[name]) for name in table.index]


def _head(fitted: Sequence[Fitted]) -> str:
    tasks = fitted[0].fit.tasks
    size = counted(len(tasks.support_rows.x), "row")
    words = {
        "ML": "maximum likelihood",
        "REML": "restricted maximum likelihood (REML)",
        "penalised": "likelihood times hyperpriors",
    }
    criteria, ways = (
        list(dict.fromkeys(of))
        for of in ([words[one.known.criterion] for one in fitted], [one.known.by for one in fitted])
    )
    how = f"{' and '.join(criteria)} by {' and '.join(ways)}"
    return f"{len(fitted)} models of {size} in {counted(len(tasks), 'task')}: {how}"


def _lines(table: pd.DataFrame) -> str:
    """A table of text, without the spaces that pandas leaves at the ends of lines."""
    text: str = (
        table.rename_axis(None).rename(columns=lambda name: name.replace("_", " ")).to_string()
    )
    return "\n".join(line.rstrip() for line in text.splitlines())
