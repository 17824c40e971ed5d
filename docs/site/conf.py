"""Sphinx's settings: nothing is fetched, neither here nor by who reads the pages."""

from __future__ import annotations

import inspect
from typing import Any

import varmeta
from docs.site import docstrings, reference

project = "varmeta"
author = "The varmeta developers"
version = release = varmeta.__version__
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
root_doc = "index"
exclude_patterns = ["notebooks/*"]

myst_heading_anchors = 4  # the anchors that GitHub makes, to which the pages link
suppress_warnings = ["myst.header"]  # CHANGELOG begins a section with a deeper heading
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # a method that says nothing of its own is told with its base
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

smartquotes = False  # a second derivative is two quotes

html_theme = "furo"
html_title = "varmeta"
html_static_path = ["_static"]
html_css_files = ["varmeta.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f3a5f", "color-brand-content": "#2a5d9f"},
    "dark_css_variables": {"color-brand-primary": "#a9c6ea", "color-brand-content": "#8ab4e8"},
}
pygments_style, pygments_dark_style = "friendly", "monokai"

PUBLIC = reference.members()
# a __new__ that looks at its arguments hides from autodoc what __init__ takes
HIDDEN = [value for value in reference.public().values() if inspect.isfunction(value.__new__)]
for value, signature in [(value, inspect.signature(value)) for value in HIDDEN]:
    value.__signature__ = signature


def as_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = docstrings.rst(lines, docstrings.arguments(obj), PUBLIC)


# what verbs return: nobody calls these classes
RETURNED = (
    "Fit", "LearnedPrior", "Posterior", "Prediction", "Accuracy", "MetaGradient", "Certificate",
    "Report", "ModelComparison", "Reachability",
)  # fmt: skip


def without_constructor(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str | None, str | None]:
    made = what == "class" and name.removeprefix("varmeta.") in RETURNED
    return ("", None) if made else (signature, returns)


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", as_rst)
    app.connect("autodoc-process-signature", without_constructor)
