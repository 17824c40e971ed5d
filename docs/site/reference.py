"""The reference: every public name on the page of its package, by Sphinx's autodoc."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import varmeta

# the packages that have public names, in the order of a first reading, by their titles; one that
# is not here stands at the end under its own name
PACKAGES = {
    "verbs": "fit, compare, meta_gradient",
    "tasks": "Tasks",
    "datasets": "Data sets",
    "models": "Models",
    "priors": "The prior",
    "likelihoods": "Likelihoods",
    "strategies": "Strategies",
    "guides": "Guides",
    "results": "Fits",
    "posteriors": "Posteriors and predictions",
    "numerics": "Minimisers and linear solvers",
    "fitting": "On the way of a fit",
    "landscape": "Landscapes of one weight",
    "plot": "Figures",
    "display": "For a report of a bug",
}


def public() -> dict[str, Any]:
    """The public names as users write them, "varmeta.likelihoods.Gaussian"."""
    found: dict[str, Any] = {}
    for name in varmeta.__all__:
        value = getattr(varmeta, name)
        if inspect.ismodule(value):
            own = {f"varmeta.{name}.{part}": getattr(value, part) for part in value.__all__}
            found |= {full: part for full, part in own.items() if callable(part)}
        else:
            found[f"varmeta.{name}"] = value
    return found


def package_of(name: str, value: Any) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) == 3 else value.__module__.split(".")[1]


def members() -> set[str]:
    """The public names and those of their methods and properties, for links."""
    names = public()
    return {
        *names,
        *(
            f"{full}.{part}"
            for full, value in names.items()
            if inspect.isclass(value)
            for part in vars(value)
            if not part.startswith("_")
        ),
    }


def pages() -> dict[str, str]:
    """The Markdown of each package's page, by its name, and "index"."""
    names = public()
    of: dict[str, list[str]] = {package: [] for package in PACKAGES}
    for full, value in names.items():
        of.setdefault(package_of(full, value), []).append(full)
    written = {package: _page(package, own, names) for package, own in of.items()}
    rows = [
        f"| [{_title(package)}]({package}.md) | " + ", ".join(_link(name) for name in own) + " |"
        for package, own in of.items()
    ]
    tree = "```{toctree}\n:hidden:\n\n" + "\n".join(of) + "\n```\n"
    head = "# Reference\n\nEvery public name, by the package that holds it.\n\n| | |\n|---|---|\n"
    return written | {"index": head + "\n".join(rows) + "\n\n" + tree}


def _title(package: str) -> str:
    return PACKAGES.get(package, package.capitalize())


def _link(name: str) -> str:
    return f"{{py:obj}}`{name.removeprefix('varmeta.')} <{name}>`"


def _page(package: str, names: list[str], values: dict[str, Any]) -> str:
    says = (importlib.import_module(f"varmeta.{package}").__doc__ or "").strip()
    parts = [f"# {_title(package)}\n\n{says}\n"]
    for name in names:
        kind = "class" if inspect.isclass(values[name]) else "function"
        lines = [f".. auto{kind}:: {name}"] + ["   :members:"] * (kind == "class")
        body = "\n".join(lines)
        parts.append(f"```{{eval-rst}}\n{body}\n```\n")
    return "\n".join(parts)
