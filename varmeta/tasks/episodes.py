"""N-way K-shot episodes drawn from labelled rows: a task for every number, the same each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from varmeta._checks import counted, kind_of, whole_number
from varmeta.numerics.noise import task_id
from varmeta.tasks.arrays import as_tensor
from varmeta.tasks.task import Task
from varmeta.tasks.taskset import TaskSet

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""(rows `(ways, shots + queries, *shape)`, generator) -> rows to learn from, as many"""


class Episodes:
    """What `episodes` returns: `episodes[number]` is a `Task`, for every number from 0 on.

    A number's task is a function of the seed and the number alone.  `fit` takes it as a stream,
    `take` makes a TaskSet of some.

    images: `(rows, ...)`; classes: of each class its rows, `(n,)`; groups: of each group its
        classes, `(k,)`.

    >>> import torch, varmeta as vm
    >>> digits, labels = torch.zeros(12, 1, 4, 4), ["a", "b", "c"] * 4
    >>> vm.episodes(digits, labels, ways=2, shots=1, queries=2, seed=0).take(3)
    TaskSet(3 tasks, 6 support points (2 to 2 per task),
            12 query points (4 to 4 per task), x (1, 4, 4), float32, y int64)
    """

    def __init__(
        self,
        images: Tensor,
        classes: list[Tensor],
        names: tuple[str, ...],
        groups: list[Tensor],
        ways: int | tuple[int, int],
        shots: int,
        queries: int,
        seed: int,
        augment: Augment | None,
    ) -> None:
        self._images, self._classes, self._groups = images, classes, groups
        self.class_names = names
        self.ways, self.shots, self.queries, self.seed = ways, shots, queries, seed
        self._augment = augment

    def __getitem__(self, number: int) -> Task:
        chosen, generator = self._chosen(number)
        size = self.shots + self.queries
        rows = torch.stack(
            [
                self._classes[c][torch.randperm(len(self._classes[c]), generator=generator)[:size]]
                for c in chosen
            ]
        )
        x = self._images[rows]
        if self._augment is not None:
            x = self._augmented(x, generator)
        y = torch.arange(len(chosen), device=x.device).unsqueeze(-1).expand(-1, size)
        support, query = (
            (x[:, part].flatten(0, 1), y[:, part].flatten())
            for part in (slice(0, self.shots), slice(self.shots, size))
        )
        known = {"ways": float(len(chosen))} if isinstance(self.ways, tuple) else None
        return Task(support, query if self.queries else None, f"episode {number}", known)

    def _augmented(self, x: Tensor, generator: torch.Generator) -> Tensor:
        assert self._augment is not None
        found = self._augment(x, generator)
        if not isinstance(found, Tensor) or found.shape[:2] != x.shape[:2]:
            came = tuple(found.shape) if isinstance(found, Tensor) else kind_of(found)
            raise ValueError(
                f"augment gave {came} for rows of shape {tuple(x.shape)}: expected a tensor with "
                "as many ways and rows of each"
            )
        return found

    def classes_of(self, number: int) -> tuple[str, ...]:
        """What the classes 0, 1, ... of an episode are called among the labels."""
        return tuple(self.class_names[c] for c in self._chosen(number)[0])

    def _chosen(self, number: int) -> tuple[list[int], torch.Generator]:
        """The classes of an episode, and the generator for what else is drawn."""
        number = whole_number("the number of an episode", number, 0)
        generator = torch.Generator().manual_seed(task_id(f"episode {number} of {self.seed}"))
        group = self._groups[int(torch.randint(len(self._groups), (), generator=generator))]
        ways = self.ways
        if isinstance(ways, tuple):
            most = min(ways[1], len(group))
            ways = int(torch.randint(ways[0], most + 1, (), generator=generator))
        order = torch.randperm(len(group), generator=generator)
        return group[order[:ways]].tolist(), generator

    def take(self, number: int, start: int = 0) -> TaskSet:
        """The episodes `start`, ..., `start + number - 1`, as for validation and tests.

        Raises ValueError or TypeError where `number` is no whole number of at least 1.
        """
        whole_number("number", number)
        return TaskSet(self[start + i] for i in range(number))

    def __repr__(self) -> str:
        # those that may be drawn, without the groups that are left out
        own = [len(self._classes[c]) for group in self._groups for c in group.tolist()]
        groups = f" within {len(self._groups)} groups" if len(self._groups) > 1 else ""
        return (
            f"Episodes({self.ways} ways, {self.shots} shots, {self.queries} queries, of "
            f"{len(own)} classes{groups}, {sum(own)} rows, seed={self.seed})"
        )


def episodes(
    images: Any,
    labels: Sequence[Any] | np.ndarray | Tensor,
    ways: int | tuple[int, int] = 5,
    shots: int = 1,
    queries: int = 15,
    seed: int = 0,
    *,
    within: Sequence[Any] | np.ndarray | Tensor | None = None,
    augment: Augment | None = None,
) -> Episodes:
    """Few-shot tasks drawn anew for every number: some classes, some rows of each.

    images: any rows `(n, *shape)`, tensor or array; uint8 stays uint8.
    labels: the class of each, numbers or strings, `(n,)`.
    ways: classes of an episode, called 0, ..., ways - 1 in it in random order; (least, most) for
        episodes of different numbers, which say theirs as the feature "ways":
        `likelihoods.Categorical(most, ways="ways")` holds the other classes at probability 0.
    shots, queries: rows of each class to adapt with and to be judged on.
    seed: episode k is a function of (seed, k).
    within: a group for each row, `(n,)`: all classes of an episode are of one group (the characters
        of one alphabet).  Groups with fewer classes than ways are left out.
    augment: `(rows, generator) -> rows` of an episode's `(ways, shots + queries, *shape)`, before
        they are split: so that a class may be turned as a whole.

    Raises ValueError for classes with too few rows (naming one), too few classes, arrays of
    different lengths, and labels or groups that are missing (None, NaN, masked); TypeError for a
    torch Dataset, whose images are still to be stacked.

    >>> import torch, varmeta as vm
    >>> images, labels = torch.randn(60, 8), torch.arange(60) // 6
    >>> tasks = vm.episodes(images, labels, ways=3, shots=1, queries=5)
    >>> tasks[7].support[1].tolist(), tasks.classes_of(7)
    ([0, 1, 2], ('1', '5', '6'))
    >>> tasks.take(100)
    TaskSet(100 tasks, 300 support points (3 to 3 per task),
            1500 query points (15 to 15 per task), x (8,), float32, y int64)
    """
    if isinstance(ways, tuple) and len(ways) != 2:
        raise ValueError(f"ways={ways} has {len(ways)} numbers: give one, or (least, most)")
    few, most = ways if isinstance(ways, tuple) else (ways, ways)
    for name, number in (("ways", few), ("the most ways", most), ("shots", shots)):
        whole_number(name, number)
    if isinstance(ways, tuple):
        whole_number("the least ways", few, 2)  # a task of one class has nothing to tell
    if augment is not None and not callable(augment):
        raise TypeError(f"augment must be a function of (rows, generator), not {kind_of(augment)}")
    if few > most:
        raise ValueError(f"ways={ways} has its larger number first: give (least, most)")
    whole_number("queries", queries, 0)
    whole_number("seed", seed, 0)
    rows = _rows(images)
    names, codes = _codes("labels", labels, len(rows))
    classes = [torch.from_numpy(np.flatnonzero(codes == k)) for k in range(len(names))]
    for name, own in zip(names, classes, strict=True):
        if len(own) < shots + queries:
            raise ValueError(
                f"class {name!r} has {counted(len(own), 'row')}, fewer than the {shots + queries} "
                "that shots and queries take: leave it out, or take fewer"
            )
    if within is not None:
        groups = _groups(within, codes, names, len(rows), few)
    elif len(names) < most:
        raise ValueError(f"{most} ways need as many classes, but labels has {len(names)}")
    else:
        groups = [torch.arange(len(names))]
    return Episodes(rows, classes, names, groups, ways, shots, queries, seed, augment)


def _rows(images: Any) -> Tensor:
    if isinstance(images, (Dataset, DataLoader)):
        raise TypeError(
            f"images is {kind_of(images)}, expected all images in one array (n, *shape), such as "
            "torch.stack([image for image, _ in dataset]), and the label of each in labels"
        )
    rows = as_tensor(images, "images")
    if not rows.dim():
        raise ValueError("images is a single number, expected rows (n, *shape)")
    return rows


def _codes(what: str, values: Any, number: int) -> tuple[tuple[str, ...], np.ndarray]:
    """The different values as strings, in order, and which each row has."""
    from pandas import isna

    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if array.shape != (number,):
        raise ValueError(
            f"{what} has shape {array.shape}, expected one for each of the {number} images, "
            f"({number},)"
        )
    missing = np.ma.getmaskarray(values) if isinstance(values, np.ma.MaskedArray) else isna(array)
    if missing.any():
        raise ValueError(
            f"{what} is missing in {counted(int(missing.sum()), 'row')} of {number}, row "
            f"{int(missing.argmax())} (counted from 0) first: leave these rows out"
        )
    try:
        found, codes = np.unique(array, return_inverse=True)
    except TypeError as error:
        raise TypeError(f"{what} mixes kinds that have no order ({error}): give strings") from error
    return tuple(str(value) for value in found.tolist()), codes


def _groups(
    within: Any, codes: np.ndarray, names: tuple[str, ...], number: int, ways: int
) -> list[Tensor]:
    """The classes of each group that has enough of them."""
    called, groups = _codes("within", within, number)
    owner = np.full(len(names), -1)
    for group in range(len(called)):
        own = np.unique(codes[groups == group])
        if (owner[own] >= 0).any():
            name = names[int(own[owner[own] >= 0][0])]
            raise ValueError(
                f"class {name!r} has rows in several groups of within: name classes apart, such as "
                "'alphabet/character'"
            )
        owner[own] = group
    found = [np.flatnonzero(owner == group) for group in range(len(called))]
    enough = [torch.from_numpy(own) for own in found if len(own) >= ways]
    if not enough:
        raise ValueError(
            f"no group of within has {ways} classes: the largest has {max(map(len, found))}"
        )
    return enough
