"""`show_versions` names what a bug report needs, and imports nothing for it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

import varmeta as vm


def test_every_name_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    vm.show_versions()
    lines = capsys.readouterr().out.splitlines()
    said = dict(line.split(maxsplit=1) for line in lines)
    assert list(said) == [
        "varmeta", "python", "torch", "pyro-ppl", "numpy", "pandas", "arviz", "xarray", "scipy",
        "matplotlib", "platform", "threads", "dtype", "cuda",
    ]  # fmt: skip
    assert said["varmeta"] == vm.__version__ and said["python"] == platform.python_version()
    assert said["torch"] == torch.__version__ and said["dtype"] == "float32"
    assert said["threads"] == str(torch.get_num_threads())
    assert len("\n".join(lines)) < 1000


def test_importing_varmeta_loads_little_on_top_of_torch_and_pyro() -> None:
    """Heavy packages come in where they are used; what comes with torch and Pyro does not count."""
    code = (
        "import sys, torch, pyro; before = set(sys.modules); import varmeta; {}"
        "print(*sorted({{name.partition('.')[0] for name in set(sys.modules) - before}}))"
    )
    for more in ("", "varmeta.show_versions(); print(); "):
        run = subprocess.run(
            [sys.executable, "-c", code.format(more)], capture_output=True, text=True, check=True
        )
        loaded = set(run.stdout.splitlines()[-1].split())
        heavy = {"arviz", "pandas", "matplotlib", "xarray", "scipy", "h5py", "h5netcdf", "sympy"}
        assert "varmeta" in loaded and not loaded & heavy
        if not more:
            standard = set(sys.stdlib_module_names)
            assert loaded - standard == {"varmeta"}
