"""The recursion of conjugate gradients, for every task at once.

Whoever solves a system (`linear_solve.py`) stops before a direction without positive curvature;
whoever looks for a way downhill (`newton.py`) goes along it, as the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from varmeta.graphs.capture import tracing
from varmeta.graphs.pieces import run
from varmeta.numerics.solution import Result

Product = Callable[[Tensor], Tensor]  # on rows, (tasks, size) -> (tasks, size)
Walk = dict[str, Tensor]


@dataclass(frozen=True)
class ConjugateStep:
    """The piece that is one step, with one product, on (A + damping) x = b; see `begin`.

    damping: in the step alone; the curvatures that are noted are A's.
    precondition: v -> M v, M near A^-1; a diagonal M may stand in the walk instead, "scales"
        squared.
    bounded: a direction without positive curvature is gone along, by the step for the absolute
        curvature, at most as far as "farthest" in all; and the residual is judged in M's norm.
    """

    damping: float = 0.0
    precondition: Product | None = None
    bounded: bool = False

    def __call__(self, product: Product, walk: Walk) -> Walk:
        x, r, p, rz, active = (walk[name] for name in ("x", "r", "p", "rz", "active"))
        ap = product(p)
        pap, pp = _dot(p, ap), _dot(p, p)
        finite = torch.isfinite(pap) & torch.isfinite(rz)
        # p' M^-1 p, by recursion because p is M-orthogonal to its past: in it bad scaling is not
        # mistaken for a flat direction
        metric = walk["metric"] if self._is_preconditioned(walk) else pp
        curvature = torch.where(
            active & finite, torch.fmin(walk["curvature"], pap / pp), walk["curvature"]
        )
        lowest = torch.where(active, torch.minimum(walk["lowest"], pap / metric), walk["lowest"])
        if self.damping:
            pap, ap = pap + self.damping * pp, ap + self.damping * p
        # below rounding of the largest curvature the sign of p'Ap says nothing
        quotient = pap / metric
        largest = torch.maximum(walk["largest"], quotient.abs())
        positive = (rz > 0) & (quotient > torch.finfo(r.dtype).eps * largest)
        if self.bounded:
            alpha, most = rz / pap.abs(), walk["farthest"] / pp.sqrt()
            positive = positive & (alpha < most)
            alpha, moving = torch.minimum(alpha, most), active & finite
        else:
            alpha, moving = rz / pap, active & finite & positive
        # 0 keeps the row as it is; where A p is not finite r is lost, but nothing reads it any more
        alpha = torch.where(moving, alpha, 0)
        x = torch.addcmul(x, alpha[:, None], p)
        r = torch.addcmul(r, -alpha[:, None], ap)
        z = self.preconditioned(r, walk)
        rz_new = _dot(r, z)
        own = self._is_preconditioned(walk) and not self.bounded
        met = moving & ((norm(r) if own else rz_new.sqrt()) <= walk["tolerance"])
        result = torch.where(active & ~positive, int(Result.NEGATIVE_CURVATURE), walk["result"])
        result = torch.where(active & ~finite, int(Result.NON_FINITE), result)
        result = torch.where(met & positive, int(Result.CONVERGED), result)
        goes_on = moving & positive & ~met
        beta = rz_new / rz
        return walk | {
            "x": x,
            "r": r,
            "p": torch.where(goes_on[:, None], torch.addcmul(z, beta[:, None], p), p),
            "rz": torch.where(goes_on, rz_new, rz),
            "metric": torch.where(goes_on, rz_new + beta * beta * metric, metric),
            "gain": alpha * rz,
            "curvature": curvature,
            "lowest": lowest,
            "largest": largest,
            "steps": walk["steps"] + moving,
            "result": result,
            "active": goes_on,
        }

    def preconditioned(self, r: Tensor, walk: Walk) -> Tensor:
        """M r."""
        if "scales" in walk:
            return walk["scales"].square() * r
        return r if self.precondition is None else self.precondition(r)

    def _is_preconditioned(self, walk: Walk) -> bool:
        return self.precondition is not None or "scales" in walk

    def begin(self, b: Tensor, active: Tensor, **more: Tensor) -> Walk:
        """The walk before its first step, from x = 0, on rows `(tasks, size)`.

        Its entries, each `(tasks,)` but for x, the residual r and the direction p: "curvature", the
        smallest p'Ap / p'p (NaN where none was met); "lowest" and "largest", of p'Ap / p'M^-1 p;
        "steps"; "gain", of the last step in b'x; "result"; "active", who goes on.

        b: finite.  active: who sets out.
        more: "tolerance", of the residual's norm; "scales" `(tasks, size)`; "farthest".
        """
        z = self.preconditioned(b, more)
        rz = _dot(b, z)
        none = torch.zeros_like(rz)
        result = torch.where(active, int(Result.STEP_LIMIT), int(Result.CONVERGED))
        return more | {
            "x": torch.zeros_like(b),
            "r": b,
            "p": z,
            "rz": rz,
            "metric": rz,
            "gain": none,
            "curvature": torch.full_like(rz, math.nan),
            "lowest": torch.full_like(rz, math.inf),
            "largest": none,
            "steps": torch.zeros_like(result),
            "result": result,
            "active": active,
        }


def walked(
    product: Product,
    step: ConjugateStep,
    walk: Walk,
    most: int,
    stop: Callable[[Walk], Walk] | None = None,
) -> Walk:
    """Steps until nobody goes on, at most so many.

    stop: called after each step, to end more of them.
    """
    every = host_reads_every(walk["x"])
    for count in range(most):
        if count % every == 0 and not tracing() and not bool(walk["active"].any()):
            break
        walk = run(product, step, walk)
        walk = walk if stop is None else stop(walk)
    return walk


def host_reads_every(x: Tensor) -> int:
    """Steps between two looks at "is everybody done?".

    A read waits for the accelerator's queue to drain; on the CPU it is free, and a product saved is
    a product saved.
    """
    return 1 if x.device.type == "cpu" else 4


def norm(a: Tensor) -> Tensor:
    """Of each row, `(tasks,)`."""
    found: Tensor = torch.linalg.vector_norm(a, dim=-1)
    return found


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)
