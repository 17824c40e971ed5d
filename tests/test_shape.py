"""Sizes that a reader can hold: functions, how deep they nest, what a class shows, and lines.

Docstrings are not code, so they do not count; comments do.  They have a shape of their own: the
first line says in a sentence what the thing is or does, the rest goes below.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import varmeta

ROOT = Path(varmeta.__file__).parent
MAX_LINES, MAX_DEPTH, MAX_MEMBERS, MAX_COLUMNS = 60, 4, 20, 100

Function = ast.FunctionDef | ast.AsyncFunctionDef
_BLOCKS = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.With,
    ast.AsyncWith,
    ast.Try,
    ast.TryStar,
    ast.Match,
)


def code_lines(function: Function) -> int:
    """Lines of the body, without the docstring."""
    head: list[ast.AST] = [function.args, *filter(None, [function.returns])]
    begins = max(
        [function.lineno]
        + [
            part.end_lineno or 0
            for top in head
            for part in ast.walk(top)
            if hasattr(part, "lineno")
        ]
    )
    if ast.get_docstring(function) is not None:
        begins = function.body[0].end_lineno or begins
    return (function.end_lineno or begins) - begins


def depth(node: ast.AST, level: int = 0) -> int:
    """How many blocks lie in each other below a node; `elif` is on the level of its `if`."""
    deepest = level
    for child in ast.iter_child_nodes(node):
        own = isinstance(child, _BLOCKS) and not _is_elif(node, child)
        deepest = max(deepest, depth(child, level + own))
    return deepest


def _is_elif(node: ast.AST, child: ast.AST) -> bool:
    # an `else:` with an `if` inside is indented
    return (
        isinstance(node, ast.If)
        and isinstance(child, ast.If)
        and node.orelse == [child]
        and child.col_offset == node.col_offset
    )


def members(made: ast.ClassDef) -> set[str]:
    """Methods, properties and annotated fields that a class adds, but for the private ones."""
    methods = {part.name for part in made.body if isinstance(part, Function)}
    fields = {
        part.target.id
        for part in made.body
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }
    return {name for name in methods | fields if not name.startswith("_")}


def oversize(root: Path) -> Iterator[str]:
    """What is larger than it may be, with its place and size."""
    for path in sorted(root.rglob("*.py")):
        text, at = path.read_text(), path.relative_to(root)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, Function):
                if (lines := code_lines(node)) > MAX_LINES:
                    yield f"{at}:{node.lineno} {node.name} has {lines} lines of code"
                if (levels := depth(node)) > MAX_DEPTH:
                    yield f"{at}:{node.lineno} {node.name} nests {levels} deep"
            elif isinstance(node, ast.ClassDef) and (number := len(members(node))) > MAX_MEMBERS:
                yield f"{at}:{node.lineno} {node.name} has {number} public members"
        for number, line in enumerate(text.splitlines(), 1):
            if len(line) > MAX_COLUMNS:
                yield f"{at}:{number} has {len(line)} columns"


def test_nothing_is_oversize() -> None:
    found = list(oversize(ROOT))
    assert not found, "\n".join(found)


HEADINGS = ("Args:", "Returns:", "Raises:", "Example:", "Examples:")


def public(node: ast.Module | ast.ClassDef) -> Iterator[Function | ast.ClassDef]:
    """Functions, classes and their members, but for the private ones and what is inside them."""
    for part in node.body:
        if isinstance(part, Function | ast.ClassDef) and not part.name.startswith("_"):
            yield part
            if isinstance(part, ast.ClassDef):
                yield from public(part)


def misshapen_docstrings(root: Path) -> Iterator[str]:
    """Where the first line is not a sentence by itself, and where the format is another one."""
    for path in sorted(root.rglob("*.py")):
        tree, at = ast.parse(path.read_text()), path.relative_to(root)
        for node in (tree, *public(tree)):
            docstring = ast.get_docstring(node)
            if docstring is None:
                continue
            who = f"{at} {getattr(node, 'name', 'as a whole')}"
            summary, _, more = docstring.partition("\n")
            if more.partition("\n")[0].strip() or not summary.endswith((".", "?")):
                yield f"{who} has a summary that is no sentence on one line: {summary!r}"
            for line in more.splitlines():
                if line.strip().startswith(HEADINGS):
                    yield f"{who} has a heading {line.strip()!r}: arguments stand as `name: ...`"


def test_docstrings_have_one_shape() -> None:
    found = list(misshapen_docstrings(ROOT))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("docstring", "found"),
    [
        ("What it is.", None),
        ("Is it?\n\nx: the thing.", None),
        ("What it is, which takes\n    another line.", "no sentence on one line"),
        ("What it is", "no sentence on one line"),
        ("What it is.\n    More of it.", "no sentence on one line"),
        ("What it is.\n\n    Args:\n        x: the thing.", "has a heading"),
        ("What it is.\n\n    Raises: ValueError.", "has a heading"),
    ],
)
@pytest.mark.parametrize("private", [False, True])
def test_every_docstring_is_looked_at(
    docstring: str, found: str | None, private: bool, tmp_path: Path
) -> None:
    name = "_f" if private else "f"
    (tmp_path / "one.py").write_text(f'class A:\n  def {name}():\n    """{docstring}"""\n')
    shapes = list(misshapen_docstrings(tmp_path))
    expected = None if private else found
    assert len(shapes) == (expected is not None) and (expected or "") in "".join(shapes)


def _function(lines: int, docstring: int = 0) -> str:
    said = ['    """' + "\n" * docstring + '    """'] if docstring else []
    return "\n".join(["def f():", *said, *["    x = 1"] * lines])


def _nested(*heads: str) -> str:
    blocks = ["  " * level + head for level, head in enumerate(("def f(x):", *heads))]
    tail = [
        "  " * level + "finally: x = 1"
        for level, head in reversed(list(enumerate(heads, 1)))
        if head == "try:"
    ]
    return "\n".join([*blocks, "  " * (1 + len(heads)) + "x = 1", *tail])


_FOUR = ("if x:", "for _ in x:", "while x:", "with x:")
_ELIF = "def f(x):\n  if x:\n    x = 1\n" + "  elif x:\n    x = 1\n" * 6


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (_function(60, docstring=30), None),
        (_function(61), "lines of code"),
        (_function(61, docstring=30), "lines of code"),
        ("class A:\n  def f():\n" + "    x = 1\n" * 61, "lines of code"),
        ("def f():\n" + "    # why\n" * 60 + "    x = 1", "lines of code"),
        (
            "def f(\n" + "".join(f"  x{n}: int,\n" for n in range(70)) + ") -> int:\n  return 1",
            None,
        ),
        ("def f():\n    x = 1\n" + "    # why\n" * 60 + "    x = 1", "lines of code"),
        ("def f():\n    x = (\n" + "        1 +\n" * 60 + "    1)", "lines of code"),
        (_nested(*_FOUR), None),
        (_nested("try:", *_FOUR[:3]), None),
        (_nested("try:", *_FOUR), "nests 5 deep"),
        (_nested(*_FOUR, "match x:", "case 1:"), "nests 5 deep"),
        (_nested(*_FOUR[:3], "def g(x):", "if x:", "if x:"), "nests 5 deep"),
        (_ELIF, None),
        ("class A:\n" + "".join(f"  x{n}: int\n  def f{n}(): ...\n" for n in range(10)), None),
        ("class A:\n" + "  y: int\n" * 3 + "  def _f(): ...\n" * 30, None),
        ("class A:\n" + "".join(f"  x{n}: int\n" for n in range(21)), "21 public members"),
        ("class A:\n" + "".join(f"  def x{n}(): ...\n" for n in range(21)), "21 public members"),
        ("x = 1  # " + "-" * 91, None),
        ("x = 1  # " + "-" * 92, "101 columns"),
    ],
)
def test_every_size_is_counted(text: str, found: str | None, tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(text)
    sizes = list(oversize(tmp_path))
    assert len(sizes) == (found is not None) and (found or "") in "".join(sizes)
