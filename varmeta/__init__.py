"""Learn a prior over weights from many small data sets, and adapt it to new ones."""

from varmeta import datasets, guides, likelihoods, plot
from varmeta.display.versions import show_versions
from varmeta.files.version import __version__ as __version__
from varmeta.fitting.callback import StopFit
from varmeta.fitting.validation import Validation
from varmeta.group.processes import ProcessError, Processes, processes
from varmeta.landscape.landscape import Landscape
from varmeta.models.formula import FormulaModel, from_formula
from varmeta.models.learned_prior import LearnedPrior
from varmeta.models.linear_predictor import LinearPredictor
from varmeta.models.model import TaskModel
from varmeta.numerics.first_order import Adam, GradientDescent
from varmeta.numerics.learning_rates import LearnedRates
from varmeta.numerics.linear_solve import CG, Direct, LinearSolver, Neumann
from varmeta.numerics.minimize import FirstOrderMinimizer, Minimizer
from varmeta.numerics.newton import NewtonCG
from varmeta.numerics.solution import Result, Solution
from varmeta.posteriors.accuracy import Accuracy
from varmeta.posteriors.posterior import Posterior
from varmeta.posteriors.prediction import Prediction
from varmeta.priors.gaussian_prior import GaussianPrior
from varmeta.results.checkpoints import Checkpoints
from varmeta.results.load import load
from varmeta.results.result import Fit
from varmeta.strategies.alg import StochasticAlg
from varmeta.strategies.certificate import Certificate
from varmeta.strategies.closed_form import ClosedForm
from varmeta.strategies.implicit import Implicit
from varmeta.strategies.joint import Joint
from varmeta.strategies.prototypes import Prototypes
from varmeta.strategies.reinit import Reinit
from varmeta.strategies.stochastic import Stochastic
from varmeta.strategies.strategy import State, Stats, Strategy, Traits
from varmeta.strategies.unrolled import FirstOrder, Reptile, Unrolled
from varmeta.tasks import Task, TaskSet
from varmeta.tasks.episodes import Episodes, episodes
from varmeta.tasks.parts import Parts
from varmeta.verbs.compare import compare
from varmeta.verbs.compare_models import compare_models
from varmeta.verbs.fit import fit
from varmeta.verbs.meta_gradient import MetaGradient, meta_gradient
from varmeta.verbs.model_comparison import ModelComparison
from varmeta.verbs.reachability import Reachability, reachability
from varmeta.verbs.report import Report
from varmeta.verbs.sigterm import sigterm_ends_fit

__all__ = [
    # data
    "Task", "TaskSet", "Parts", "episodes", "Episodes", "datasets",
    # model
    "TaskModel", "LinearPredictor", "GaussianPrior", "likelihoods", "from_formula", "FormulaModel",
    # strategies and their parts
    "Joint", "Reinit", "Implicit", "Unrolled", "FirstOrder", "Reptile", "Prototypes", "Stochastic",
    "GradientDescent", "LearnedRates", "Adam", "NewtonCG", "ClosedForm", "CG", "Neumann", "Direct",
    "StochasticAlg", "guides",
    # what strategies, minimisers and solvers of your own are made of (docs/extend.md)
    "Strategy", "Traits", "State", "Stats", "Minimizer", "FirstOrderMinimizer", "LinearSolver",
    "Solution", "Result",
    # verbs and what they return
    "fit", "Validation", "StopFit", "Checkpoints", "sigterm_ends_fit", "Fit", "LearnedPrior",
    "load", "Posterior", "Prediction", "Accuracy",
    "meta_gradient", "MetaGradient", "Certificate", "compare", "Report",
    "compare_models", "ModelComparison",
    "reachability", "Reachability",
    # many processes that share the work
    "processes", "Processes", "ProcessError",
    # one scalar weight, seen whole
    "Landscape",
    # figures
    "plot",
    # for a bug report
    "show_versions",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__
