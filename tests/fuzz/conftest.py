"""How many examples: a part of `make test`, ten thousand by `make fuzz` (VARMETA_FUZZ=10000)."""

import os

from hypothesis import HealthCheck, Phase, settings

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
