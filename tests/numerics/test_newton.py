import itertools
import math

import pytest
import scipy.optimize
import torch

from varmeta.numerics import tree
from varmeta.numerics.first_order import GradientDescent
from varmeta.numerics.minimize import minimize
from varmeta.numerics.newton import NewtonCG
from varmeta.numerics.solution import Result
from varmeta.numerics.steps import value_and_gradient

torch.set_num_threads(1)
DENSE, CG = NewtonCG(), NewtonCG(dense_size=0)
NEWTONS = pytest.mark.parametrize("newton", [DENSE, CG], ids=["dense", "cg"])


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_vector(function):
    """Losses of {"x": (tasks, size)} from a function of the coordinates."""
    return lambda phi: function(phi["x"].T)


def rosenbrock(x):
    return sum(100 * (b - a * a) ** 2 + (1 - a) ** 2 for a, b in itertools.pairwise(x))


def wood(x):
    a, b, c, d = x
    valleys = 100 * (a**2 - b) ** 2 + (a - 1) ** 2 + 90 * (c**2 - d) ** 2 + (c - 1) ** 2
    return valleys + 10.1 * ((b - 1) ** 2 + (d - 1) ** 2) + 19.8 * (b - 1) * (d - 1)


def beale(x):
    return sum((c - x[0] * (1 - x[1] ** k)) ** 2 for k, c in enumerate((1.5, 2.25, 2.625), 1))


def brown(x):
    return (x[0] - 1e6) ** 2 + (x[1] - 2e-6) ** 2 + (x[0] * x[1] - 2) ** 2


# -- quadratics: the answer is a linear solve ------------------------------------------------------


def quadratic(tasks=4, size=6):
    root = draw(tasks, size, size)
    a = root @ root.mT + torch.eye(size, dtype=torch.float64)
    b = draw(tasks, size, seed=1)
    like = {"w": b[:, :4].reshape(tasks, 2, 2), "scalar": b[:, 4], "v": b[:, 5:]}

    def fn(phi):
        x = tree.flatten(phi)
        return 0.5 * (x * (a @ x[..., None])[..., 0]).sum(-1) - (b * x).sum(-1)

    return fn, tree.zeros_like(like), a, b


@NEWTONS
def test_a_quadratic_is_a_linear_solve(newton):
    fn, phi, a, b = quadratic()
    solution = minimize(fn, phi, newton, tolerance=1e-13)
    assert solution.worst == Result.CONVERGED
    assert torch.allclose(
        tree.flatten(solution.value), torch.linalg.solve(a, b), rtol=1e-11, atol=1e-12
    )
    assert {name: x.shape for name, x in solution.value.items()} == {
        name: x.shape for name, x in phi.items()
    }
    assert not any(x.requires_grad for x in solution.value.values())


def test_the_direction_and_its_price():
    fn, phi, a, b = quadratic()
    one = minimize(fn, phi, DENSE, steps=1)
    assert torch.allclose(tree.flatten(one.value), torch.linalg.solve(a, b), rtol=1e-10)
    # loss and gradient twice, six Hessian products
    assert one.stats["evaluations"].tolist() == [2 + 2 * 6] * 4
    damped = minimize(fn, phi, NewtonCG(damping=3.0), steps=1).value
    expected = torch.linalg.solve(a + 3 * torch.eye(6, dtype=torch.float64), b)
    assert torch.allclose(tree.flatten(damped), expected, rtol=1e-10)
    # CG with all its steps, and its curvature: a Rayleigh quotient lies among the eigenvalues
    eigenvalues = torch.linalg.eigvalsh(a)
    for newton in (DENSE, CG):
        curvature = minimize(fn, phi, newton, steps=1).stats["curvature"]
        assert (curvature >= eigenvalues[:, 0] * (1 - 1e-12)).all()
        assert (curvature <= eigenvalues[:, -1]).all()


def test_limited_cg_is_steepest_descent_with_the_exact_step():
    fn, phi, a, b = quadratic()
    solution = minimize(fn, phi, NewtonCG(dense_size=0, max_cg_steps=1), steps=1)
    length = (b * b).sum(-1) / (b * (a @ b[..., None])[..., 0]).sum(-1)
    assert torch.allclose(tree.flatten(solution.value), length[:, None] * b, rtol=1e-12)
    assert solution.stats["evaluations"].tolist() == [2 + 2] * 4


# -- other functions: scipy, closed forms ----------------------------------------------------------


@NEWTONS
@pytest.mark.parametrize(
    ("function", "start", "minimum"),
    [
        (rosenbrock, (-1.2, 1.0), (1.0, 1.0)),
        (rosenbrock, (2.0,) * 6, (1.0,) * 6),
        (wood, (-3.0, -1.0, -3.0, -1.0), (1.0,) * 4),
        (beale, (1.0, 1.0), (3.0, 0.5)),
        (brown, (1.0, 1.0), (1e6, 2e-6)),
    ],
)
def test_agrees_with_scipy(newton, function, start, minimum):
    phi = {"x": double(start)}
    solution = minimize(of_vector(function), phi, newton, tolerance=1e-12)
    assert solution.worst == Result.CONVERGED

    def numpy_loss(x):
        value, _, gradient = value_and_gradient(of_vector(function), {"x": torch.tensor(x)[None]})
        return value.item(), gradient["x"][0].numpy()

    reference = scipy.optimize.minimize(
        numpy_loss, start, jac=True, method="BFGS", options={"gtol": 1e-8}
    )
    assert of_vector(function)(solution.value).item() <= reference.fun + 1e-12
    assert torch.allclose(solution.value["x"], double(minimum), rtol=1e-9)
    if function is not brown:  # scipy stops short of its minimum
        assert torch.allclose(solution.value["x"][0], torch.tensor(reference.x), atol=1e-6)


@NEWTONS
@pytest.mark.parametrize(
    ("function", "start", "minimum"),
    [
        (
            lambda w: w.exp() - 0.01 * w,
            (300.0, -300.0, 20.0),
            math.log(0.01),
        ),  # Newton: 300 steps of -1, or overflow
        (lambda w: (1 + w**2).log() + 1e-3 * w**2, (400.0, -3.0, 1.1), 0.0),  # concave far out
        (lambda w: 0.5 * (2 * w).exp() - w, (5.0, -5.0, -20.0), 0.0),  # a log scale in a KL
        (
            lambda w: (1 + w**2).sqrt(),
            (100.0, 1.0, -1.01),
            0.0,
        ),  # Newton's own step diverges for |w| >= 1
    ],
)
def test_far_starts(newton, function, start, minimum):
    solution = minimize(lambda phi: function(phi["w"]), {"w": double(*start)}, newton)
    assert solution.worst == Result.CONVERGED
    assert torch.allclose(solution.value["w"], double(minimum), rtol=0, atol=1e-7)
    assert solution.stats["steps"].max() <= 60


def test_units_do_not_matter():
    units = double(1e-5, 1.0, 1e4, 1e-2, 1e3, 1.0)
    phi = {"x": double((-1.2, 1.0) * 3)}
    plain = minimize(of_vector(rosenbrock), phi, DENSE)
    scaled = minimize(
        lambda phi: rosenbrock((phi["x"] * units).T),
        {"x": phi["x"] / units},
        DENSE,
        tolerance=1e-12,
    )
    assert torch.allclose(scaled.value["x"] * units, plain.value["x"], rtol=1e-7)
    assert scaled.stats["steps"] <= 2 * plain.stats["steps"]


def test_directions_in_given_units_take_fewer_products():
    """A regression with 10 points and 100 weights whose prior has precisions from 1 to 1e4."""
    x, y = draw(4, 10, 100), draw(4, 10, seed=1)
    precision = torch.logspace(0, 4, 100, dtype=torch.float64)

    def fn(phi):
        residual = y - (x @ phi["a"][..., None])[..., 0] - phi["b"][:, None]
        return (
            0.5 * residual.square().sum(-1)
            + 0.5 * (precision * phi["a"].square()).sum(-1)
            + phi["b"].square()
        )

    start = {"b": y.new_zeros(4), "a": y.new_zeros(4, 100)}
    units = {
        "a": precision.rsqrt().expand(4, -1),
        "b": y.new_ones(4),
    }  # found by name, whatever the order
    plain, scaled = (minimize(fn, start, CG, units=given) for given in (None, units))
    assert plain.worst == scaled.worst == Result.CONVERGED
    for name, value in plain.value.items():
        assert torch.allclose(value, scaled.value[name], rtol=1e-6, atol=1e-9), name
    # in these units H is 1 but for 10 directions
    assert scaled.stats["evaluations"].max() <= 0.4 * plain.stats["evaluations"].min()
    # of H, in phi's own units
    assert (scaled.stats["curvature"] >= 1.0 - 1e-9).all()


def test_units_do_not_undo_the_damping_or_the_look_at_signs():
    stiff = double(1.0, 1e6, 1.0, 1e6)
    root = stiff.sqrt()

    def fn(phi):
        return (phi["x"].square() * stiff).sum(-1) - 2 * (root * phi["x"]).sum(-1)

    def saddle(phi):
        return (phi["x"].square() * double(1.0, -1e-6, 1.0, 1e6)).sum(-1) + phi["x"].pow(4).sum(-1)

    phi = {"x": torch.zeros(1, 4, dtype=torch.float64)}
    units = {"x": stiff.rsqrt().expand(1, -1)}
    solution = minimize(fn, phi, NewtonCG(dense_size=0, damping=2.0), steps=1, units=units)
    assert torch.allclose(
        solution.value["x"], (2 * root / (2 * stiff + 2)).expand(1, -1), rtol=1e-6
    )

    start = {"x": double(1.0, 0.0, 1.0, 1.0)[None]}
    end = minimize(saddle, start, CG, units={"x": double(1.0, 1e3, 1.0, 1e-3)[None]})
    assert end.worst in (Result.CONVERGED, Result.NEGATIVE_CURVATURE)
    assert torch.allclose(end.value["x"], torch.zeros(1, 4, dtype=torch.float64), atol=1e-3)


def test_units_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="names and shapes of phi"):
        minimize(lambda phi: phi["x"] ** 2, {"x": double(1.0)}, CG, units={"x": double(1.0, 2.0)})
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="units must be positive and finite"):
            minimize(lambda phi: phi["x"] ** 2, {"x": double(1.0)}, CG, units={"x": double(wrong)})


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_only_the_ratios_of_units_matter(size):
    units = {"x": (size * torch.logspace(0, 2, 20)).expand(3, -1)}
    curvature = torch.logspace(0, -4, 20)
    start = {"x": draw(3, 20).float()}
    solution = minimize(lambda phi: (curvature * phi["x"].square()).sum(-1), start, CG, units=units)
    assert solution.worst == Result.CONVERGED
    assert solution.value["x"].abs().max() < 1e-3


def test_a_minimiser_that_knows_no_units_is_not_given_any():
    class Jump(GradientDescent):
        def solve(self, fn, phi, *, steps, tolerance, max_steps, create_graph):
            return super().solve(
                fn, phi, steps=1, tolerance=tolerance, max_steps=1, create_graph=create_graph
            )

    phi = {"x": double(1.0)}
    solution = minimize(lambda phi: phi["x"] ** 2, phi, Jump(0.5), units={"x": double(3.0)})
    assert solution.value["x"].item() == 0.0


def gaussian_elbo(x, y, prior_precision):
    """-ELBO of y ~ N(x theta, 1), theta ~ N(0, 1 / precision), q dense: phi = (loc, log_scale,
    tril), by cubature.
    """
    size = x.shape[-1]
    axes = math.sqrt(size) * torch.eye(size, dtype=x.dtype)
    points = torch.cat([axes, -axes])

    def fn(phi):
        factor = phi["log_scale"].exp()[..., None] * unit_lower(phi["tril"], size)
        theta = phi["loc"] + (factor @ points[:, None, :, None])[..., 0]
        residual = y - (x @ theta[..., None])[..., 0]
        quadratic = prior_precision * (factor.square().sum((-1, -2)) + phi["loc"].square().sum(-1))
        return 0.5 * residual.square().sum(-1).mean(0) + 0.5 * quadratic - phi["log_scale"].sum(-1)

    return fn


def unit_lower(tril, size):
    eye = torch.eye(size, dtype=tril.dtype).expand(len(tril), size, size)
    rows, columns = torch.tril_indices(size, size, -1)
    index = (torch.arange(len(tril))[:, None], rows, columns)
    return eye.index_put(index, tril)


@NEWTONS
@pytest.mark.parametrize("units", [(1.0, 1.0, 1.0), (1.0, 30.0, 0.05)])
def test_variational_posterior_from_a_poor_start(newton, units):
    tasks, points = 6, 15
    x = draw(tasks, points, 3) * double(units)
    x[..., 0] = 1
    y = 300 + (x @ draw(3, seed=1)) + draw(tasks, points, seed=2)
    phi = {
        "loc": 300 * draw(tasks, 3, seed=3),
        "log_scale": 5
        * (2 * torch.rand(tasks, 3, generator=torch.Generator().manual_seed(4)).double() - 1),
        "tril": draw(tasks, 3, seed=5),
    }
    solution = minimize(gaussian_elbo(x, y, 0.01), phi, newton, tolerance=1e-12)
    assert solution.worst == Result.CONVERGED
    precision = x.mT @ x + 0.01 * torch.eye(3, dtype=torch.float64)
    loc = torch.linalg.solve(precision, (x.mT @ y[..., None]))[..., 0]
    factor = solution.value["log_scale"].exp()[..., None] * unit_lower(solution.value["tril"], 3)
    assert torch.allclose(solution.value["loc"], loc, rtol=1e-8)
    assert torch.allclose(factor @ factor.mT, torch.linalg.inv(precision), rtol=1e-6, atol=1e-12)
    assert (
        solution.stats["gradient_norm"] <= 1e-11 * (1 + solution.stats["start_gradient_norm"])
    ).all()
    assert (solution.stats["curvature"] > 0).all()


def network(sizes, activation, tasks=3, points=10, dtype=torch.float64):
    x = (4 * draw(tasks, points, 1)).to(dtype)
    y = (2 * x[..., 0]).sin()
    prior = {
        f"{kind}{i}": (draw(*shape, seed=i) / a**0.5).to(dtype)
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
        for kind, shape in (("weight", (a, b)), ("bias", (b,)))
    }

    def fn(phi):
        h = x
        for i in range(len(sizes) - 1):
            h = h @ phi[f"weight{i}"] + phi[f"bias{i}"][:, None]
            h = activation(h) if i < len(sizes) - 2 else h
        penalty = sum((phi[name] - prior[name]).flatten(1).square().sum(-1) for name in prior)
        return (y - h[..., 0]).square().sum(-1) + 0.5 * penalty

    return fn, {name: w.expand(tasks, *w.shape).clone() for name, w in prior.items()}


@pytest.mark.parametrize("sizes", [(1, 16, 1), (1, 40, 1), (1, 20, 20, 1)])
def test_networks_to_the_last_digits(sizes):
    fn, phi = network(sizes, torch.tanh)
    solution = minimize(fn, phi, NewtonCG(), tolerance=1e-13)
    assert solution.worst == Result.CONVERGED
    _, _, gradient = value_and_gradient(fn, solution.value)
    assert torch.equal(tree.norm(gradient) < 1e-10, torch.ones(3, dtype=torch.bool))
    assert torch.allclose(tree.norm(gradient), solution.stats["gradient_norm"], atol=1e-12)
    # a minimum: no nearby point is lower
    for seed in range(10):
        nearby = tree.map_tree(
            lambda w, seed=seed: w + 1e-3 * draw(*w.shape, seed=seed), solution.value
        )
        assert (fn(nearby) > fn(solution.value)).all()


@pytest.mark.parametrize("newton", [DENSE, CG], ids=["dense", "cg"])
def test_kinks_end_soon(newton):
    """A ReLU network has its minima at kinks, where no gradient vanishes: lower than where Adam
    gets, and no creeping.
    """
    fn, phi = network((1, 12, 1), torch.relu)
    solution = minimize(fn, phi, newton)
    assert solution.stats["steps"].max() < 300
    assert set(solution.result.tolist()) <= {Result.CONVERGED, Result.STAGNATED}
    assert (fn(solution.value) < 0.6 * fn(phi)).all()


# -- ends ------------------------------------------------------------------------------------------


@NEWTONS
def test_finished_tasks_are_frozen_bit_for_bit(newton):
    """Five fates in one batch; what fn is asked at the rows of finished tasks is recorded."""
    asked = []

    def fn(phi):
        asked.append(phi["x"].detach().clone())
        x, y = phi["x"].T
        smooth = 100 * (y - x * x) ** 2 + (1 - x) ** 2
        bowl = (x - 1) ** 2 + (y + 2) ** 2
        saddle = x**2 - y**2 + y**4
        kink = (x - 0.3).abs() + y**2
        broken = bowl + 0 * (x - 5).log()
        return torch.stack([bowl[0], smooth[1], saddle[2], kink[3], broken[4]])

    start = {"x": double((1.0, -2.0), (-1.2, 1.0), (1.0, 0.0), (1.0, 1.0), (0.0, 0.0))}
    solution = minimize(fn, start, newton)
    names = [Result(int(code)).name for code in solution.result]
    assert names[:2] == ["CONVERGED", "CONVERGED"]
    assert names[3:] == ["STAGNATED", "NON_FINITE"]
    assert torch.allclose(solution.value["x"][1], double(1.0, 1.0))
    assert abs(solution.value["x"][3, 0] - 0.3) < 1e-3
    for row in (0, 4):
        assert solution.stats["steps"][row] == 0
        assert all(torch.equal(x[row], start["x"][row]) for x in asked)
    # the saddle needs one step, after which it stays while the Rosenbrock function takes its twenty
    final = solution.value["x"][2]
    first = next(i for i, x in enumerate(asked) if torch.equal(x[2], final))
    assert len(asked) > first + 15
    assert all(torch.equal(x[2], final) for x in asked[first:])


@pytest.mark.parametrize("newton", [DENSE, CG], ids=["dense", "cg"])
def test_a_saddle_is_not_called_a_minimum(newton):
    # on the ridge: what is to be gained across it is below the loss's rounding, the curvature is
    # not
    solution = minimize(
        of_vector(lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4), {"x": double((1.0, 1e-8))}, newton
    )
    assert solution.worst == Result.NEGATIVE_CURVATURE
    assert solution.stats["curvature"].item() == pytest.approx(-2)


@NEWTONS
def test_leaves_a_ridge(newton):
    solution = minimize(
        of_vector(lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4),
        {"x": double((1.0, 1e-3), (2.0, -0.1))},
        newton,
    )
    assert solution.worst == Result.CONVERGED
    assert torch.allclose(solution.value["x"].abs(), double((0.0, 0.5**0.5)), atol=1e-7)


@NEWTONS
@pytest.mark.parametrize("constant", [0.0, 1e9, -1e12])
def test_rounding_noise_is_no_loop(newton, constant):
    """With tolerance 0 nothing but rounding ends the iteration; a large constant hides the loss's
    last digits.
    """

    def fn(phi):
        x, y = phi["x"].T
        return constant + (x - 3) ** 2 * 1e3 + (y - 1).cosh() + 0.1 * x * y

    solution = minimize(fn, {"x": double((50.0, 4.0), (3.0, 1.0))}, newton, tolerance=0.0)
    assert solution.stats["steps"].max() < 40
    assert solution.stats["gradient_norm"].max() < 1e-10
    assert (
        minimize(fn, {"x": double((50.0, 4.0))}, newton, tolerance=1e-11).worst == Result.CONVERGED
    )


@NEWTONS
def test_float32(newton):
    fn, phi = network((1, 12, 1), torch.tanh, dtype=torch.float32)
    solution = minimize(fn, phi, newton)
    assert solution.worst == Result.CONVERGED
    assert all(
        x.dtype == torch.float32
        for x in [*solution.value.values(), solution.stats["gradient_norm"]]
    )
    assert (
        solution.stats["gradient_norm"] <= 1e-4 * (1 + solution.stats["start_gradient_norm"])
    ).all()
    assert minimize(fn, phi, newton, tolerance=0.0).stats["steps"].max() < 100


@NEWTONS
def test_a_poor_start_does_not_buy_a_loose_end(newton):
    """|g| starts at 1e13: relative to that a gradient of 1e5 would pass, with a loss a million
    above the minimum.
    """

    def fn(phi):
        x, y = phi["x"].T
        return 0.5 * x.exp() - x + 1e-4 * (y - 1e5) ** 2

    solution = minimize(fn, {"x": double((30.0, 0.0))}, newton)
    assert solution.stats["start_gradient_norm"] > 1e12
    assert torch.allclose(solution.value["x"], double((math.log(2), 1e5)), rtol=1e-6)


@NEWTONS
def test_a_hessian_that_is_not_finite(newton):
    solution = minimize(
        lambda phi: phi["w"].abs() ** 1.5 + phi["w"], {"w": double(0.0, -2.0)}, newton, steps=5
    )
    assert solution.result[0] == Result.NON_FINITE
    assert solution.value["w"][0] == 0
    assert torch.allclose(solution.value["w"][1], double(-4 / 9), rtol=1e-3)


@NEWTONS
def test_unbounded_below_ends(newton):
    solution = minimize(lambda phi: phi["w"], {"w": double(0.0)}, newton, max_steps=20)
    assert solution.worst == Result.STEP_LIMIT
    assert "step limit" in solution.worst.sentence
    assert solution.stats["steps"].item() == 20


@NEWTONS
def test_entries_that_are_unused_or_linear_or_numbers(newton):
    def fn(phi):
        return (
            (phi["number"] - 2) ** 2 + phi["flat"].sum(-1) * 0 + (phi["pair"] - 1).square().sum(-1)
        )

    phi = {
        "number": double(0.0),
        "unused": double((1.0, 2.0)),
        "flat": double((3.0,)),
        "pair": double((0.0, 9.0)),
    }
    solution = minimize(fn, phi, newton)
    assert solution.worst == Result.CONVERGED
    assert torch.equal(solution.value["unused"], phi["unused"])
    assert torch.equal(solution.value["flat"], phi["flat"])
    assert torch.allclose(solution.value["pair"], double((1.0, 1.0)))
    assert torch.allclose(solution.value["number"], double(2.0))
    # a gradient without a graph of its own
    start = {**phi, "linear": double(0.0)}
    solution = minimize(lambda phi: fn(phi) + phi["linear"], start, newton, steps=1)
    assert solution.value["linear"] < 0
    assert fn(solution.value) + solution.value["linear"] < fn(phi)


def test_one_parameter_at_its_minimum():
    solution = minimize(lambda phi: phi["w"] ** 2, {"w": double(0.0, 0.0)}, DENSE)
    assert solution.worst == Result.CONVERGED
    assert solution.stats["steps"].tolist() == [0, 0]
    assert solution.stats["evaluations"].tolist() == [1, 1]
    assert solution.stats["curvature"].isnan().all()


def test_at_most_k_steps():
    phi = {"x": double((-1.2, 1.0), (1.0, 1.0))}
    for steps in (0, 3, 100):
        solution = minimize(of_vector(rosenbrock), phi, DENSE, steps=steps)
        assert solution.stats["steps"][0] == min(steps, 20)
        assert solution.result[0] == (Result.CONVERGED if steps == 100 else Result.STEP_LIMIT)
        assert solution.result[1] == Result.CONVERGED
    assert solution.value["x"].data_ptr() != phi["x"].data_ptr()


class Cube(torch.autograd.Function):
    """w^3 without a batching rule."""

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w**3

    @staticmethod
    def backward(ctx, gradient):
        (w,) = ctx.saved_tensors
        return 3 * w**2 * gradient


class Square(torch.autograd.Function):
    """w^2 whose backward pass cannot be batched: it is an autograd function of its own."""

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w**2

    @staticmethod
    def backward(ctx, gradient):
        return 2 * Cube.apply(ctx.saved_tensors[0]) / ctx.saved_tensors[0] ** 2 * gradient


def test_functions_that_cannot_be_batched():
    phi = {"x": double((2.0, 3.0), (1.0, -4.0))}

    def loss(square):
        return lambda phi: (square(phi["x"]) + (phi["x"] - 1).exp()).sum(-1) + phi["x"].prod(-1)

    found, expected = (
        minimize(loss(square), phi, DENSE) for square in (Square.apply, torch.square)
    )
    assert found.worst == Result.CONVERGED
    assert torch.allclose(found.value["x"], expected.value["x"], rtol=1e-8)


def test_a_task_does_not_depend_on_its_company():
    quadratic_fn, phi, _, _ = quadratic()

    def fn(phi):
        return quadratic_fn(phi) + (0.1 * tree.flatten(phi)).cosh().sum(-1)

    together = minimize(fn, phi, DENSE, tolerance=1e-12)
    for i in range(4):

        def alone(row, i=i):
            return fn(tree.put(phi, torch.tensor([i]), row))[i : i + 1]

        solution = minimize(alone, tree.take(phi, torch.tensor([i])), DENSE, tolerance=1e-12)
        assert torch.allclose(
            tree.flatten(solution.value)[0], tree.flatten(together.value)[i], rtol=1e-10
        )
        assert solution.stats["steps"] == together.stats["steps"][i]


def test_steps_cannot_be_unrolled():
    with pytest.raises(ValueError, match="GradientDescent or Adam"):
        minimize(lambda phi: phi["w"] ** 2, {"w": double(1.0)}, DENSE, create_graph=True)


def test_runs_under_no_grad():
    with torch.no_grad():
        assert minimize(lambda phi: phi["w"] ** 4, {"w": double(1.0)}, CG).worst == Result.CONVERGED


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"max_cg_steps": 0}, "max_cg_steps"),
        ({"damping": -1.0}, "damping"),
        ({"damping": math.inf}, "damping"),
        ({"max_backtracks": -1}, "max_backtracks"),
        ({"dense_size": -1}, "dense_size"),
    ],
)
def test_bad_choices(choice, says):
    with pytest.raises(ValueError, match=says):
        NewtonCG(**choice)
