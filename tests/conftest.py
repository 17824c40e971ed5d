"""Reference data that lie beside a checkout, not in it: tests that use them skip where they are
missing.
"""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("VARMETA_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared_data(name: str) -> Path:
    """The folder of a reference data set, as in `shared_data("rats") / "reference.json"`; skips
    where it is missing.
    """
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(
            f"no reference data {name!r} beside this checkout (VARMETA_SHARED names their place)"
        )
    return folder
