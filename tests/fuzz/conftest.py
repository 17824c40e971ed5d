"""How many examples, and what came of them.

A few are a part of `make test`; `make fuzz` asks for ten thousand (VARMETA_FUZZ=10000).
"""

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.fuzz.outcome import COUNTS, KINDS

EXAMPLES = int(os.environ.get("VARMETA_FUZZ", "0"))
slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
# by `make test` the same examples everywhere, so that a red machine says something of the machine
settings.register_profile(
    "varmeta",
    deadline=None,
    database=None,
    derandomize=not EXAMPLES,
    print_blob=True,
    suppress_health_check=slow,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
settings.load_profile("varmeta")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist: a process that only works
        session.config.workeroutput["fuzz"] = dict(COUNTS)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    COUNTS.update(getattr(node, "workeroutput", {}).get("fuzz", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if COUNTS:
        terminalreporter.section("what odd inputs came to")
        terminalreporter.line(", ".join(f"{kind} {COUNTS[kind]}" for kind in KINDS))
