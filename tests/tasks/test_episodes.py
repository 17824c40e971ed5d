"""Few-shot episodes: whose rows they hold, that they are functions of a number, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import varmeta as vm
from tests.cases import adam

LABELS = torch.arange(120) // 12  # ten classes of twelve rows
ALPHABET = LABELS // 5
# a row is its class and its number
ROWS = torch.stack([LABELS.float(), torch.arange(120.0)], -1)


def test_an_episode_holds_rows_of_its_classes_and_none_twice() -> None:
    episodes = vm.episodes(ROWS, LABELS, ways=4, shots=2, queries=3, seed=5)
    for number in range(30):
        task = episodes[number]
        assert task.support is not None and task.query is not None
        (x, y), (query_x, query_y) = task.support, task.query
        assert y.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert query_y.tolist() == sorted([0, 1, 2, 3] * 3)
        named = torch.tensor([int(name) for name in episodes.classes_of(number)])
        assert len(named.unique()) == 4
        assert torch.equal(x[:, 0].long(), named[y])
        assert torch.equal(query_x[:, 0].long(), named[query_y])
        assert len(torch.cat([x, query_x])[:, 1].unique()) == 20


def test_an_episode_is_a_function_of_the_seed_and_its_number() -> None:
    one, other = (vm.episodes(ROWS, LABELS, 3, 1, 2, seed=7) for _ in range(2))
    assert one.take(20).first_difference(other.take(20)) is None
    assert one.take(5, start=15).first_difference(other.take(20)[15:]) is None
    other = vm.episodes(ROWS, LABELS, 3, 1, 2, seed=8)
    same = [torch.equal(one[k].support[0], other[k].support[0]) for k in range(50)]  # type: ignore[index]
    assert sum(same) <= 1


def test_every_class_and_row_has_the_same_chance() -> None:
    episodes = vm.episodes(ROWS, LABELS, ways=3, shots=1, queries=0)
    drawn = torch.stack([episodes[k].support[0][:, 1].long() for k in range(4000)])  # type: ignore[index]
    counts = drawn.flatten().bincount(minlength=120).double()
    expected = 12000 / 120
    # chi-squared with 119 degrees of freedom (the fixed number of ways makes it a little narrower)
    assert float((counts - expected).square().sum() / expected) < 180.0
    first = (drawn[:, 0] // 12).bincount(minlength=10).double()
    assert float((first - 400).square().sum() / 400) < 30.0


def test_all_classes_are_of_one_group() -> None:
    episodes = vm.episodes(ROWS, LABELS, 4, 1, 2, within=ALPHABET)
    met = set()
    for number in range(40):
        groups = {int(name) // 5 for name in episodes.classes_of(number)}
        assert len(groups) == 1
        met |= groups
    assert met == {0, 1}
    few = torch.where(LABELS == 9, 1, 0)  # a group of one class is left out
    left = vm.episodes(ROWS, LABELS, 4, 1, 2, within=few)
    assert "of 9 classes, 108 rows" in repr(left)


def test_augmentation_sees_whole_classes_and_a_generator_of_its_own() -> None:
    def turned(rows: Tensor, generator: torch.Generator) -> Tensor:
        assert rows.shape == (3, 3, 2)
        return rows + 1000.0 * torch.randint(4, (3, 1, 1), generator=generator)

    episodes = vm.episodes(ROWS, LABELS, 3, 1, 2, augment=turned)
    support, query = episodes[3].support, episodes[3].query
    assert support is not None and query is not None
    by = support[0][:, 0] // 1000
    assert torch.equal(by[query[1]], query[0][:, 0] // 1000)
    assert torch.equal(support[0], episodes[3].support[0])  # type: ignore[index]
    plain = vm.episodes(ROWS, LABELS, 3, 1, 2)
    assert torch.equal(support[0] % 1000, plain[3].support[0])  # type: ignore[index]


def test_labels_may_be_words_and_images_bytes() -> None:
    images = np.arange(8 * 4, dtype=np.uint8).reshape(8, 2, 2)
    episodes = vm.episodes(images, ["cat", "dog"] * 4, 2, 1, 2)
    assert set(episodes.classes_of(0)) == {"cat", "dog"}
    support = episodes[0].support
    assert support is not None and support[0].dtype == torch.uint8


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ways": 11}, "11 ways need as many classes, but labels has 10"),
        ({"queries": 12}, "class '0' has 12 rows, fewer than the 13"),
        ({"labels": LABELS[:-1]}, r"labels has shape \(119,\)"),
        ({"within": LABELS % 2, "labels": LABELS // 2}, "rows in several groups"),
        ({"within": LABELS // 2}, "no group of within has 5 classes: the largest has 2"),
        ({"ways": 0}, "ways must be a whole number"),
        ({"ways": (3, 4, 5)}, r"ways=\(3, 4, 5\) has 3 numbers"),
        ({"ways": (1, 3)}, "the least ways must be a whole number of at least 2"),
        (
            {"labels": torch.where(LABELS == 3, torch.nan, LABELS.double())},
            "labels is missing in 12 rows of 120, row 36",
        ),
        ({"labels": [None if k == 3 else str(k) for k in LABELS.tolist()]}, "labels is missing"),
        ({"labels": np.ma.masked_equal(LABELS.numpy(), 3)}, "labels is missing in 12 rows"),
        ({"within": np.where(LABELS > 3, np.nan, 1.0)}, "within is missing in 72 rows"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: dict[str, object], sentence: str) -> None:
    given = {"labels": LABELS, "ways": 5, "queries": 2} | options
    with pytest.raises(ValueError, match=sentence):
        vm.episodes(ROWS, **given)  # type: ignore[arg-type]


def test_an_augmentation_of_another_shape_is_refused() -> None:
    episodes = vm.episodes(ROWS, LABELS, 3, 1, 2, augment=lambda rows, generator: rows[:2])
    with pytest.raises(ValueError, match=r"augment gave \(2, 3, 2\) for rows of shape"):
        episodes[0]


def test_what_is_no_function_does_not_augment() -> None:
    with pytest.raises(TypeError, match="augment must be a function of"):
        vm.episodes(ROWS, LABELS, 3, augment=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="labels mixes kinds that have no order"):
        vm.episodes(ROWS, np.array([3, *["a"] * 119], dtype=object), 3)
    with pytest.raises(ValueError, match="images is a single number"):
        vm.episodes(3.0, LABELS, 3)


def test_classes_are_where_the_images_are() -> None:
    support = vm.episodes(torch.empty(120, 2, device="meta"), LABELS, 3, 1, 2)[0].support
    assert support is not None and support[1].device == support[0].device


def test_a_dataset_of_single_images_says_how_to_stack_it() -> None:
    pairs = torch.utils.data.TensorDataset(ROWS, LABELS)
    with pytest.raises(TypeError, match=r"torch\.stack\(\[image for image, _ in dataset\]\)"):
        vm.episodes(pairs, LABELS)
    loader = torch.utils.data.DataLoader(pairs)
    with pytest.raises(TypeError, match="images is a DataLoader, expected all images in one array"):
        vm.episodes(loader, LABELS)


@pytest.mark.filterwarnings("ignore:column 1 of x has mean")
def test_where_tasks_are_expected_episodes_say_how_to_take_some() -> None:
    episodes = vm.episodes(ROWS, LABELS, 3, 1, 2)
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    model = vm.TaskModel(net, vm.likelihoods.Categorical(3), vm.GaussianPrior(1.0))
    maml = vm.Unrolled("delta", inner_steps=1, minimizer=vm.GradientDescent(1e-4))
    fit = vm.fit(model, episodes, maml, 1, adam, batch_size=2)
    advice = r"an Episodes, which has .* no end: tasks\.take\(100\) makes a TaskSet"
    wrong: dict[str, Callable[[], object]] = {
        "TaskSet": lambda: vm.TaskSet(episodes),  # type: ignore[arg-type]
        "adapt": lambda: fit.adapt(episodes),  # type: ignore[arg-type]
        "validate": lambda: vm.fit(model, episodes, maml, 1, adam, 2, validate=episodes),  # type: ignore[arg-type]
        "Validation": lambda: vm.Validation(episodes),  # type: ignore[arg-type]
    }
    for call in wrong.values():
        with pytest.raises(TypeError, match=advice):
            call()
