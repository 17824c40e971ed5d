"""What a bug report needs to know of the machine."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from varmeta.files.version import __version__

PACKAGES = ("torch", "pyro-ppl", "numpy", "pandas", "arviz", "xarray", "scipy", "matplotlib")


def versions() -> dict[str, str]:
    """Versions of varmeta and what it stands on, the platform, threads and devices, by name."""
    found = {"varmeta": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    cuda = torch.version.cuda
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found | {
        "torch": str(torch.__version__),  # with its build, "2.13.0+cpu"; PyPI's metadata lack it
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "cuda": "none" if cuda is None else f"{cuda}, {', '.join(names) or 'no device'}",
    }


def show_versions() -> None:
    """Print the versions of varmeta and what it stands on, for a bug report.

    A line each: varmeta, Python, torch, Pyro, numpy, pandas, ArviZ, xarray, scipy, matplotlib; the
    platform, torch's threads, its default dtype and CUDA.  Nothing is imported for it.

    >>> show_versions()
    varmeta     ...
    python      ...
    """
    for name, value in versions().items():
        print(f"{name:<11} {value}")
