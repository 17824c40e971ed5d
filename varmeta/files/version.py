"""The one place of the version: files are marked with it, and `pyproject.toml` reads it here."""

__version__ = "0.1.0"
