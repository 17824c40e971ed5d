"""The house: no import runs up, none runs in a circle, and the top level holds two files and the
public names.

Every import counts, also inside functions and under TYPE_CHECKING: what a reader must know of a
file is what it names.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import varmeta

ROOT = Path(varmeta.__file__).parent
# From the ground up; CONTRIBUTING.md says in a sentence what each is.
ROOMS = (
    "_checks",
    "files",
    "display",
    "graphs",
    "numerics",
    "tasks",
    "group",
    "datasets",
    "priors",
    "likelihoods",
    "models",
    "guides",
    "strategies",
    "fitting",
    "posteriors",
    "hyper",
    "results",
    "landscape",
    "plot",
    "verbs",
    "__init__",
)


def modules_of(root: Path) -> dict[str, Path]:
    """Every file by its dotted name below the package; a folder's `__init__` by the folder's
    name.
    """
    found = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(root: Path) -> dict[str, dict[str, int]]:
    """For every file the files of the package that it imports from, wherever in it, each with a
    line.
    """
    modules = modules_of(root)
    return {
        name: {
            target: line for target, line in _imports(path, root.name, modules) if target != name
        }
        for name, path in modules.items()
    }


def _imports(path: Path, package: str, modules: Mapping[str, Path]) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{path}:{node.lineno}: imports name their room, not a number of dots"
            )
            named = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for module, name in named:
            if module.partition(".")[0] != package:
                continue
            inside = module.partition(".")[2]
            longer = f"{inside}.{name}".strip(".")
            yield (longer if longer in modules else inside or "__init__"), node.lineno


def runs_up(root: Path) -> list[str]:
    def floor(name: str) -> int:
        return ROOMS.index(name.partition(".")[0])

    return [
        f"{name}:{line} imports {target}"
        for name, targets in imports_of(root).items()
        for target, line in targets.items()
        if floor(target) > floor(name)
    ]


def circle(root: Path) -> list[str]:
    try:
        TopologicalSorter(imports_of(root)).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_import_runs_up() -> None:
    assert not runs_up(ROOT)


def test_no_imports_in_a_circle() -> None:
    assert not circle(ROOT)


def test_two_files_at_the_top_level() -> None:
    assert {path.name for path in ROOT.iterdir() if path.suffix == ".py"} == {
        "__init__.py",
        "_checks.py",
    }
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(ROOMS) - {"__init__", "_checks"}


def test_the_door_shows_the_public_names_and_nothing_else() -> None:
    assert dir(varmeta) == sorted(varmeta.__all__)


@pytest.mark.parametrize(
    "lazy",
    [
        "from varmeta.verbs.fit import fit",
        "def one():\n    from varmeta.verbs import fit",
        "if TYPE_CHECKING:\n    import varmeta.verbs.fit",
        "def one():\n    import varmeta",
    ],
)
def test_every_kind_of_import_is_counted(lazy: str, tmp_path: Path) -> None:
    root = tmp_path / "varmeta"
    for name, text in {
        "numerics/tree.py": lazy,
        "verbs/fit.py": "from varmeta.numerics.tree import Tree",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "__init__.py").write_text("from varmeta.verbs.fit import fit")
    assert len(runs_up(root)) == 1 and set(circle(root)) >= {"numerics.tree", "verbs.fit"}
