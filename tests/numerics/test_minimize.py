import math

import pytest
import scipy.optimize
import torch

from varmeta.numerics import tree
from varmeta.numerics.first_order import Adam, GradientDescent
from varmeta.numerics.minimize import minimize
from varmeta.numerics.solution import Result
from varmeta.numerics.steps import value_and_gradient

torch.set_num_threads(1)
RULES = [GradientDescent(lr=0.05), GradientDescent(0.03, momentum=0.5, clip=2.0), Adam(lr=0.05)]


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def start(tasks=3, seed=0):
    """A matrix, a vector and a number per task."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (tasks, 2, 3), "bias": (tasks, 2), "scale": (tasks,)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def bowl(phi):
    """Strictly convex, not quadratic; the tasks differ in steepness."""
    flat = tree.flatten(phi)
    steepness = torch.arange(1, len(flat) + 1, dtype=flat.dtype)
    return steepness * ((flat - 0.3).cosh().sum(-1) + 0.1 * flat.sum(-1) ** 2)


def step(rule, phi, state):
    return rule.update(phi, value_and_gradient(bowl, phi)[2], state)


@pytest.mark.parametrize(
    ("rule", "optimizer"),
    [
        (GradientDescent(lr=0.03), lambda p: torch.optim.SGD(p, lr=0.03)),
        (GradientDescent(0.03, momentum=0.7), lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.7)),
        (Adam(lr=0.03), lambda p: torch.optim.Adam(p, lr=0.03)),
        (
            Adam(0.1, (0.5, 0.8), 1e-3),
            lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.5, 0.8), eps=1e-3),
        ),
    ],
)
def test_the_rule_is_torchs(rule, optimizer):
    phi = start()
    leaves = tree.leaves(phi)
    reference = optimizer(leaves.values())
    for _ in range(40):
        reference.zero_grad()
        bowl(leaves).sum().backward()
        reference.step()
    solution = minimize(bowl, phi, rule, steps=40)
    for name, value in solution.value.items():
        assert torch.allclose(value, leaves[name], rtol=0, atol=1e-7)

    # and step by step, from the gradient
    by_step = phi, rule.init(phi)
    for _ in range(40):
        by_step = step(rule, *by_step)
    for name, value in solution.value.items():
        assert torch.equal(by_step[0][name], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adam_moves_in_every_dtype(dtype):
    """Its second beta is 1 in half precision."""
    phi = {"w": torch.ones(2, 3, dtype=dtype)}
    rule, gradient = Adam(lr=0.125, eps=1e-3), {"w": torch.full((2, 3), 2.0, dtype=dtype)}
    state = rule.init(phi)
    for _ in range(2):
        phi, state = rule.update(phi, gradient, state)
    assert phi["w"].dtype == dtype
    assert torch.allclose(
        phi["w"].double(), torch.full((2, 3), 0.75, dtype=torch.float64), atol=0.02
    )


def test_adam_where_the_gradient_is_tiny():
    """The term that keeps the root differentiable must not be seen beside eps, even where the
    gradient is far below.
    """
    phi = {"w": double(1.0, 1.0, 1.0)}
    leaves = tree.leaves(phi)
    optimizer = torch.optim.Adam(leaves.values(), lr=0.1)
    rule = Adam(lr=0.1)
    state = rule.init(phi)
    for gradient in ([1e-12, 1e-9, 0.0], [2e-12, -3e-9, 0.0]):
        leaves["w"].grad = double(*gradient)
        optimizer.step()
        phi, state = rule.update(phi, {"w": double(*gradient)}, state)
    assert torch.allclose(phi["w"] - 1, leaves["w"].detach() - 1, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_to_tolerance_agrees_with_scipy(rule):
    phi = start()
    solution = minimize(bowl, phi, rule, max_steps=20_000)
    assert solution.worst == Result.CONVERGED
    for i in range(3):
        row = tree.take(phi, torch.tensor([i]))

        def loss(x, row=row, i=i):
            at = tree.unflatten(torch.tensor(x)[None], row)
            padded = tree.put(phi, torch.tensor([i]), at)
            value, _, gradient = value_and_gradient(bowl, padded)
            return value[i].item(), tree.flatten(gradient)[i].numpy()

        expected = scipy.optimize.minimize(
            loss, tree.flatten(row)[0].numpy(), jac=True, options={"gtol": 1e-9}
        )
        assert torch.allclose(
            tree.flatten(solution.value)[i], torch.tensor(expected.x), rtol=0, atol=1e-6
        )
    initial, final = (tree.norm(value_and_gradient(bowl, at)[2]) for at in (phi, solution.value))
    assert (final <= 1e-8 * (1 + initial)).all()
    assert torch.allclose(final, solution.stats["gradient_norm"])
    assert torch.equal(solution.stats["evaluations"], solution.stats["steps"] + 1.0)
    assert not any(x.requires_grad for x in solution.value.values())


@pytest.mark.parametrize("rule", RULES)
def test_finished_tasks_do_not_move(rule):
    target = double(0.0, 1.0, 100.0)
    curvature = double(1.0, 1.0, 0.01)

    def fn(phi):
        return curvature * (phi["w"] - target) ** 2

    begin = {"w": double(0.0, 3.0, 0.0)}
    alone = [
        minimize(
            lambda phi, i=i: fn({"w": phi["w"].expand(3)})[i : i + 1],
            {"w": begin["w"][i : i + 1]},
            rule,
        )
        for i in range(2)
    ]
    together = minimize(fn, begin, rule)
    assert together.result.tolist() == [Result.CONVERGED, Result.CONVERGED, Result.STEP_LIMIT]
    assert together.stats["steps"][0] == 0
    assert together.stats["steps"][2] == 1000
    for i, solution in enumerate(alone):
        assert torch.equal(together.value["w"][i : i + 1], solution.value["w"])
        for name in solution.stats:
            assert torch.equal(together.stats[name][i : i + 1], solution.stats[name])


@pytest.mark.parametrize("rule", RULES)
def test_exactly_k_steps(rule):
    phi = {"w": double(0.0, 1.0)}
    for steps in (0, 1, 7):
        solution = minimize(lambda phi: phi["w"] ** 2, phi, rule, steps=steps)
        assert solution.stats["steps"].tolist() == [steps, steps]
        assert solution.result.tolist() == [Result.STEP_LIMIT, Result.STEP_LIMIT]
        assert solution.stats["evaluations"].tolist() == [steps + 0.5, steps + 0.5]
        assert solution.value["w"].data_ptr() != phi["w"].data_ptr()


def test_a_rule_that_climbs_has_diverged():
    """Steps beyond 2 / curvature: the second task, of curvature 10, ends above its start, however
    few the steps.
    """
    scale = double(1.0, 10.0)
    for steps, graph in ((3, False), (3, True), (None, False)):
        phi = {"w": double(1.0, 1.0)}
        solution = minimize(
            lambda phi: 0.5 * scale * phi["w"] ** 2,
            phi,
            GradientDescent(0.3),
            steps=steps,
            max_steps=3,
            create_graph=graph,
        )
        assert solution.result.tolist() == [Result.STEP_LIMIT, Result.DIVERGED]
    assert "lower its step size" in solution.worst.sentence


def test_gradient_descent_closed_form_through_the_graph():
    """K steps on c/2 (w - t)^2 give w = t + (1 - lr c)^K (w0 - t): value and derivatives."""
    w0, t, c = (x.requires_grad_() for x in (double(2.0, -1.0), double(0.5), double(1.3)))
    solution = minimize(
        lambda phi: 0.5 * c * (phi["w"] - t) ** 2,
        {"w": w0},
        GradientDescent(lr=0.1),
        steps=6,
        create_graph=True,
    )
    expected = t + (1 - 0.1 * c) ** 6 * (w0 - t)
    assert torch.allclose(solution.value["w"], expected, rtol=0, atol=1e-14)
    found = torch.autograd.grad(solution.value["w"].square().sum(), [w0, t, c])
    wanted = torch.autograd.grad(expected.square().sum(), [w0, t, c])
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)
    assert not any(stat.requires_grad for stat in solution.stats.values())


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_a_clipped_heavy_ball_is_a_loop_over_tasks(momentum):
    """Each task by itself, its gradient clipped by torch, in some of the steps."""
    rule, phi = GradientDescent(0.05, momentum=momentum, clip=3.0), start()
    solution, clipped = minimize(bowl, phi, rule, steps=25), []
    for i in range(3):
        leaves = tree.leaves(tree.take(phi, torch.tensor([i])))
        optimizer = torch.optim.SGD(leaves.values(), lr=0.05, momentum=momentum)
        for _ in range(25):
            optimizer.zero_grad()
            ((i + 1) * bowl(leaves).sum()).backward()
            norm = torch.nn.utils.clip_grad_norm_(leaves.values(), 3.0)
            clipped.append(float(norm) > 3.0)
            optimizer.step()
        for name, value in leaves.items():
            # torch adds 1e-6 to the norm
            assert torch.allclose(solution.value[name][i], value[0], rtol=0, atol=3e-6)
    assert 10 < sum(clipped) < 65


def test_a_clipped_gradient_of_0_can_be_differentiated():
    w = double(0.0, 1.0).requires_grad_()
    rule = GradientDescent(0.1, clip=0.5)
    end = minimize(lambda phi: phi["w"] ** 2, {"w": w}, rule, steps=1, create_graph=True).value
    assert torch.equal(end["w"].detach(), double(0.0, 0.95))
    (found,) = torch.autograd.grad(end["w"].sum(), w)
    assert torch.allclose(found, double(0.8, 1.0))  # clipped, the step has lost its slope


@pytest.mark.parametrize(
    "rule",
    [
        GradientDescent(lr=0.02),
        GradientDescent(lr=0.02, momentum=0.5, clip=2.0),
        Adam(lr=0.02),
    ],
)
@pytest.mark.parametrize("options", [{"steps": 5}, {"tolerance": 0.5, "max_steps": 60}])
def test_unrolled_derivative_against_finite_differences(rule, options):
    phi = start(tasks=2)

    def outer(shift, create_graph):
        value = minimize(
            lambda phi: bowl(tree.map_tree(lambda x: x - shift, phi)),
            phi,
            rule,
            **options,
            create_graph=create_graph,
        ).value
        return tree.flatten(value).square().sum()

    shift = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(outer(shift, True), shift)
    h = 1e-5
    expected = (outer(shift.detach() + h, False) - outer(shift.detach() - h, False)) / (2 * h)
    assert torch.allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_unrolled_adam_at_a_zero_gradient(dtype):
    """Where the gradient is 0 the first step's derivative is that of lr g / eps: 1 - lr f'' /
    eps.
    """
    w = torch.zeros(2, dtype=dtype, requires_grad=True)
    solution = minimize(
        lambda phi: phi["w"] ** 2, {"w": w}, Adam(lr=0.01, eps=0.1), steps=1, create_graph=True
    )
    (found,) = torch.autograd.grad(solution.value["w"].sum(), w)
    assert torch.allclose(found, torch.full_like(w, 1 - 0.01 * 2 / 0.1), rtol=1e-5)


def test_a_start_without_a_graph_can_be_unrolled():
    eta = double(3.0).requires_grad_()
    solution = minimize(
        lambda phi: (phi["w"] - eta) ** 2,
        {"w": double(0.0)},
        GradientDescent(lr=0.25),
        steps=1,
        create_graph=True,
    )
    assert torch.autograd.grad(solution.value["w"].sum(), eta)[0].item() == 0.5


@pytest.mark.parametrize("options", [{}, {"steps": 30}])
def test_a_task_that_breaks_keeps_its_last_finite_point(options):
    def fn(phi):
        # log(0) and below from the second task's fourth step on; the third starts there
        w = phi["w"]
        return torch.where(
            torch.tensor([True, False, False]), (w - 1) ** 2, w + 0 * (w - 0.65).log()
        )

    solution = minimize(fn, {"w": double(0.0, 1.0, 0.0)}, GradientDescent(lr=0.1), **options)
    assert solution.result[1:].tolist() == [Result.NON_FINITE, Result.NON_FINITE]
    assert solution.result[0] == (Result.STEP_LIMIT if options else Result.CONVERGED)
    assert torch.allclose(solution.value["w"][1], double(0.7))
    assert solution.value["w"][2] == 0
    assert solution.stats["steps"][1:].tolist() == [3, 0]
    # after a fixed number of steps nobody has asked for the gradient
    assert (
        solution.stats["gradient_norm"][1].isnan()
        if options
        else solution.stats["gradient_norm"][1] == 1
    )
    assert "finite" in solution.worst.sentence


def test_divergence_ends_as_non_finite():
    solution = minimize(lambda phi: phi["w"] ** 4, {"w": double(3.0, 0.0)}, GradientDescent(lr=1.0))
    assert solution.result.tolist() == [Result.NON_FINITE, Result.CONVERGED]
    assert solution.value["w"].isfinite().all()


@pytest.mark.parametrize("rule", RULES)
def test_state_has_the_task_axis_first(rule):
    phi = start()
    state = step(rule, phi, rule.init(phi))[1]
    assert all(len(x) == 3 for x in state.values())
    # a row that is put back to the start behaves as on its first step, whatever the others do
    if state:
        mixed = tree.put(state, torch.tensor([1]), tree.take(rule.init(phi), torch.tensor([1])))
        fresh = step(rule, phi, rule.init(phi))[0]
        found = step(rule, phi, mixed)[0]
        assert torch.equal(tree.flatten(found)[1], tree.flatten(fresh)[1])


@pytest.mark.parametrize("rule", RULES)
def test_lr_scale(rule):
    phi = {"w": double(1.0, 1.0), "v": torch.ones(2, 3, dtype=torch.float64)}
    gradient = tree.map_tree(lambda x: 2 * x, phi)
    full, half, each = (
        tree.flatten(rule.update(phi, gradient, rule.init(phi), scale)[0]) - 1
        for scale in (1.0, torch.tensor(0.5), double(1.0, 0.5))
    )
    assert torch.allclose(half, full / 2)
    assert torch.allclose(each, torch.stack([full[0], full[1] / 2]))


def test_entries_that_do_not_matter_stay():
    phi = {"w": double(2.0), "unused": double(5.0)}
    solution = minimize(lambda phi: phi["w"] ** 2, phi, Adam(lr=0.1), steps=3)
    assert solution.value["unused"] == 5


def test_runs_under_no_grad():
    with torch.no_grad():
        solution = minimize(lambda phi: phi["w"] ** 2, {"w": double(1.0)}, GradientDescent(lr=0.5))
    assert solution.worst == Result.CONVERGED


def test_float32_and_its_tolerance():
    phi = {"w": torch.tensor([4.0, -3.0])}
    solution = minimize(lambda phi: (phi["w"] - 1) ** 2, phi, GradientDescent(lr=0.1))
    assert solution.worst == Result.CONVERGED
    assert solution.value["w"].dtype == solution.stats["gradient_norm"].dtype == torch.float32
    assert torch.allclose(solution.value["w"], torch.ones(2), atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        (({},), {}, ValueError, "no entries"),
        (({"w": torch.zeros(2, dtype=torch.int64)},), {}, TypeError, "floating"),
        (({"w": torch.zeros(2), "v": double(0.0, 0.0)},), {}, TypeError, "one dtype"),
        (({"w": torch.zeros(2), "v": torch.zeros(3)},), {}, ValueError, "task axis"),
        (({"w": torch.zeros(())},), {}, ValueError, "task axis"),
        (({"w": torch.zeros(2)},), {"steps": -1}, ValueError, "steps"),
        (({"w": torch.zeros(2)},), {"steps": 0.5}, TypeError, "steps"),
        (({"w": torch.zeros(2)},), {"tolerance": -1.0}, ValueError, "tolerance"),
        (({"w": torch.zeros(2)},), {"tolerance": math.nan}, ValueError, "tolerance"),
        (({"w": torch.zeros(2, 3)},), {}, ValueError, r"one loss per task, shape \(2,\)"),
    ],
)
def test_bad_input(arguments, options, error, says):
    with pytest.raises(error, match=says):
        minimize(lambda phi: phi["w"] ** 2, *arguments, GradientDescent(), **options)


def test_losses_without_a_graph():
    with pytest.raises(ValueError, match="no graph back to phi"):
        minimize(lambda phi: phi["w"].detach(), {"w": torch.zeros(2)}, GradientDescent())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: GradientDescent(lr=0.0), "lr must be a positive"),
        (lambda: GradientDescent(momentum=1.0), r"momentum must be a number in \[0, 1\)"),
        (lambda: GradientDescent(clip=0.0), "clip must be a positive"),
        (lambda: Adam(lr=math.nan), "lr must be a positive"),
        (lambda: Adam(betas=(0.9, 1.0)), "betas"),
        (lambda: Adam(eps=0.0), "eps"),
    ],
)
def test_bad_choices(make, says):
    with pytest.raises(ValueError, match=says):
        make()
