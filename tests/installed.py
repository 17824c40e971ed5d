"""What a user has who installed the wheel: the package from where pip put it, the versions, and the
README's blocks with the outputs that it shows.

`make test-wheel` runs it by the Python of an environment with nothing else in it, in a folder that
holds what the sdist does without the package:

    python -m tests.installed
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import varmeta as vm
from docs.site.run import run

README = Path("README.md")


def main() -> None:
    place = Path(vm.__file__)
    if "site-packages" not in place.parts:
        sys.exit(f"varmeta was imported from {place}, not from where pip installs packages")
    if version("varmeta-pyro") != vm.__version__:
        sys.exit(f"pip knows version {version('varmeta-pyro')}, the package says {vm.__version__}")
    vm.show_versions()
    ran, wrong = run(README.read_text(), README.name)
    if wrong or not ran:
        sys.exit("\n".join(wrong) or f"{README} has no block of Python")
    print(f"{README}: {len(ran)} blocks printed what is shown")


if __name__ == "__main__":
    main()
