"""The iMAML meta-gradient by the code of its paper (Rajeswaran et al. 2019), where `implicit_maml`
can be imported.

It is no package: clone https://github.com/aravindr93/imaml_dev and put the clone on PYTHONPATH.
"""

from __future__ import annotations

import numpy as np
import torch

from experiments.benchmarks.torch_module import each_task, misfit, network
from experiments.benchmarks.work import (
    CG_STEPS,
    INNER_STEPS,
    LR,
    PRECISION,
    Step,
    Unavailable,
    Work,
)

try:
    from implicit_maml.learner_model import Learner
    from implicit_maml.utils import cg_solve
except ImportError as error:
    raise Unavailable("not installed") from error


def imaml(work: Work) -> list[Step]:
    learner = Learner(network(work), lambda out, y: misfit(lambda _: out, out, y), inner_lr=LR)
    theta0 = learner.get_params()
    tasks = [{"x_train": x, "y_train": y, "x_val": u, "y_val": v} for x, y, u, v in each_task(work)]

    def run() -> tuple[float, np.ndarray]:
        total, gradient = 0.0, torch.zeros_like(theta0)
        for task in tasks:
            learner.set_params(theta0.clone())
            learner.learn_task(
                task, INNER_STEPS, add_regularization=True, w_0=theta0, lam=PRECISION
            )
            loss = learner.get_loss(task["x_val"], task["y_val"])
            found = torch.autograd.grad(loss, learner.model.parameters())
            b = torch.cat([g.reshape(-1) for g in found])
            # I + H / lambda: the solution is lambda (H + lambda I)^-1 b
            matrix = learner.matrix_evaluator(task, PRECISION, regu_coef=0.0, lam_damping=0.0)
            gradient = gradient + cg_solve(matrix, b, CG_STEPS)
            total += float(loss.detach())
        return total, gradient.numpy().astype(np.float64)

    return [Step(run, lambda found: found, way="its Learner, a loop over tasks")]
