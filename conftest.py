"""What holds for every test and every docstring example: one thread, no windows, a fixed seed, a
clean parameter store.

Nothing here needs torch or Pyro: the tests of the ArviZ export also run in an environment without
them.
"""

import os
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")

try:
    import torch
except ModuleNotFoundError:
    torch = None
else:
    # one thread: no fight for shared cores; `make test-machines` asks for two, which sum in another
    # order
    torch.set_num_threads(int(os.environ.get("VARMETA_THREADS", "1")))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Networks draw their first weights from torch's global generator, so it starts each test at
    one place.
    """
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def param_store_stays_empty() -> Iterator[None]:
    """Pyro's parameter store is global: what one fit leaves there, another one would take up."""
    yield
    if "pyro" in sys.modules:
        store = sys.modules["pyro"].get_param_store()
        left = sorted(store.keys())
        store.clear()  # so that only the culprit fails
        assert not left, f"left in Pyro's global parameter store: {left}"
