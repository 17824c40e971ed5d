"""Trees against the same arithmetic written as loops over tasks."""

import pytest
import torch

from varmeta.numerics import tree

TASKS = 4
SHAPES = {"bias": (), "weight": (3,), "matrix": (2, 5)}


def random_tree(seed, shapes=SHAPES, tasks=TASKS):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tasks, *s, generator=generator, dtype=torch.float64)
        for name, s in shapes.items()
    }


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "alpha", [-1.5, torch.tensor(2.0), torch.tensor([1.0, 0.0, -2.0, 3.0])], ids=repr
)
def test_add_and_scale_act_row_by_row(alpha):
    a, b = random_tree(0), random_tree(1)
    total, scaled = tree.add(a, b, alpha), tree.scale(b, alpha)
    per_task = torch.as_tensor(alpha, dtype=torch.float64).expand(TASKS)
    for name in a:
        assert total[name].shape == a[name].shape
        for i in range(TASKS):
            torch.testing.assert_close(total[name][i], a[name][i] + per_task[i] * b[name][i])
            torch.testing.assert_close(scaled[name][i], per_task[i] * b[name][i])


def test_dot_and_norm_are_those_of_each_task():
    a, b = random_tree(2), random_tree(3)
    expected = [sum(float((a[name][i] * b[name][i]).sum()) for name in a) for i in range(TASKS)]
    torch.testing.assert_close(tree.dot(a, b), torch.tensor(expected, dtype=torch.float64))
    squares = [sum(float(x[i].square().sum()) for x in a.values()) for i in range(TASKS)]
    torch.testing.assert_close(tree.norm(a), torch.tensor(squares, dtype=torch.float64).sqrt())


@pytest.mark.parametrize(
    "shapes", [SHAPES, {"only": ()}, {"only": (1,)}], ids=["mixed", "0-d", "1-d"]
)
def test_flatten_and_unflatten_are_inverse(shapes):
    a = random_tree(4, shapes)
    flat = tree.flatten(a)
    assert flat.shape == (TASKS, sum(x[0].numel() for x in a.values()))
    assert equal(tree.unflatten(flat, a), a)
    # the inner product is the same in both forms
    torch.testing.assert_close(tree.dot(a, a), (flat * flat).sum(-1))


def test_unflatten_takes_another_number_of_tasks():
    a = random_tree(5)
    assert equal(tree.unflatten(tree.flatten(a)[:2], a), tree.take(a, torch.tensor([0, 1])))


def test_where_takes_whole_rows():
    a, b = random_tree(6), random_tree(7)
    mask = torch.tensor([True, False, False, True])
    chosen = tree.where(mask, a, b)
    for i in range(TASKS):
        row = torch.tensor([i])
        assert equal(tree.take(chosen, row), tree.take(a if mask[i] else b, row))


def test_where_keeps_nan_of_the_other_side_out():
    a, b = random_tree(8), tree.scale(random_tree(9), float("nan"))
    assert equal(tree.where(torch.ones(TASKS, dtype=torch.bool), a, b), a)


def test_put_replaces_rows_in_a_copy():
    a, b = random_tree(10), random_tree(11, tasks=2)
    before = {name: x.clone() for name, x in a.items()}
    index = torch.tensor([3, 1])
    result = tree.put(a, index, b)
    assert equal(tree.take(result, index), b)
    rest = torch.tensor([0, 2])
    assert equal(tree.take(result, rest), tree.take(a, rest))
    assert equal(a, before)


def test_leaves_share_neither_memory_nor_graph():
    a = {name: x.requires_grad_() * 2 for name, x in random_tree(12).items()}
    copies = tree.leaves(a)
    assert equal(copies, tree.detach(a))
    for name, x in copies.items():
        assert x.is_leaf
        assert x.requires_grad
        assert x.data_ptr() != a[name].data_ptr()


def test_detach_and_zeros_like_carry_no_graph():
    a = {name: x.requires_grad_() for name, x in random_tree(13).items()}
    assert not any(x.requires_grad for x in tree.detach(a).values())
    zeros = tree.zeros_like(a)
    assert all(zeros[name].shape == a[name].shape and not zeros[name].any() for name in a)
    assert tree.num_tasks(a) == TASKS
