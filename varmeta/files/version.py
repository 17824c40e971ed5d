"""The version that files are marked with; `pyproject.toml` has the same."""

__version__ = "0.1.0"
