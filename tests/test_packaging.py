"""What a user gets who installs the package: light imports, the data files, one version number."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import varmeta

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
TOP = f"varmeta_pyro-{varmeta.__version__}"  # the folder in the sdist


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


def test_the_citation_says_what_the_package_says():
    yaml = pytest.importorskip("yaml", reason="comes with the site's tools: pip install '.[docs]'")
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert said["cff-version"] == "1.2.0" and said["type"] == "software"
    assert said["title"] == varmeta.__name__ and said["version"] == varmeta.__version__
    assert said["abstract"] == PROJECT["description"] and said["keywords"] == PROJECT["keywords"]
    assert said["license"] == PROJECT["license"] and said["authors"] == PROJECT["authors"]


def pins(name):
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_constraints_pin_everything_that_is_asked_for():
    wanted = [*EXTRAS["test"], *EXTRAS["docs"], *EXTRAS["dev"]]
    asked = requirement_names([*PROJECT["dependencies"], *wanted]) - {PROJECT["name"]}
    assert set(pins("constraints.txt")) == asked


def test_the_lower_bounds_are_what_is_tested_as_lowest():
    asked = [*PROJECT["dependencies"], *EXTRAS["test"]]
    bounds = dict(requirement.split(">=") for requirement in asked if ">=" in requirement)
    lowest = pins("constraints-lowest.txt")
    assert lowest == {name: bounds[name] for name in lowest}
    assert requirement_names(PROJECT["dependencies"]) <= set(lowest)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist and the wheel made of it: those that `make dist` made, or made here."""
    place = os.environ.get("VARMETA_DIST")
    folder = ROOT / place if place else tmp_path_factory.mktemp("dist")
    if not place:
        pytest.importorskip("hatchling", reason="builds both: pip install hatchling")
        build(ROOT, "sdist", folder)
    (sdist,) = folder.glob("*.tar.gz")
    if not place:
        unpacked = tmp_path_factory.mktemp("sdist")
        with tarfile.open(sdist) as tar:
            tar.extractall(unpacked, filter="data")
        build(unpacked / TOP, "wheel", folder)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def build(source, target, folder):
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    subprocess.run(command, check=True, cwd=source, capture_output=True)


def test_the_sdist_holds_what_the_repository_holds_and_no_more(built):
    with tarfile.open(built[0]) as tar:
        held = {name.partition("/")[2] for name in tar.getnames() if name.startswith(f"{TOP}/")}
        assert held == {name.partition("/")[2] for name in tar.getnames()}
    assert {
        "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "docs/index.md", "Makefile",
        "tests/test_packaging.py", "experiments/demo.py", "varmeta/datasets/data/LICENSES.md",
    } <= held  # fmt: skip
    if not (ROOT / ".git").exists():
        pytest.skip("no git here to ask what the repository holds")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout
    ours = {name for name in files.splitlines() if (ROOT / name).exists()}
    assert held == {*ours, "PKG-INFO"}


def test_the_wheel_holds_the_package_with_types_data_and_licences(built):
    with zipfile.ZipFile(built[1]) as wheel:
        held = set(wheel.namelist())
    info = f"varmeta_pyro-{varmeta.__version__}.dist-info"
    licences = {f"{info}/licenses/{file}" for file in PROJECT["license-files"]}
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "varmeta").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"varmeta/py.typed", "varmeta/datasets/data/radon.csv"} <= files
    assert held == files | licences | {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL")}
