"""Implicit gradients against closed forms, central differences of the re-solved problem, and
unrolling.
"""

import math

import pytest
import torch

from varmeta.numerics import tree
from varmeta.numerics.adjoint import ImplicitAdjoint, detached, unrolled
from varmeta.numerics.linear_solve import CG, Direct, Neumann
from varmeta.numerics.solution import Result

torch.set_num_threads(1)

LINEAR_SOLVERS = {
    "cg": CG(rtol=1e-13),
    "neumann": Neumann(num_terms=5000, rtol=1e-13),
    "direct": Direct(),
}
ALL = pytest.mark.parametrize("solver", LINEAR_SOLVERS)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def number(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def gradients(losses, eta):
    found = torch.autograd.grad(losses.sum(), list(eta.values()), materialize_grads=True)
    return dict(zip(eta, found, strict=True))


def newton(inner, start, eta, steps=50):
    """The inner minimum of each task by dense Newton steps: slow, and independent of the solvers
    under test.
    """
    eta = {name: x.detach() for name, x in eta.items()}
    flat = tree.flatten(start).detach()
    for _ in range(steps):

        def total(x):
            return inner(tree.unflatten(x, start), eta).sum()

        gradient = torch.autograd.functional.jacobian(total, flat)
        if gradient.abs().max() < 1e-14:
            break
        hessian = torch.autograd.functional.hessian(total, flat)
        blocks = torch.stack([hessian[i, :, i] for i in range(len(flat))])
        flat = flat - torch.linalg.solve(blocks, gradient)
    return tree.unflatten(flat, start)


# Ridge regression: inner = |y - X w|^2 / 2 + lambda / 2 |w - theta0|^2, all in closed form

X, Y, XQ, YQ = (
    normal(4, 6, 3, seed=0),
    normal(4, 6, seed=1),
    normal(4, 5, 3, seed=2),
    normal(4, 5, seed=3),
)


def ridge_loss(w, x, y):
    return 0.5 * (y - torch.einsum("tnd,td->tn", x, w)).square().sum(-1)


def ridge_inner(phi, eta):
    penalty = 0.5 * eta["log_precision"].exp() * (phi["w"] - eta["theta0"]).square().sum(-1)
    return ridge_loss(phi["w"], X, Y) + penalty


def ridge_support(phi, eta):
    return ridge_loss(phi["w"], X, Y)


def ridge_query(phi, eta):
    return ridge_loss(phi["w"], XQ, YQ)


def ridge_minimum(eta):
    precision = eta["log_precision"].exp()
    a = X.mT @ X + precision * torch.eye(3, dtype=torch.float64)
    return torch.linalg.solve(a, torch.einsum("tnd,tn->td", X, Y) + precision * eta["theta0"])


def ridge_eta():
    return {"theta0": normal(3, seed=4).requires_grad_(), "log_precision": number(0.4)}


@ALL
def test_ridge_against_the_closed_form(solver):
    eta = ridge_eta()
    phi = {"w": ridge_minimum(eta)}
    expected = gradients(ridge_query(phi, eta), eta)  # autograd through the closed-form argmin
    losses, stats = ImplicitAdjoint(LINEAR_SOLVERS[solver])(ridge_inner, ridge_query, phi, eta)
    torch.testing.assert_close(losses, ridge_query(phi, eta))
    found = gradients(losses, eta)
    for name in eta:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-10)
    assert stats["linear_result"].tolist() == [Result.CONVERGED] * 4
    assert bool((stats["gradient_norm"] < 1e-12).all())
    assert bool((stats["residual"] < 1e-12).all())
    smallest = torch.linalg.eigvalsh(X.mT @ X)[:, 0] + eta["log_precision"].exp().detach()
    assert bool((stats["curvature"] >= smallest * (1 - 1e-12)).all())
    assert not any(x.requires_grad for x in stats.values())
    assert all(x.shape == (4,) for x in stats.values())


@ALL
def test_the_gradient_of_each_task_may_be_weighted(solver):
    eta = ridge_eta()
    weights = torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64)
    phi = {"w": ridge_minimum(eta)}
    expected = gradients(weights * ridge_query(phi, eta), eta)
    losses, _ = ImplicitAdjoint(LINEAR_SOLVERS[solver])(ridge_inner, ridge_query, phi, eta)
    found = gradients(weights * losses, eta)
    for name in eta:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-10)


@ALL
def test_imaml_is_the_envelope_gradient_preconditioned(solver):
    eta = ridge_eta()
    phi = {"w": ridge_minimum(eta).detach()}
    precision = eta["log_precision"].exp().detach()
    pull = precision * (eta["theta0"].detach() - phi["w"])  # lambda (theta0 - theta*), per task
    adjoint = ImplicitAdjoint(LINEAR_SOLVERS[solver], certify=False)

    losses, stats = adjoint(ridge_inner, ridge_inner, phi, eta)
    torch.testing.assert_close(
        gradients(losses, eta)["theta0"], pull.sum(0), rtol=1e-12, atol=1e-12
    )
    assert stats["residual"].tolist() == [0] * 4
    assert stats["products"].tolist() == [0] * 4
    assert bool(stats["curvature"].isnan().all())
    assert stats["linear_result"].tolist() == [Result.CONVERGED] * 4
    assert bool((stats["gradient_norm"] < 1e-12).all())

    losses, _ = adjoint(ridge_inner, ridge_support, phi, eta)
    operator = torch.eye(3, dtype=torch.float64) + X.mT @ X / precision
    expected = torch.linalg.solve(operator, pull).sum(0)
    torch.testing.assert_close(gradients(losses, eta)["theta0"], expected, rtol=1e-8, atol=1e-8)


def test_the_envelope_theorem_gives_what_the_linear_system_gives():
    eta = ridge_eta()
    phi = {"w": ridge_minimum(eta)}
    short, _ = ImplicitAdjoint()(ridge_inner, ridge_inner, phi, eta)
    long, _ = ImplicitAdjoint(Direct())(
        ridge_inner, lambda phi, eta: ridge_inner(phi, eta), phi, eta
    )
    for a, b in zip(gradients(short, eta).values(), gradients(long, eta).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# One parameter, one number per task: f(t) = sin 3t + 0.2 t^2, where two peers return 0 and 1e18


def sine(phi, eta):
    return torch.sin(3 * phi["t"]) + 0.2 * phi["t"] ** 2


def proximal(phi, eta):
    return sine(phi, eta) + 0.5 * eta["precision"] * (phi["t"] - eta["theta0"]) ** 2


@ALL
@pytest.mark.parametrize(
    ("theta0", "start", "envelope", "imaml"),
    [(0.7, -0.3, 1.0822, 0.1127), (-2.0, -0.6, -1.3521, -0.1382)],
)
def test_one_scalar_parameter(solver, theta0, start, envelope, imaml):
    eta = {"theta0": number(theta0), "precision": number(1.0)}
    phi = newton(proximal, {"t": torch.tensor([start], dtype=torch.float64)}, eta)
    adjoint = ImplicitAdjoint(LINEAR_SOLVERS[solver])
    losses, _ = adjoint(proximal, proximal, phi, eta)
    assert gradients(losses, eta)["theta0"].item() == pytest.approx(envelope, abs=1e-4)
    losses, stats = adjoint(proximal, sine, phi, eta)
    assert losses.shape == (1,)
    found = gradients(losses, eta)["theta0"].item()
    assert found == pytest.approx(imaml, abs=1e-4)
    # d theta* / d theta0 = lambda / (lambda + f'')
    t = phi["t"].item()
    slope, bend = 3 * math.cos(3 * t) + 0.4 * t, -9 * math.sin(3 * t) + 0.4
    assert found == pytest.approx(slope / (1 + bend), rel=1e-10)
    assert stats["curvature"].item() == pytest.approx(1 + bend)


# Small and nonlinear, several tensors: Poisson regression with curved coefficients, and a 0-d
# parameter per task

Z = normal(3, 8, 2, seed=5)
COUNTS = torch.poisson(
    torch.full((3, 8), 2.0, dtype=torch.float64), generator=torch.Generator().manual_seed(6)
)


def poisson(phi, eta, z=Z, counts=COUNTS):
    hidden = torch.tanh(torch.einsum("tnd,tdk->tnk", z, phi["weight"]))
    rate = phi["bias"][:, None] + hidden @ eta["head"]
    return (rate.exp() - counts * rate).sum(-1)


def poisson_inner(phi, eta):
    weight = (phi["weight"] - eta["weight"]).square().flatten(1).sum(-1)
    bias = (phi["bias"] - eta["bias"]).square()
    precision = eta["log_precision"].exp()
    return poisson(phi, eta) + 0.5 * precision * (weight + bias) - 2.5 * eta["log_precision"]


def poisson_query(phi, eta):
    return poisson(phi, eta, Z[:, :5] + 0.3, COUNTS[:, :5]) / eta["temperature"]


def poisson_eta():
    eta = {
        "weight": 0.3 * normal(2, 2, seed=7),
        "bias": torch.tensor(0.2, dtype=torch.float64),
        "log_precision": torch.tensor(1.5, dtype=torch.float64),
        "head": torch.tensor([0.7, -0.5], dtype=torch.float64),
        "temperature": torch.tensor(1.3, dtype=torch.float64),
    }
    return {name: x.requires_grad_() for name, x in eta.items()}


def poisson_start():
    return {
        "weight": torch.zeros(3, 2, 2, dtype=torch.float64),
        "bias": torch.zeros(3, dtype=torch.float64),
    }


@ALL
@pytest.mark.parametrize(
    "outer",
    [poisson_query, poisson_inner, lambda phi, eta: poisson(phi, eta)],
    ids=["query", "elbo", "fit"],
)
def test_against_central_differences_of_the_solved_problem(solver, outer):
    eta = poisson_eta()
    phi = newton(poisson_inner, poisson_start(), eta)
    losses, stats = ImplicitAdjoint(LINEAR_SOLVERS[solver])(poisson_inner, outer, phi, eta)
    assert bool((stats["gradient_norm"] < 1e-12).all())
    found = gradients(losses, eta)
    h = 1e-5
    for name, x in eta.items():
        for i in range(x.numel()):
            values = []
            for sign in (1, -1):
                moved = {key: value.detach().clone() for key, value in eta.items()}
                moved[name].view(-1)[i] += sign * h
                values.append(outer(newton(poisson_inner, phi, moved), moved).sum().item())
            difference = (values[0] - values[1]) / (2 * h)
            assert found[name].view(-1)[i].item() == pytest.approx(difference, rel=1e-7, abs=1e-7)


@ALL
def test_equals_unrolling_to_convergence(solver):
    eta = poisson_eta()
    phi = {"weight": eta["weight"].expand(3, 2, 2), "bias": eta["bias"].expand(3)}
    for _ in range(300):
        found = torch.autograd.grad(
            poisson_inner(phi, eta).sum(), list(phi.values()), create_graph=True
        )
        phi = {name: x - 0.03 * g for (name, x), g in zip(phi.items(), found, strict=True)}
    expected = gradients(unrolled(poisson_query, phi, eta), eta)
    losses, stats = ImplicitAdjoint(LINEAR_SOLVERS[solver])(poisson_inner, poisson_query, phi, eta)
    assert bool((stats["gradient_norm"] < 1e-12).all())
    actual = gradients(losses, eta)
    for name in eta:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-10)


def test_detached_leaves_only_the_direct_part():
    eta = poisson_eta()
    phi = {"weight": eta["weight"].expand(3, 2, 2), "bias": eta["bias"].expand(3)}
    found = gradients(detached(poisson_query, phi, eta), eta)
    assert not found["weight"].any()
    assert not found["bias"].any()
    losses = poisson_query(phi, eta)
    torch.testing.assert_close(
        found["temperature"], -losses.sum().detach() / eta["temperature"].detach()
    )


# Dependences that are not there


def test_objectives_may_ignore_entries_of_eta_and_phi():
    eta = {
        "inner": number(0.5),
        "outer": number(2.0),
        "neither": number(1.0),
        "constant": torch.tensor(3.0),
    }
    phi = {
        "a": torch.tensor([0.5, 0.5], dtype=torch.float64),
        "b": torch.zeros(2, 3, dtype=torch.float64),
    }

    def inner(phi, eta):
        return 0.5 * (phi["a"] - eta["inner"]) ** 2 + 0.5 * phi["b"].square().sum(-1)

    losses, _ = ImplicitAdjoint()(inner, lambda phi, eta: eta["outer"] * phi["a"], phi, eta)
    found = gradients(losses, {name: eta[name] for name in ("inner", "outer", "neither")})
    # a* = inner, hence outer = eta_outer eta_inner for each of two tasks
    assert {name: x.item() for name, x in found.items()} == pytest.approx(
        {"inner": 4.0, "outer": 1.0, "neither": 0.0}
    )


def test_an_outer_objective_without_phi_has_only_its_direct_gradient():
    eta = ridge_eta()
    phi = {"w": ridge_minimum(eta)}

    def outer(phi, eta):
        return eta["log_precision"].expand(4)

    losses, stats = ImplicitAdjoint()(ridge_inner, outer, phi, eta)
    found = gradients(losses, eta)
    assert not found["theta0"].any()
    assert found["log_precision"].item() == 4
    assert stats["residual"].tolist() == [0] * 4
    # nor need it depend on anything
    losses, _ = ImplicitAdjoint()(
        ridge_inner, lambda phi, eta: torch.ones(4, dtype=torch.float64), phi, eta
    )
    assert not any(x.any() for x in gradients(losses, eta).values())


def test_a_prior_that_only_starts_the_inner_loop_has_no_gradient():
    eta = ridge_eta()

    def inner(phi, eta):
        return ridge_loss(phi["w"], X, Y)

    losses, _ = ImplicitAdjoint()(inner, ridge_query, {"w": torch.linalg.lstsq(X, Y).solution}, eta)
    assert not any(x.any() for x in gradients(losses, eta).values())


# Certificates


def test_a_linear_inner_objective_is_certified_as_flat():
    eta = {"slope": number(1.0)}

    def inner(phi, eta):
        return eta["slope"] * phi["a"]

    phi = {"a": torch.ones(2, dtype=torch.float64)}
    losses, stats = ImplicitAdjoint()(inner, lambda phi, eta: phi["a"] ** 2, phi, eta)
    assert stats["linear_result"].tolist() == [Result.STAGNATED] * 2
    assert bool(stats["curvature"].isnan().all()) and stats["residual"].tolist() == [1, 1]
    assert stats["gradient_norm"].tolist() == [1, 1]
    assert losses.tolist() == [1, 1]
    # nor does a gradient that has no graph at all break the product
    _, stats = ImplicitAdjoint()(lambda phi, eta: phi["a"], lambda phi, eta: phi["a"] ** 2, phi, {})
    assert stats["linear_result"].tolist() == [Result.STAGNATED] * 2


@ALL
def test_an_unconverged_or_concave_point_is_certified_as_such(solver):
    eta = {"theta0": number(0.7), "precision": number(1.0)}
    phi = {"t": torch.tensor([0.5, -0.5], dtype=torch.float64)}  # f'' = -8.6 and 9.4
    _, stats = ImplicitAdjoint(LINEAR_SOLVERS[solver])(proximal, sine, phi, eta)
    bend = -9 * torch.sin(3 * phi["t"]) + 0.4
    torch.testing.assert_close(stats["curvature"], 1 + bend)
    assert stats["linear_result"].tolist() == [Result.NEGATIVE_CURVATURE, Result.CONVERGED]
    slope = 3 * torch.cos(3 * phi["t"]) + 0.4 * phi["t"] + phi["t"] - 0.7
    torch.testing.assert_close(stats["gradient_norm"], slope.abs())


# Habits of the call


def test_phi_is_neither_changed_nor_differentiated_and_backward_works():
    eta = ridge_eta()
    phi = {"w": ridge_minimum(eta)}
    before = phi["w"].detach().clone()
    with torch.no_grad():  # a caller who has switched gradients off still gets one
        losses, _ = ImplicitAdjoint()(ridge_inner, ridge_query, phi, eta)
    losses.sum().backward()
    assert torch.equal(phi["w"], before)
    fresh = ridge_eta()
    expected = gradients(ridge_query({"w": ridge_minimum(fresh)}, fresh), fresh)
    for name in eta:
        torch.testing.assert_close(eta[name].grad, expected[name], rtol=1e-8, atol=1e-9)


def test_float32():
    eta = {name: x.detach().float().requires_grad_() for name, x in ridge_eta().items()}
    exact = ridge_eta()
    expected = gradients(ridge_query({"w": ridge_minimum(exact)}, exact), exact)
    phi = {"w": ridge_minimum(exact).detach().float()}

    def query(phi, eta):
        return ridge_loss(phi["w"], XQ.float(), YQ.float())

    def inner(phi, eta):
        penalty = 0.5 * eta["log_precision"].exp() * (phi["w"] - eta["theta0"]).square().sum(-1)
        return ridge_loss(phi["w"], X.float(), Y.float()) + penalty

    losses, stats = ImplicitAdjoint()(inner, query, phi, eta)
    assert losses.dtype == torch.float32
    assert stats["linear_result"].tolist() == [Result.CONVERGED] * 4
    found = gradients(losses, eta)
    for name in eta:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-4, atol=1e-4)


def test_units_precondition_cg_alone():
    """40 weights, 6 points and precisions from 1 to 1e4: in the prior's units H is 1 but for 6
    directions.
    """
    x, y, query = normal(4, 6, 40, seed=0), normal(4, 6, seed=1), normal(4, 40, seed=2)
    precision = torch.logspace(0, 4, 40, dtype=torch.float64)
    eta = {"theta0": normal(40, seed=4).requires_grad_()}

    def inner(phi, eta):
        return ridge_loss(phi["w"], x, y) + 0.5 * (
            precision * (phi["w"] - eta["theta0"]).square()
        ).sum(-1)

    def outer(phi, eta):
        return (query * phi["w"]).sum(-1)

    a = x.mT @ x + torch.diag(precision)
    right = torch.einsum("tnd,tn->td", x, y) + precision * eta["theta0"].detach()
    phi = {"w": torch.linalg.solve(a, right)}
    expected = precision * torch.linalg.solve(a, query)
    units = {"w": precision.rsqrt().expand(4, -1)}
    given = CG(preconditioner=lambda v: v)
    products = {}
    for name, solver, known in (
        ("plain", CG(), None),
        ("units", CG(), units),
        ("own", given, units),
        ("direct", Direct(), units),
    ):
        losses, stats = ImplicitAdjoint(solver, certify=False)(inner, outer, phi, eta, units=known)
        products[name] = int(stats["products"].max())
        torch.testing.assert_close(
            gradients(losses, eta)["theta0"], expected.sum(0), rtol=1e-7, atol=1e-9
        )
    assert products["units"] <= 8 + 1 < 20 <= products["plain"]
    assert products["own"] == products["plain"]  # a preconditioner of the caller's is kept


def test_a_loss_that_forgets_the_task_axis_is_refused():
    eta = ridge_eta()
    phi = {"w": ridge_minimum(eta)}

    def total(phi, eta):
        return ridge_query(phi, eta).sum()

    with pytest.raises(ValueError, match="outer objective must return one loss per task"):
        ImplicitAdjoint()(ridge_inner, total, phi, eta)
    with pytest.raises(ValueError, match="inner objective must return one loss per task"):
        ImplicitAdjoint()(total, ridge_query, phi, eta)
    for function in (unrolled, detached):
        with pytest.raises(ValueError, match="one loss per task"):
            function(total, phi, eta)


def test_the_number_of_evaluations_is_one_inner_graph_and_one_outer():
    calls = {"inner": 0, "outer": 0}

    def inner(phi, eta):
        calls["inner"] += 1
        return ridge_inner(phi, eta)

    def outer(phi, eta):
        calls["outer"] += 1
        return ridge_query(phi, eta)

    eta = ridge_eta()
    ImplicitAdjoint()(inner, outer, {"w": ridge_minimum(eta)}, eta)
    assert calls == {"inner": 1, "outer": 1}
