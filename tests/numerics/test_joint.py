import csv
import math
from itertools import pairwise

import pytest
import scipy.optimize
import torch

from tests.conftest import shared_data
from varmeta.numerics.joint import minimize_jointly
from varmeta.numerics.solution import Result

torch.set_num_threads(1)
SCHOOLS = ([28.0, 8, -3, 7, -1, 1, 18, 12], [15.0, 10, 16, 11, 9, 11, 10, 18])


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- linear mixed models, whose ELBO is tight ------------------------------------------------------


def unit_lower(entries, size):
    rows, columns = torch.tril_indices(size, size, -1)
    flat = (
        torch.eye(size, dtype=entries.dtype)
        .expand(*entries.shape[:-1], size, size)
        .reshape(*entries.shape[:-1], -1)
    )
    return flat.scatter(-1, (rows * size + columns).expand(entries.shape), entries).unflatten(
        -1, (size, size)
    )


def prior_scale(eta):
    sd = torch.exp(-0.5 * eta["log_precision"])
    return sd.unsqueeze(-1) * unit_lower(eta["tril"], len(sd)) if "tril" in eta else torch.diag(sd)


def kl(phi, eta):
    size = len(eta["theta0"])
    factor = phi["log_scale"].exp().unsqueeze(-1) * unit_lower(phi["tril"], size)
    prior = prior_scale(eta)
    off = torch.linalg.solve_triangular(
        prior, (phi["loc"] - eta["theta0"]).unsqueeze(-1), upper=False
    )
    ratio = torch.linalg.solve_triangular(prior, factor, upper=False)
    quadratic = ratio.square().sum((-1, -2)) + off.square().sum((-1, -2)) - size
    return 0.5 * quadratic + prior.diagonal().log().sum() - phi["log_scale"].sum(-1), factor


def negative_elbo(x, y, mask, noise=None):
    """Of y = x theta + noise under a dense Gaussian guide; `noise` a known sd per row, else
    exp(eta["log_noise"]).
    """

    def fn(phi, eta):
        divergence, factor = kl(phi, eta)
        sd = eta["log_noise"].exp().expand(y.shape) if noise is None else noise
        square = (y - (x @ phi["loc"].unsqueeze(-1)).squeeze(-1)).square() + (
            x @ factor
        ).square().sum(-1)
        return divergence + (
            mask * (0.5 * square / sd**2 + sd.log() + 0.5 * math.log(2 * math.pi))
        ).sum(-1)

    return fn


def start(tasks, size, full=True, log_noise=True):
    """Everything at 0: unit precision, unit noise, theta0 far from raw data."""
    zeros = torch.zeros(tasks, size, dtype=torch.float64)
    pairs = size * (size - 1) // 2
    phi = {"loc": zeros, "log_scale": zeros.clone(), "tril": zeros.new_zeros(tasks, pairs)}
    eta = {"theta0": zeros.new_zeros(size), "log_precision": zeros.new_zeros(size)}
    eta |= {"tril": zeros.new_zeros(pairs)} if full else {}
    return phi, eta | ({"log_noise": zeros.new_zeros(())} if log_noise else {})


def negative_log_likelihood(x, y, mask, eta):
    """The closed form.  Padding is 0 in x and y, so it adds independent noise terms at 0, which are
    taken off again.
    """
    root, variance = x @ prior_scale(eta), torch.exp(2 * eta["log_noise"])
    covariance = root @ root.mT + variance * torch.eye(x.shape[1], dtype=x.dtype)
    total = torch.distributions.MultivariateNormal(x @ eta["theta0"], covariance).log_prob(y).sum()
    return -total - 0.5 * (1 - mask).sum() * torch.log(2 * math.pi * variance)


def maximum_likelihood(x, y, mask, full):
    """By scipy: theta0 by least squares for a start, then L-BFGS with torch's gradient, then
    Newton's polish.
    """
    size = x.shape[-1]
    _, eta = start(1, size, full)
    rows, targets = x[mask.bool()], y[mask.bool()]
    eta["theta0"] = torch.linalg.lstsq(rows, targets.unsqueeze(-1)).solution.squeeze(-1)
    spread = (targets - rows @ eta["theta0"]).std()
    eta["log_noise"] = spread.log()
    eta["log_precision"] = -2 * (spread / rows.square().mean(0).sqrt()).log()
    scale = torch.cat([v.abs().clamp(min=1).reshape(-1) for v in eta.values()])

    def unpack(v):
        parts = (v * scale).split([value.numel() for value in eta.values()])
        return {name: part.reshape(eta[name].shape) for name, part in zip(eta, parts, strict=True)}

    def value(v):
        return negative_log_likelihood(x, y, mask, unpack(v))

    def gradient(v):
        return torch.func.grad(value)(torch.as_tensor(v)).numpy()

    begin = torch.cat([v.reshape(-1) for v in eta.values()]) / scale
    found = scipy.optimize.minimize(
        lambda v: float(value(torch.as_tensor(v))),
        begin.numpy(),
        jac=gradient,
        method="BFGS",
        options={"gtol": 1e-5},
    )
    root = scipy.optimize.root(gradient, found.x, tol=1e-12)
    return unpack(torch.as_tensor(root.x)), float(value(torch.as_tensor(root.x)))


def padded(name, task, features, target):
    groups = {}
    with open(shared_data(name) / "data.csv") as file:
        for row in csv.DictReader(file):
            groups.setdefault(row[task], []).append((features(row), float(row[target])))
    shape = len(groups), max(map(len, groups.values()))
    y, mask = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    x = y.new_zeros(*shape, len(next(iter(groups.values()))[0][0]))
    for i, rows in enumerate(groups.values()):
        for j, (features_, target_) in enumerate(rows):
            x[i, j], y[i, j], mask[i, j] = double(*features_), target_, 1.0
    return x, y, mask


def synthetic(tasks=25, points=6, seed=1):
    x = torch.cat(
        [torch.ones(tasks, points, 1, dtype=torch.float64), 5 * randn(tasks, points, 1, seed=seed)],
        -1,
    )
    theta = double(250.0, -8.0) + randn(tasks, 2, seed=seed + 1) @ double([20.0, 1.0], [0.0, 4.0])
    y = (x @ theta.unsqueeze(-1)).squeeze(-1) + 12 * randn(tasks, points, seed=seed + 2)
    mask = torch.ones_like(y)
    mask[::3, 4:] = 0.0
    return x * mask.unsqueeze(-1), y * mask, mask


SETS = {
    "synthetic": synthetic,
    "sleepstudy": lambda: padded(
        "sleepstudy", "Subject", lambda r: (1.0, float(r["Days"])), "Reaction"
    ),
    "rats": lambda: padded("rats", "rat", lambda r: (1.0, float(r["day"]) - 22), "weight"),
    "rats, day raw": lambda: padded("rats", "rat", lambda r: (1.0, float(r["day"])), "weight"),
    "machines": lambda: padded(
        "machines", "Worker", lambda r: [float(r["Machine"] == k) for k in "ABC"], "score"
    ),
    "dyestuff": lambda: padded("dyestuff", "Batch", lambda r: (1.0,), "Yield"),
}


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("name", SETS)
def test_reaches_maximum_likelihood_from_zero(name, full):
    x, y, mask = SETS[name]()
    solution = minimize_jointly(negative_elbo(x, y, mask), *start(len(x), x.shape[-1], full))
    expected, value = maximum_likelihood(x, y, mask, full)
    assert solution.result == Result.CONVERGED
    assert solution.stats["steps"] <= 25
    assert solution.stats["loss"][-1] == pytest.approx(value, rel=1e-9)
    for entry, found in solution.eta.items():
        torch.testing.assert_close(found, expected[entry], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("log_precision", "log_noise", "theta0"), [(-6, 4, 0), (6, -2, 0), (-3, -3, 100), (4, 3, 0)]
)
def test_absurd_starts_end_in_the_same_place(log_precision, log_noise, theta0):
    x, y, mask = synthetic()
    expected = minimize_jointly(negative_elbo(x, y, mask), *start(len(x), 2, False))
    phi, eta = start(len(x), 2, False)
    phi["loc"], eta["theta0"] = phi["loc"] + theta0, eta["theta0"] + theta0
    phi["log_scale"], eta["log_precision"] = (
        phi["log_scale"] - log_precision / 2,
        eta["log_precision"] + log_precision,
    )
    eta["log_noise"] = eta["log_noise"] + log_noise
    solution = minimize_jointly(negative_elbo(x, y, mask), phi, eta)
    assert solution.result == Result.CONVERGED
    for entry, found in solution.eta.items():
        torch.testing.assert_close(found, expected.eta[entry], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("log_precision", "theta0"), [(0.0, 0.0), (-6.0, 0.0), (-10.0, 1000.0)])
def test_a_variance_whose_best_value_is_zero(log_precision, theta0):
    # eight schools: the marginal likelihood is maximal at tau = 0, where everything is pooled
    effect, sd = (double(*numbers).unsqueeze(-1) for numbers in SCHOOLS)
    phi, eta = start(8, 1, full=False, log_noise=False)
    phi = {
        "loc": phi["loc"] + theta0,
        "log_scale": phi["log_scale"] - log_precision / 2,
        "tril": phi["tril"],
    }
    eta = {"theta0": eta["theta0"] + theta0, "log_precision": eta["log_precision"] + log_precision}
    solution = minimize_jointly(
        negative_elbo(torch.ones(8, 1, 1).double(), effect, torch.ones_like(sd), sd), phi, eta
    )
    weight = sd**-2
    pooled = (weight * effect).sum() / weight.sum()
    infimum = -torch.distributions.Normal(pooled, sd).log_prob(effect).sum()
    assert solution.result == Result.CONVERGED
    assert solution.stats["steps"] <= 40
    assert solution.stats["loss"][-1] == pytest.approx(float(infimum), abs=1e-6)
    torch.testing.assert_close(solution.eta["theta0"], pooled.reshape(1), rtol=1e-6, atol=0.0)
    assert (
        float(torch.exp(-0.5 * solution.eta["log_precision"])) < 1e-2
    )  # beside standard deviations of 10 to 18


# -- other problems --------------------------------------------------------------------------------


def poisson_problem(tasks=20, points=5):
    """Counts with a Gaussian guide per task, in closed form; and a start."""
    x = torch.stack([torch.ones(tasks, points).double(), randn(tasks, points, seed=3)], -1)
    theta = double(1.5, -0.5) + 0.6 * randn(tasks, 2, seed=4)
    rate = (x @ theta.unsqueeze(-1)).squeeze(-1).exp()
    y = torch.poisson(rate, generator=torch.Generator().manual_seed(5))

    def fn(phi, eta):
        divergence, factor = kl(phi, eta)
        mean = (x @ phi["loc"].unsqueeze(-1)).squeeze(-1)
        return divergence + (torch.exp(mean + 0.5 * (x @ factor).square().sum(-1)) - y * mean).sum(
            -1
        )

    return fn, *start(tasks, 2, full=True, log_noise=False)


def quadratic_problem(tasks=4, seed=0):
    """A convex quadratic coupling a matrix and a number per task with a vector; its Hessian and
    gradient at 0.
    """
    sizes = (7, 3)
    root = randn(tasks, 10, 12, seed=seed)
    blocks, slope = root @ root.mT, randn(tasks, 10, seed=seed + 1)

    def fn(phi, eta):
        shared = eta["v"].expand(len(slope), 3)
        z = torch.cat([phi["matrix"].flatten(1), phi["number"].unsqueeze(-1), shared], -1)
        return 0.5 * (z * (blocks @ z.unsqueeze(-1)).squeeze(-1)).sum(-1) + (slope * z).sum(-1)

    m, p = sizes
    hessian, gradient = (
        torch.zeros(tasks * m + p, tasks * m + p).double(),
        torch.zeros(tasks * m + p).double(),
    )
    for i in range(tasks):
        index = torch.cat(
            [torch.arange(i * m, (i + 1) * m), torch.arange(tasks * m, tasks * m + p)]
        )
        hessian[index.unsqueeze(-1), index] += blocks[i]
        gradient[index] += slope[i]
    phi = {"matrix": torch.zeros(tasks, 2, 3).double(), "number": torch.zeros(tasks).double()}
    return fn, phi, {"v": torch.zeros(3).double()}, -torch.linalg.solve(hessian, gradient)


def test_a_quadratic_is_solved_by_one_step():
    fn, phi, eta, expected = quadratic_problem()
    one = minimize_jointly(fn, phi, eta, max_steps=1)
    whole = minimize_jointly(fn, phi, eta)
    for solution in (one, whole):
        found = torch.cat(
            [solution.phi["matrix"].flatten(1), solution.phi["number"].unsqueeze(-1)], -1
        )
        torch.testing.assert_close(
            torch.cat([found.reshape(-1), solution.eta["v"]]), expected, rtol=1e-10, atol=1e-10
        )
    assert one.result == Result.STEP_LIMIT
    assert whole.result == Result.CONVERGED
    assert whole.stats["gradient_norm"] < 1e-10
    assert all(
        float(value.abs().max()) == 0 for value in (*phi.values(), *eta.values())
    )  # the start is left alone


def test_a_poisson_model_against_scipy():
    fn, phi, eta = poisson_problem(tasks=10)
    solution = minimize_jointly(fn, phi, eta)
    shapes = [value.shape for value in (*phi.values(), *eta.values())]

    def value(flat):
        parts = [
            part.reshape(s)
            for part, s in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)
        ]
        return fn(
            dict(zip(phi, parts, strict=False)), dict(zip(eta, parts[len(phi) :], strict=True))
        ).sum()

    size = sum(s.numel() for s in shapes)
    found = scipy.optimize.minimize(
        lambda v: float(value(torch.as_tensor(v))),
        torch.zeros(size).double().numpy(),
        jac=lambda v: torch.func.grad(value)(torch.as_tensor(v)).numpy(),
        method="BFGS",
        options={"gtol": 1e-7, "maxiter": 5000},
    )
    flat = torch.cat([v.reshape(-1) for v in (*solution.phi.values(), *solution.eta.values())])
    assert solution.result == Result.CONVERGED
    assert solution.stats["loss"][-1] <= found.fun + 1e-9
    torch.testing.assert_close(flat, torch.as_tensor(found.x), rtol=1e-5, atol=1e-5)


def test_converges_quadratically():
    fn, phi, eta = poisson_problem()
    steps = minimize_jointly(fn, phi, eta).stats["steps"]
    decrements = [
        minimize_jointly(fn, phi, eta, max_steps=k).stats["decrement"]
        for k in range(steps - 4, steps + 1)
    ]
    small = [d for d in decrements if d < 0.1]
    # the decrement is a square of a distance, so quadratic convergence squares it; rounding ends
    # the sequence
    assert len(small) >= 2
    assert all(after <= 10 * before**2 + 1e-20 for before, after in pairwise(small))


def test_units_do_not_matter():
    fn, phi, eta = poisson_problem()
    plain = minimize_jointly(fn, phi, eta)
    units = {"loc": 1e3, "log_scale": 1e-4, "tril": 7.0, "theta0": 1e-3, "log_precision": 1e5}

    def rescale(values, power):
        return {name: value * units[name] ** power for name, value in values.items()}

    other = minimize_jointly(
        lambda p, e: fn(rescale(p, 1), rescale(e, 1)), rescale(phi, -1), rescale(eta, -1)
    )
    assert other.stats["steps"] == plain.stats["steps"]
    torch.testing.assert_close(other.stats["loss"], plain.stats["loss"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rescale(other.eta, 1), plain.eta, rtol=1e-7, atol=1e-7)


def test_without_eta_the_tasks_are_independent():
    target = double(1.0, -2.0, 5.0)
    solution = minimize_jointly(
        lambda phi, eta: (phi["w"] - target).cosh(), {"w": torch.zeros(3).double()}, {}
    )
    assert solution.result == Result.CONVERGED
    assert solution.eta == {}
    torch.testing.assert_close(solution.phi["w"], target, rtol=0, atol=1e-12)


def test_the_penalty_counts_once():
    # sum_i (w_i - t)^2 + (w_i - y_i)^2 leaves n/2 (t - mean)^2 + const for t; the penalty adds 3
    # t^2
    y = double(1.0, 2.0, 6.0)
    solution = minimize_jointly(
        lambda phi, eta: (phi["w"] - eta["t"]) ** 2 + (phi["w"] - y) ** 2,
        {"w": torch.zeros(3).double()},
        {"t": double(0.0).reshape(())},
        penalty=lambda eta: 3 * eta["t"] ** 2,
    )
    assert float(solution.eta["t"]) == pytest.approx(9 / (3 + 6), rel=1e-12)
    total = float(solution.stats["losses"].sum()) + 3 * float(solution.eta["t"]) ** 2
    assert solution.stats["loss"][-1] == pytest.approx(total, rel=1e-12)


def test_numbers_that_do_not_matter_are_left_alone():
    y = double(1.0, 2.0, 6.0)

    def fn(phi, eta):
        return (phi["w"][:, 0] - eta["t"][0]) ** 2 + (phi["w"][:, 0] - y).cosh()

    phi = {"w": torch.full((3, 2), 0.5).double(), "idle": torch.full((3,), 2.0).double()}
    eta = {"t": double(0.0, 4.0), "idle": double(-1.0)}
    solution = minimize_jointly(fn, phi, eta)
    assert solution.result == Result.CONVERGED
    for after, before in ((solution.phi["idle"], phi["idle"]), (solution.eta["idle"], eta["idle"])):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert float(solution.eta["t"][1]) == 4.0
    assert float(solution.eta["t"][0]) == pytest.approx(
        float(solution.phi["w"][:, 0].mean()), rel=1e-9
    )


def test_only_a_difference_matters():
    # eta["a"] and eta["b"] enter by their sum: a singular direction that is no axis
    y = double(1.0, 2.0, 6.0)
    solution = minimize_jointly(
        lambda phi, eta: (phi["w"] - eta["a"] - eta["b"]) ** 2 + (phi["w"] - y) ** 2,
        {"w": torch.zeros(3).double()},
        {"a": double(0.0).reshape(()), "b": double(1.0).reshape(())},
    )
    assert solution.result == Result.CONVERGED
    assert float(solution.eta["a"] + solution.eta["b"]) == pytest.approx(3.0, rel=1e-9)
    assert abs(float(solution.eta["a"])) < 1e3


@pytest.mark.parametrize("where", ["phi", "eta"])
def test_leaves_a_saddle(where):
    # at 0 the gradient vanishes and the curvature is negative; the minima are at -1 and 1
    def fn(phi, eta):
        double_well = phi["w"] if where == "phi" else eta["t"]
        other = eta["t"] if where == "phi" else phi["w"]
        return (double_well**2 - 1) ** 2 + (other - 2) ** 2

    solution = minimize_jointly(fn, {"w": torch.zeros(2).double()}, {"t": double(0.0).reshape(())})
    well = solution.phi["w"] if where == "phi" else solution.eta["t"]
    assert solution.result == Result.CONVERGED
    torch.testing.assert_close(well.abs(), torch.ones_like(well), rtol=1e-9, atol=0)


def test_a_start_that_is_not_finite_is_reported():
    y = double(1.0, -1.0, 2.0)
    solution = minimize_jointly(
        lambda phi, eta: (phi["w"] - eta["t"]) ** 2 + (phi["w"] + y).log(),
        {"w": torch.zeros(3).double()},
        {"t": double(0.0).reshape(())},
    )
    assert solution.result == Result.NON_FINITE
    assert solution.stats["losses"].isfinite().tolist() == [True, False, True]
    assert solution.stats["steps"] == 0


def test_a_barrier_is_not_crossed():
    # -log w is infinite or NaN beyond 0; Newton's first full steps would land there
    solution = minimize_jointly(
        lambda phi, eta: phi["w"] - (phi["w"] - eta["t"]).log() + eta["t"] ** 2,
        {"w": double(50.0, 9.0)},
        {"t": double(0.0).reshape(())},
    )
    assert solution.result == Result.CONVERGED
    assert float(solution.eta["t"]) == pytest.approx(-0.5, rel=1e-9)
    torch.testing.assert_close(solution.phi["w"], double(0.5, 0.5), rtol=1e-9, atol=0)


def test_numbers_near_the_end_of_the_floating_range():
    # the curvature at the start is 1e220, and the gradient's square is infinite
    solution = minimize_jointly(
        lambda phi, eta: phi["w"].exp() - phi["w"] + (phi["w"] - eta["t"]) ** 2,
        {"w": double(500.0, 1.0)},
        {"t": double(0.0).reshape(())},
        max_steps=1000,
    )
    assert solution.result == Result.CONVERGED
    torch.testing.assert_close(solution.phi["w"], torch.zeros(2).double(), rtol=0, atol=1e-9)


def test_operations_that_cannot_be_batched(monkeypatch):
    fn, phi, eta = poisson_problem(tasks=5)
    expected = minimize_jointly(fn, phi, eta)
    real, refused = torch.autograd.grad, []

    def grad(*args, is_grads_batched=False, **kwargs):
        if is_grads_batched:
            refused.append(1)
            raise RuntimeError("vmap: this operation has no batching rule")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    solution = minimize_jointly(fn, phi, eta)
    assert len(refused) == 1  # tried once, not at every step
    torch.testing.assert_close(solution.eta, expected.eta, rtol=1e-9, atol=1e-9)


def test_single_precision():
    fn, phi, eta = poisson_problem()
    expected = minimize_jointly(fn, phi, eta)

    def single(values):
        return {name: value.float() for name, value in values.items()}

    solution = minimize_jointly(
        lambda p, e: fn({k: v.double() for k, v in p.items()}, e).float(), single(phi), single(eta)
    )
    assert solution.result == Result.CONVERGED
    assert solution.eta["theta0"].dtype == torch.float32
    torch.testing.assert_close(solution.eta, single(expected.eta), rtol=1e-3, atol=1e-3)


def test_the_callback_sees_every_step():
    fn, phi, eta = poisson_problem()
    seen = []
    solution = minimize_jointly(
        fn, phi, eta, callback=lambda step: seen.append((step.number, step.loss))
    )
    assert [step for step, _ in seen] == list(range(1, solution.stats["steps"] + 1))
    assert [loss for _, loss in seen] == solution.stats["loss"][1:]
    assert all(after <= before + 1e-9 for before, after in pairwise(solution.stats["loss"]))


def test_no_steps_return_the_start():
    fn, phi, eta = poisson_problem()
    solution = minimize_jointly(fn, phi, eta, max_steps=0)
    assert solution.result == Result.STEP_LIMIT
    assert torch.equal(solution.phi["loc"], phi["loc"])
    assert solution.stats["loss"] == [pytest.approx(float(fn(phi, eta).sum()))]


@pytest.mark.parametrize(
    ("phi", "eta", "options", "error", "words"),
    [
        ({}, {}, {}, ValueError, "phi must hold numbers"),
        ({"w": torch.zeros(())}, {}, {}, ValueError, "task axis first"),
        ({"w": torch.zeros(2), "v": torch.zeros(3)}, {}, {}, ValueError, "same task axis"),
        ({"w": torch.zeros(2)}, {"t": torch.zeros(1).double()}, {}, TypeError, "one dtype"),
        ({"w": torch.zeros(2).long()}, {}, {}, TypeError, "floating"),
        ({"w": torch.zeros(2)}, {}, {"tolerance": -1.0}, ValueError, "tolerance"),
        ({"w": torch.zeros(2)}, {}, {"max_steps": 1.5}, ValueError, "max_steps"),
    ],
)
def test_wrong_arguments_are_refused(phi, eta, options, error, words):
    with pytest.raises(error, match=words):
        minimize_jointly(lambda phi, eta: phi["w"] ** 2, phi, eta, **options)


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda phi, eta: phi["w"].sum(), "one loss per task"),
        (lambda phi, eta: phi["w"].detach(), "no derivative"),
    ],
)
def test_wrong_functions_are_refused(fn, words):
    with pytest.raises(ValueError, match=words):
        minimize_jointly(fn, {"w": torch.zeros(2)}, {})


class _NoSlopeBeyond(torch.autograd.Function):
    """The identity, whose derivative is lost beyond 2: an exponential that overflows inside a curve
    that has levelled off.
    """

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return torch.where(ctx.saved_tensors[0] > 2.0, torch.nan, gradient)


def test_the_loss_of_a_run_that_breaks_off_is_that_of_the_point_returned() -> None:
    def fn(phi: dict[str, torch.Tensor], eta: dict[str, torch.Tensor]) -> torch.Tensor:
        return (_NoSlopeBeyond.apply(phi["w"]) - 3.0) ** 2 + (eta["e"] - 1.0) ** 2

    start = (
        {"w": torch.tensor([0.0], dtype=torch.float64)},
        {"e": torch.tensor(0.0, dtype=torch.float64)},
    )
    solution = minimize_jointly(fn, *start)
    assert solution.result == Result.DIVERGED
    assert solution.stats["loss"][-1] == float(fn(solution.phi, solution.eta).sum())


def _root(x: torch.Tensor) -> torch.Tensor:
    """Least, 1, at 0; Newton's step from -0.95 leads to 0.95 ** 3, where it is lower."""
    return (1.0 + x**2).sqrt()


def _wall(x: torch.Tensor) -> torch.Tensor:
    return _NoSlopeBeyond.apply(x)  # type: ignore[no-any-return]


def test_a_step_of_phi_to_where_a_derivative_is_lost_is_shortened() -> None:
    start = double(0.55, 1.45, 1.0)
    solution = minimize_jointly(lambda phi, eta: _root(_wall(phi["w"]) - 1.5), {"w": start}, {})
    assert solution.result == Result.CONVERGED and not solution.stats["failed"].any()
    torch.testing.assert_close(solution.phi["w"], torch.full_like(start, 1.5), rtol=0, atol=1e-8)
    history = solution.stats["loss"]
    assert all(after <= before for before, after in pairwise(history)) and math.isfinite(
        sum(history)
    )


def test_a_step_of_eta_to_where_a_derivative_is_lost_is_shortened() -> None:
    start = {"w": double(5.0, -3.0)}, {"t": double(0.55)}
    solution = minimize_jointly(
        lambda phi, eta: _root(_wall(eta["t"]) - 1.5) + (phi["w"] - eta["t"]) ** 2, *start
    )
    assert solution.result == Result.CONVERGED
    torch.testing.assert_close(solution.eta["t"], double(1.5), rtol=0, atol=1e-8)
    torch.testing.assert_close(solution.phi["w"], double(1.5, 1.5), rtol=0, atol=1e-8)


def test_a_minimum_beyond_a_wall_ends_at_the_wall_with_its_task_named() -> None:
    """The second task's best point is 3, and no derivative is finite beyond 2; the others are not
    held up by it.
    """
    calls, best = [], double(1.0, 3.0, -4.0)

    def fn(phi: dict[str, torch.Tensor], eta: dict[str, torch.Tensor]) -> torch.Tensor:
        calls.append(1)
        return (_wall(phi["w"]) - best) ** 2 + (eta["e"] - 1.0) ** 2

    solution = minimize_jointly(fn, {"w": double(0.0, 0.0, 0.0)}, {"e": double(0.0)})
    assert solution.result == Result.DIVERGED and len(calls) < 1000
    assert solution.stats["failed"].tolist() == [False, True, False]
    torch.testing.assert_close(
        solution.phi["w"], double(1.0, 2.0, -4.0), rtol=0, atol=0.01
    )  # half of what is left, a few times
    torch.testing.assert_close(solution.eta["e"], double(1.0), rtol=0, atol=1e-8)
    assert float(solution.phi["w"][1]) <= 2.0


def test_a_thin_wall_is_stepped_over() -> None:
    """A derivative is lost between 2 and 2.001 alone: a shorter step that does not end there is as
    good as any.
    """
    x = double(0.0)

    class Band(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            (x,) = ctx.saved_tensors
            return torch.where((x > 2.0) & (x < 2.001), torch.nan, gradient)

    solution = minimize_jointly(lambda phi, eta: (Band.apply(phi["w"]) - 3.0) ** 2, {"w": x}, {})
    assert solution.result == Result.CONVERGED
    torch.testing.assert_close(solution.phi["w"], double(3.0), rtol=0, atol=1e-8)


def test_an_infinite_total_has_not_converged() -> None:
    """Outside a hyperprior's support: every decrement is small beside it."""

    def wall(eta: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.where(eta["loc"] < 3.0, 0.0, torch.inf)

    def fn(phi: dict[str, torch.Tensor], eta: dict[str, torch.Tensor]) -> torch.Tensor:
        return (phi["w"] - centres) ** 2 + (phi["w"] - eta["loc"]) ** 2

    phi, eta = {"w": torch.zeros(2).double()}, {"loc": torch.tensor(5.0).double()}
    centres = torch.tensor([9.0, 11.0]).double()
    outside = minimize_jointly(fn, phi, eta, penalty=wall)
    assert outside.result == Result.NON_FINITE
    # a step that comes back inside is one
    centres = torch.tensor([1.0, 2.0]).double()
    back = minimize_jointly(fn, phi, eta, penalty=wall)
    assert back.result == Result.CONVERGED
    assert float(back.eta["loc"]) == pytest.approx(1.5)
