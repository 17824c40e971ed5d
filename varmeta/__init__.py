"""Learn a prior over weights from many small data sets, and adapt it to new ones."""

from varmeta import datasets, guides, likelihoods, plot
from varmeta._version import __version__ as __version__
from varmeta.bayes.model import TaskModel
from varmeta.bayes.prior import GaussianPrior
from varmeta.certificate import Certificate
from varmeta.compare import compare
from varmeta.fit import fit
from varmeta.implicit import Implicit
from varmeta.joint import Joint, Reinit
from varmeta.landscape import Landscape
from varmeta.learned_prior import LearnedPrior
from varmeta.linear_predictor import LinearPredictor
from varmeta.load import load
from varmeta.meta_gradient import MetaGradient, meta_gradient
from varmeta.numerics.linear_solve import CG, Direct, Neumann
from varmeta.numerics.minimize import Adam, GradientDescent
from varmeta.numerics.newton import NewtonCG
from varmeta.posterior import Posterior
from varmeta.prediction import Prediction
from varmeta.reachability import Reachability, reachability
from varmeta.report import Report
from varmeta.result import Fit
from varmeta.sigterm import sigterm_ends_fit
from varmeta.stochastic import StochasticAlg
from varmeta.tasks import Task, TaskSet
from varmeta.unrolled import FirstOrder, Reptile, Unrolled

__all__ = [
    # data
    "Task", "TaskSet", "datasets",
    # model
    "TaskModel", "LinearPredictor", "GaussianPrior", "likelihoods",
    # strategies and their parts
    "Joint", "Reinit", "Implicit", "Unrolled", "FirstOrder", "Reptile",
    "GradientDescent", "Adam", "NewtonCG", "CG", "Neumann", "Direct", "StochasticAlg", "guides",
    # verbs and what they return
    "fit", "sigterm_ends_fit", "Fit", "LearnedPrior", "load", "Posterior", "Prediction",
    "meta_gradient", "MetaGradient", "Certificate", "compare", "Report",
    "reachability", "Reachability",
    # one scalar weight, seen whole
    "Landscape",
    # figures
    "plot",
]  # fmt: skip
