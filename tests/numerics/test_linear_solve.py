"""Linear solvers: every solver on every case, against torch.linalg and scipy."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from varmeta.numerics import conjugate, linear_solve
from varmeta.numerics.linear_solve import CG, Direct, Neumann
from varmeta.numerics.solution import Result

torch.set_num_threads(1)

SOLVERS = {"cg": CG(), "neumann": Neumann(num_terms=3000), "direct": Direct()}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def spd(tasks, size, seed=0, floor=0.5, dtype=torch.float64):
    root = normal(tasks, size, size, seed=seed)
    return (root @ root.mT / size + floor * torch.eye(size, dtype=torch.float64)).to(dtype)


def product(a):
    return lambda v: {"w": (a @ v["w"][..., None])[..., 0]}


def diagonal(*rows, dtype=torch.float64):
    d = torch.tensor(rows, dtype=dtype)
    return torch.diag_embed(d)


CASES = {
    "one parameter": (torch.tensor([[[2.0]], [[0.5]]], dtype=torch.float64), normal(2, 1)),
    "identity": (torch.eye(4, dtype=torch.float64).expand(3, 4, 4), normal(3, 4)),
    "multiple of the identity": (
        3 * torch.eye(4, dtype=torch.float64).expand(3, 4, 4),
        normal(3, 4),
    ),
    "two": (spd(5, 2, seed=1), normal(5, 2, seed=2)),
    "random": (spd(6, 9, seed=3), normal(6, 9, seed=4)),
    "immediate": (spd(2, 3, seed=5), torch.zeros(2, 3, dtype=torch.float64)),
    "tiny and huge b": (
        spd(2, 3, seed=6),
        normal(2, 3) * torch.tensor([[1e-200], [1e200]], dtype=torch.float64),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_agrees_with_dense_solve(solver, case):
    a, b = CASES[case]
    solution = SOLVERS[solver].solve(product(a), {"w": b})
    assert solution.result.tolist() == [Result.CONVERGED] * len(b)
    expected = torch.linalg.solve(a, b)
    scale = b.abs().amax(-1, keepdim=True).clamp(min=1e-300)
    torch.testing.assert_close(solution.value["w"] / scale, expected / scale, rtol=1e-8, atol=1e-8)
    residual = (b - (a @ solution.value["w"][..., None])[..., 0]) / scale
    relative = residual.norm(dim=-1) / (b / scale).norm(dim=-1).clamp(min=1e-300)
    torch.testing.assert_close(solution.stats["residual"], relative, rtol=1e-3, atol=1e-15)
    assert bool((solution.stats["residual"] <= 1.01e-10).all())
    for stat in ("residual", "curvature", "steps"):
        assert solution.stats[stat].shape == (len(b),)


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_number_per_task(solver):
    # the setting in which two other libraries return 0 or 1e18
    h, b = (
        torch.tensor([2.0, 9.5, 0.3], dtype=torch.float64),
        torch.tensor([1.0, -4.0, 2.0], dtype=torch.float64),
    )
    solution = SOLVERS[solver].solve(lambda v: {"w": h * v["w"]}, {"w": b})
    assert solution.value["w"].shape == (3,)
    torch.testing.assert_close(solution.value["w"], b / h, rtol=1e-9, atol=0)
    torch.testing.assert_close(solution.stats["curvature"], h)


@pytest.mark.parametrize("solver", SOLVERS)
def test_several_tensors_in_any_order(solver):
    a, b = spd(3, 7, seed=7), normal(3, 7, seed=8)
    like = {"bias": b[:, 0], "weight": b[:, 1:].reshape(3, 2, 3)}

    def matvec(v):
        flat = torch.cat([v["bias"][:, None], v["weight"].reshape(3, 6)], -1)
        out = (a @ flat[..., None])[..., 0]
        return {"weight": out[:, 1:].reshape(3, 2, 3), "bias": out[:, 0]}

    x = SOLVERS[solver].solve(matvec, like).value
    assert list(x) == ["bias", "weight"]
    assert x["weight"].shape == (3, 2, 3)
    got = torch.cat([x["bias"][:, None], x["weight"].reshape(3, 6)], -1)
    torch.testing.assert_close(got, torch.linalg.solve(a, b), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_empty_tensor_beside_others(solver):
    b = {
        "slopes": torch.zeros(2, 0, dtype=torch.float64),
        "intercept": torch.ones(2, dtype=torch.float64),
    }
    solution = SOLVERS[solver].solve(
        lambda v: {"slopes": v["slopes"], "intercept": 4 * v["intercept"]}, b
    )
    assert solution.value["slopes"].shape == (2, 0)
    torch.testing.assert_close(
        solution.value["intercept"], torch.full((2,), 0.25, dtype=torch.float64)
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_task_does_not_see_its_batch(solver):
    a, b = spd(5, 6, seed=9), normal(5, 6, seed=10)
    a = a * torch.tensor([1.0, 1e3, 1.0, 1e-3, 1.0], dtype=torch.float64)[:, None, None]
    b[2] = 0
    together = SOLVERS[solver].solve(product(a), {"w": b})
    for i in range(5):
        alone = SOLVERS[solver].solve(product(a[i : i + 1]), {"w": b[i : i + 1]})
        torch.testing.assert_close(
            alone.value["w"][0], together.value["w"][i], rtol=1e-12, atol=1e-14
        )
        assert alone.stats["steps"][0] == together.stats["steps"][i]


@pytest.mark.parametrize("solver", SOLVERS)
def test_float32(solver):
    a, b = spd(4, 6, seed=11, dtype=torch.float32), normal(4, 6, seed=12, dtype=torch.float32)
    # |b|^2 underflows in this dtype
    b[0] *= 1e-30
    solution = SOLVERS[solver].solve(product(a), {"w": b})
    assert solution.worst == Result.CONVERGED
    assert solution.value["w"].dtype == torch.float32
    scale = b.abs().amax(-1, keepdim=True)
    expected = torch.linalg.solve(a.double(), b.double())
    torch.testing.assert_close(
        solution.value["w"].double() / scale, expected / scale, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_of_a_graph_is_kept_and_gradients_may_be_taken_inside(solver):
    a = spd(2, 3, seed=13).requires_grad_()
    b = normal(2, 3).requires_grad_()

    def matvec(v):  # rebuilds its own graph at each product, also when the caller has none
        point = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
        gradient = (a @ point[..., None])[..., 0]
        return {"w": torch.autograd.grad(gradient, point, v["w"])[0]}

    solution = SOLVERS[solver].solve(matvec, {"w": b})
    tensors = [solution.value["w"], *solution.stats.values()]
    assert not any(x.requires_grad for x in tensors)


@pytest.mark.parametrize("solver", SOLVERS)
def test_indefinite_is_said(solver):
    a, b = diagonal([2.0, -1.0], [-2.0, -3.0]), torch.ones(2, 2, dtype=torch.float64)
    solution = SOLVERS[solver].solve(product(a), {"w": b})
    assert solution.result.tolist() == [Result.NEGATIVE_CURVATURE] * 2
    # Neumann infers it from growth, before any of its directions has negative curvature
    first = 1 if solver == "neumann" else 0
    assert bool((solution.stats["curvature"][first:] < 0).all())
    assert bool(torch.isfinite(solution.value["w"]).all())
    assert "convex" in solution.worst.sentence


@pytest.mark.parametrize("solver", SOLVERS)
def test_mixed_batch(solver):
    a = torch.stack(
        [
            spd(1, 6, seed=14)[0],
            -torch.eye(6, dtype=torch.float64),
            spd(1, 6, seed=15, floor=0.05)[0],
        ]
    )
    a = torch.cat([a, torch.full((1, 6, 6), float("nan"), dtype=torch.float64), a[:1]])
    b = normal(5, 6, seed=16)
    b[0], b[4, 2] = 0, float("inf")
    solution = SOLVERS[solver].solve(product(a), {"w": b})
    assert solution.result.tolist() == [
        Result.CONVERGED,
        Result.NEGATIVE_CURVATURE,
        Result.CONVERGED,
        Result.NON_FINITE,
        Result.NON_FINITE,
    ]
    assert not solution.value["w"][0].any()
    assert solution.stats["residual"][0] == 0
    torch.testing.assert_close(
        solution.value["w"][2], torch.linalg.solve(a[2], b[2]), rtol=1e-7, atol=1e-7
    )
    assert bool(torch.isfinite(solution.value["w"]).all())
    assert solution.stats["residual"][3:].isnan().all()
    assert solution.worst == Result.NON_FINITE


@pytest.mark.parametrize("solver", ["cg", "neumann"])
def test_reading_convergence_less_often_changes_nothing(solver, monkeypatch):
    # what happens on an accelerator: finished tasks are carried along, masked
    a, b = spd(5, 6, seed=34), normal(5, 6, seed=35)
    a[1], b[2] = -a[1], 0
    often = SOLVERS[solver].solve(product(a), {"w": b})
    for module in (linear_solve, conjugate):
        monkeypatch.setattr(module, "host_reads_every", lambda x: 7)
    again = SOLVERS[solver].solve(product(a), {"w": b})
    assert torch.equal(often.result, again.result)
    assert torch.equal(often.value["w"], again.value["w"])
    for name, stat in often.stats.items():
        if name == "products":  # of the whole batch, those of finished tasks too
            assert bool((again.stats[name] >= stat).all())
            continue
        torch.testing.assert_close(again.stats[name], stat, rtol=0, atol=0, equal_nan=True)


# CG


def test_cg_agrees_with_scipy_step_by_step():
    a, b = spd(3, 12, seed=17, floor=0.01), normal(3, 12, seed=18)
    for steps in (1, 3, 7):
        solution = CG(max_steps=steps).solve(product(a), {"w": b})
        assert solution.result.tolist() == [Result.STEP_LIMIT] * 3
        assert solution.stats["steps"].tolist() == [steps] * 3
        for i in range(3):
            x, _ = scipy.sparse.linalg.cg(a[i].numpy(), b[i].numpy(), rtol=0, atol=0, maxiter=steps)
            torch.testing.assert_close(
                solution.value["w"][i], torch.from_numpy(x), rtol=1e-9, atol=1e-11
            )


def test_cg_with_a_preconditioner_agrees_with_scipy_step_by_step():
    spread = torch.logspace(-2, 2, 10, dtype=torch.float64)
    a, b = spread[:, None] * spd(2, 10, seed=19) * spread, normal(2, 10, seed=20)
    jacobi = 1 / a.diagonal(dim1=-2, dim2=-1)
    solver = CG(max_steps=4, preconditioner=lambda v: {"w": jacobi * v["w"]})
    solution = solver.solve(product(a), {"w": b})
    for i in range(2):
        m = np.diag(jacobi[i].numpy())
        x, _ = scipy.sparse.linalg.cg(a[i].numpy(), b[i].numpy(), rtol=0, atol=0, maxiter=4, M=m)
        torch.testing.assert_close(
            solution.value["w"][i], torch.from_numpy(x), rtol=1e-8, atol=1e-12
        )


def test_cg_starts_at_a_guess_where_that_is_better_than_zero():
    a, b = spd(4, 9, seed=3), normal(4, 9, seed=4)
    x = torch.linalg.solve(a, b)
    guess = x + 1e-6 * normal(4, 9, seed=5)
    guess[1], guess[2] = 1e30, float("nan")  # of no use
    cold, warm = CG().solve(product(a), {"w": b}), CG().solve(product(a), {"w": b}, {"w": guess})
    torch.testing.assert_close(warm.value["w"], x, rtol=1e-8, atol=1e-9)
    assert warm.result.tolist() == [Result.CONVERGED] * 4
    for task, fewer in enumerate((True, False, False, True)):
        mine, its = int(warm.stats["steps"][task]), int(cold.stats["steps"][task])
        assert mine < its if fewer else mine == its
    exact = CG().solve(product(a), {"w": b}, {"w": x})
    assert exact.stats["steps"].tolist() == [0] * 4


def test_cg_needs_one_step_per_distinct_eigenvalue():
    a = diagonal([2.0, 2, 2, 2], [1, 1, 3, 3], [1, 2, 3, 4])
    solution = CG().solve(product(a), {"w": torch.ones(3, 4, dtype=torch.float64)})
    assert solution.stats["steps"].tolist() == [1, 2, 4]
    assert solution.worst == Result.CONVERGED


def test_cg_badly_scaled():
    d = torch.logspace(-5, 5, 20, dtype=torch.float64)
    a, b = torch.diag(d)[None], normal(1, 20, seed=21)
    scaled = CG(preconditioner=lambda v: {"w": v["w"] / d}).solve(product(a), {"w": b})
    assert scaled.worst == Result.CONVERGED
    assert scaled.stats["steps"].item() == 1
    torch.testing.assert_close(scaled.value["w"], b / d, rtol=1e-12, atol=0)
    plain = CG(rtol=1e-8).solve(product(a), {"w": b})
    assert plain.worst == Result.CONVERGED
    assert plain.stats["residual"].item() <= 1e-8


@pytest.mark.parametrize(
    ("max_steps", "steps", "result"), [(4, 4, Result.CONVERGED), (3, 3, Result.STEP_LIMIT)]
)
def test_cg_refines_an_iterate_that_its_recursion_overrates(max_steps, steps, result):
    # drift made to order, so that no BLAS decides the test: the first task's products are off by
    # 1e-6 for one run
    d, calls = torch.tensor([[2.0, 3.0], [2.0, 3.0]], dtype=torch.float64), []
    drift = torch.tensor([[1 + 1e-6], [1.0]], dtype=torch.float64)

    def matvec(v):
        calls.append(1)
        return {"w": v["w"] * d * (drift if len(calls) <= 2 else 1)}

    solution = CG(max_steps=max_steps).solve(matvec, {"w": torch.ones(2, 2, dtype=torch.float64)})
    assert solution.result.tolist() == [result, Result.CONVERGED]
    assert solution.stats["steps"].tolist() == [steps, 2]
    rtol = 1e-10 if result == Result.CONVERGED else 1e-6
    torch.testing.assert_close(solution.value["w"], 1 / d, rtol=rtol, atol=0)


def test_cg_says_that_a_tolerance_is_out_of_reach():
    q = torch.linalg.qr(normal(30, 30, seed=24))[0]
    a = ((q * torch.logspace(-3, 3, 30, dtype=torch.float64)) @ q.T)[None]
    solution = CG(rtol=1e-15, max_steps=5000).solve(product(a), {"w": normal(1, 30, seed=25)})
    assert solution.worst == Result.STAGNATED
    assert 1e-15 < solution.stats["residual"].item() < 1e-6


def test_cg_returns_zero_where_the_first_direction_has_negative_curvature():
    a = diagonal([-1.0, -1.0], [4.0, -0.25])
    solution = CG().solve(product(a), {"w": torch.tensor([[1.0, 0], [1, 1]], dtype=torch.float64)})
    assert solution.result.tolist() == [Result.NEGATIVE_CURVATURE] * 2
    assert not solution.value["w"][0].any()
    assert solution.stats["curvature"][0].item() == -1
    # the second task took one step of steepest descent first: alpha = 2 / 3.75
    torch.testing.assert_close(
        solution.value["w"][1], torch.full((2,), 2 / 3.75, dtype=torch.float64)
    )
    assert solution.stats["steps"].tolist() == [0, 1]


def test_cg_singular():
    q = torch.linalg.qr(normal(5, 5, seed=26))[0]
    a = (q * torch.tensor([0.0, 1, 2, 3, 4], dtype=torch.float64) @ q.T)[None]
    inside = (a @ normal(1, 5, 1, seed=27))[..., 0]
    assert CG().solve(product(a), {"w": inside}).worst == Result.CONVERGED
    outside = CG().solve(product(a), {"w": inside + q[:, 0]})
    assert outside.worst == Result.NEGATIVE_CURVATURE
    assert outside.value["w"].norm() < 1e3  # not thrown along the flat direction


def test_cg_takes_a_tolerance_per_task():
    a, b = spd(1, 12, seed=28, floor=0.01).expand(2, 12, 12), normal(1, 12, seed=29).expand(2, 12)
    solution = CG(rtol=torch.tensor([0.5, 1e-12], dtype=torch.float64)).solve(product(a), {"w": b})
    loose, tight = solution.stats["residual"].tolist()
    assert 1e-6 < loose <= 0.5
    assert tight <= 1e-12
    with pytest.raises(ValueError, match="one per task"):
        CG(rtol=torch.ones(3)).solve(product(a), {"w": b})


# Neumann


def test_neumann_is_the_truncated_series():
    a, b = spd(2, 4, seed=30), normal(2, 4, seed=31)
    solution = Neumann(num_terms=5, step=0.2).solve(product(a), {"w": b})
    term, total = b, torch.zeros_like(b)
    for _ in range(5):
        total = total + 0.2 * term
        term = term - 0.2 * (a @ term[..., None])[..., 0]
    torch.testing.assert_close(solution.value["w"], total)
    assert solution.result.tolist() == [Result.STEP_LIMIT] * 2
    torch.testing.assert_close(solution.stats["residual"], term.norm(dim=-1) / b.norm(dim=-1))


def test_neumann_says_that_it_diverges_and_keeps_the_best_iterate():
    # P3: h = 6.68 with step 1 returned 3.7e18 elsewhere
    solution = Neumann(step=1.0).solve(
        lambda v: {"w": 6.68 * v["w"]}, {"w": torch.ones(1, dtype=torch.float64)}
    )
    assert solution.worst == Result.DIVERGED
    assert solution.value["w"].item() == 0
    assert solution.stats["residual"].item() == 1
    # grows only after a while: the bad component is small at first
    a = diagonal([1.0, 2.5])
    late = Neumann(step=1.0).solve(
        product(a), {"w": torch.tensor([[1.0, 1e-4]], dtype=torch.float64)}
    )
    assert late.worst == Result.DIVERGED
    assert late.stats["residual"].item() < 1e-3


def test_neumann_does_not_draw_from_the_global_generator():
    before = torch.get_rng_state()
    SOLVERS["neumann"].solve(product(spd(2, 3)), {"w": normal(2, 3)})
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "a", [torch.zeros(1, 2, 2, dtype=torch.float64), diagonal([1.0, 0.0])], ids=["zero", "flat"]
)
def test_neumann_singular_is_not_divergence(a):
    solution = Neumann().solve(product(a), {"w": torch.ones(1, 2, dtype=torch.float64)})
    assert solution.worst == Result.STEP_LIMIT


# Direct


def test_direct_solves_an_indefinite_system_exactly():
    root = normal(3, 5, 5, seed=32)
    a, b = root + root.mT, normal(3, 5, seed=33)
    solution = Direct().solve(product(a), {"w": b})
    torch.testing.assert_close(solution.value["w"], torch.linalg.solve(a, b), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(solution.stats["curvature"], torch.linalg.eigvalsh(a)[:, 0])
    assert solution.stats["steps"].tolist() == [5] * 3


def test_direct_singular_gives_the_shortest_least_squares_solution():
    a, b = diagonal([0.0, 2.0, 4.0]), torch.tensor([[3.0, 2.0, 2.0]], dtype=torch.float64)
    solution = Direct().solve(product(a), {"w": b})
    assert solution.worst == Result.STAGNATED  # b is outside A's range
    assert solution.stats["curvature"].tolist() == [2.0]  # the smallest that is not 0
    torch.testing.assert_close(
        solution.value["w"], torch.tensor([[0.0, 1.0, 0.5]], dtype=torch.float64)
    )
    b[0, 0] = 0.0
    assert Direct().solve(product(a), {"w": b}).worst == Result.CONVERGED


# what is refused


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("b", "error", "words"),
    [
        ({}, ValueError, "task axis"),
        ({"w": torch.tensor(1.0)}, ValueError, "task axis"),
        ({"w": torch.ones(0, 3)}, ValueError, "task axis"),
        ({"w": torch.ones(2, 1), "v": torch.ones(3)}, ValueError, "task axis"),
        ({"w": torch.ones(2, dtype=torch.int64)}, TypeError, "floating"),
        ({"w": torch.ones(2), "v": torch.ones(2, dtype=torch.float64)}, ValueError, "one dtype"),
    ],
    ids=["empty", "no task axis", "no tasks", "lengths", "integer", "mixed"],
)
def test_bad_right_hand_sides(solver, b, error, words):
    with pytest.raises(error, match=words):
        SOLVERS[solver].solve(lambda v: v, b)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "out", [{"v": torch.ones(2, 3)}, {"w": torch.ones(2, 1)}], ids=["name", "shape"]
)
def test_bad_products(solver, out):
    with pytest.raises(ValueError, match="matvec must return"):
        SOLVERS[solver].solve(lambda v: out, {"w": torch.ones(2, 3)})


@pytest.mark.parametrize(
    "make",
    [
        lambda: CG(rtol=0.0),
        lambda: CG(rtol=float("nan")),
        lambda: CG(max_steps=0),
        lambda: CG(max_steps=2.5),  # type: ignore[arg-type]
        lambda: Neumann(num_terms=0),
        lambda: Neumann(step=-1.0),
        lambda: Neumann(step=float("inf")),
    ],
)
def test_bad_choices(make):
    with pytest.raises(ValueError, match="must be"):
        make()
