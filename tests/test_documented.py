"""Public names say shapes, what they raise, and show an example that runs.

The examples run as doctests (`--doctest-modules`); here is counted that there is one.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import torch

import varmeta as vm
from varmeta import datasets, guides, likelihoods, plot
from varmeta._checks import whole_number

PACKAGES = (datasets, guides, likelihoods, plot)
# What raises for its caller, so that the caller's docstring says so.
CHECKS = {"one_of", "whole_number", "probability", "positive_number", "no_task", "no_tensors"}
CHECKS |= {"positive"}
ARRAYS = re.compile(r"\b(Tensor|Tree|ndarray)\b")
# `(tasks, D)`, `(tasks,)`, `()`; or that it is one number, or of no kind in particular
SHAPE = re.compile(r"`\(([^`]*)\)`|\bscalar\b|\bshape", re.IGNORECASE)


def public() -> dict[str, Any]:
    """The classes and functions that users are given, by name."""
    found = {name: getattr(vm, name) for name in vm.__all__}
    for package in PACKAGES:
        short = package.__name__.rpartition(".")[2]
        names = getattr(package, "__all__", [name for name in vars(package) if name[0] != "_"])
        found |= {f"{short}.{name}": getattr(package, name) for name in names}
    return {
        name: made
        for name, made in found.items()
        if (inspect.isclass(made) or inspect.isfunction(made))
        and made.__module__.partition(".")[0] == "varmeta"
    }


def parts(name: str, made: Any) -> Iterator[tuple[str, Any]]:
    """A function itself; of a class how it is made, and its own public methods and properties."""
    if inspect.isfunction(made):
        yield name, made
        return
    for key, part in vars(made).items():
        part = getattr(part, "__func__", getattr(part, "fget", getattr(part, "func", part)))
        written = inspect.isfunction(part) and part.__code__.co_filename != "<string>"
        if written and (key[0] != "_" or key in ("__init__", "__post_init__")):
            yield f"{name}.{key}", inspect.unwrap(part)


def docstring(name: str, made: Any) -> str:
    """How it is made is told by the class."""
    key = name.rpartition(".")[2]
    if not inspect.isclass(made) or key in ("__init__", "__post_init__"):
        return inspect.getdoc(made) or ""
    # what a subclass leaves unsaid its base has said
    return inspect.getdoc(getattr(made, key)) or ""


def raises(part: Any) -> bool:
    """Whether it raises, or calls a check, in its own lines; not what it catches."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
    for inner in ast.walk(node):
        if isinstance(inner, ast.Raise) and inner.exc is not None:
            return "NotImplementedError" not in ast.unparse(inner.exc)
        if isinstance(inner, ast.Call) and ast.unparse(inner.func) in CHECKS:
            return True
    return False


def arrays(part: Any) -> bool:
    """Whether an argument, or what it returns, is annotated as tensors."""
    hints = {key: str(hint) for key, hint in part.__annotations__.items()}
    return any(ARRAYS.search(hint) for hint in hints.values())


def lacks(name: str, made: Any) -> Iterator[str]:
    text = inspect.getdoc(made) or ""
    methods = " ".join(inspect.getdoc(part) or "" for _, part in parts(name, made))
    if ">>>" not in text + methods:
        yield f"{name} has no example"
    for full, part in parts(name, made):
        said = docstring(full, made)
        if raises(part) and "Raises" not in said:
            yield f"{full} does not say what it raises"
        if arrays(part) and not SHAPE.search(said + text):
            yield f"{full} does not say the shapes of its tensors"


def test_public_names_say_shapes_errors_and_show_an_example() -> None:
    found = [lack for name, made in public().items() for lack in lacks(name, made)]
    assert not found, f"{len(found)}:\n" + "\n".join(found)


def test_every_package_is_looked_at() -> None:
    assert {"fit", "Fit", "guides.Dense", "likelihoods.Gaussian", "plot.plot_prior"} <= set(
        public()
    )
    assert {"datasets.lines", "datasets.radon"} <= set(public())


class Bare:
    """A thing."""

    def __init__(self, size: int) -> None:
        if size < 0:
            raise ValueError(size)

    def doubled(self, x: torch.Tensor) -> torch.Tensor:
        """Twice x."""
        return 2 * x


class Whole:
    """A thing.

    Raises ValueError for a negative size.

    >>> Whole(1).doubled(torch.ones(1))
    tensor([2.])
    """

    def __init__(self, size: int) -> None:
        whole_number("size", size)

    def doubled(self, x: torch.Tensor) -> torch.Tensor:
        """Twice x, `(n,)`."""
        return 2 * x

    def again(self) -> None:
        """Hands on an error, which is not its own."""
        try:
            pass
        except ValueError:
            raise


def test_what_is_left_unsaid_is_found() -> None:
    assert list(lacks("Bare", Bare)) == [
        "Bare has no example",
        "Bare.__init__ does not say what it raises",
        "Bare.doubled does not say the shapes of its tensors",
    ]
    assert not list(lacks("Whole", Whole))
