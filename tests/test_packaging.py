"""What a user gets who installs the package: light imports, the data files, one version number."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import varmeta

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirement_names(requirements):
    return {re.match(r"[\w-]+", requirement).group() for requirement in requirements}


def test_the_import_is_light():
    code = "import sys, varmeta; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert {"varmeta", "torch", "pyro"} <= set(loaded)
    lazy = {"arviz", "xarray", "matplotlib", "pandas", "h5netcdf", "scipy", "formulae"}
    assert not lazy & set(loaded)


def test_every_public_name_is_there():
    assert len(set(varmeta.__all__)) == len(varmeta.__all__)
    assert [name for name in varmeta.__all__ if not hasattr(varmeta, name)] == []


def test_one_version_number():
    assert varmeta.__version__ == PROJECT["version"]


def test_the_constraints_pin_everything_that_is_asked_for():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    extras = PROJECT["optional-dependencies"]
    wanted = [*extras["test"], *extras["docs"], *extras["dev"]]
    asked = requirement_names([*PROJECT["dependencies"], *wanted]) - {PROJECT["name"]}
    assert set(pins) == asked


def test_the_wheel_holds_types_data_and_licences(tmp_path):
    pytest.importorskip(
        "hatchling", reason="the build backend is not installed here: pip install hatchling"
    )
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    data = {
        f"varmeta/datasets/data/{file}"
        for file in ("radon.csv", "rats.csv", "eight_schools.csv", "gapminder.csv")
    }
    assert {
        "varmeta/__init__.py",
        "varmeta/py.typed",
        "varmeta/datasets/data/LICENSES.md",
    } | data <= names
    # nothing beside the package and its metadata
    assert {name.split("/")[0] for name in names} == {
        "varmeta",
        f"varmeta_pyro-{varmeta.__version__}.dist-info",
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)
