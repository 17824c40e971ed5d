"""What holds for every test and every docstring example: one thread, no windows, a fixed seed, a
clean parameter store.

Nothing here needs torch or Pyro: the tests of the ArviZ export also run in an environment without
them.
"""

import getpass
import os
import sys
import tempfile
from collections.abc import Iterator

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")

# The compiler's store on disk does not know which vector units torch was told to use, and a graph
# compiled for others ends the process (torch 2.13: "Segmentation fault" in the compiled code).
capability = os.environ.get("ATEN_CPU_CAPABILITY")
if capability is not None:
    own = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}_{capability}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", own)

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
