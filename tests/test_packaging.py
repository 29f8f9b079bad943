"""What `pip install simmatch` installs: the library alone, which works with the packages it declares and no others."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
HEADING = "## Ten lines of Python\n"
ABSENT = (
    "ray",
    "mlflow",
    "sklearn",
    "matplotlib",
    "pandas",
    "scipy",
    "rich",
    "psutil",
    "torchvision",
    "cluster",
    "jobs",
)

NEEDS_AN_EXTRA = """
from pathlib import Path
from simmatch.data.config import DataConfig
from simmatch.data.builtin import download
from simmatch.data.sources import load_dataset
from simmatch.readout import fit_readout

for call in (
    lambda: load_dataset(DataConfig(name="digits")),
    lambda: download("mnist", Path()),
    lambda: fit_readout("knn", torch.rand(4, 2), torch.arange(4)),
):
    try:
        call()
    except ImportError as error:
        print(error)
"""
"""What the library offers beside, with more packages."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy: setuptools leaves a folder `build` beside its sources, and takes what lies in it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    for package in ("simmatch", "cluster", "jobs"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, timeout=100)
    [file] = target.iterdir()
    return zipfile.ZipFile(file)


def test_the_wheel_holds_all_of_simmatch_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    sources = [*(ROOT / "simmatch").rglob("*.py"), ROOT / "simmatch" / "py.typed"]
    assert sorted(names) == sorted(str(path.relative_to(ROOT)) for path in sources)


def test_the_readmes_example_runs_where_only_the_library_is_installed(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """The interpreter sees the wheel and links to the packages that it requires."""
    example = (ROOT / "README.md").read_text().split(HEADING)[1].split("```python\n")[1].split("```")[0]
    assert len([line for line in example.splitlines() if line]) <= 10
    site = tmp_path / "site"
    wheel.extractall(site)
    [metadata] = site.glob("*.dist-info")
    link(required(Distribution.at(metadata).requires or []), site)
    path = f"import sys; sys.path.append({str(site)!r})\n"
    check = f"import importlib.util as u; print([name for name in {ABSENT} if u.find_spec(name)])\n"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", path + check + example + NEEDS_AN_EXTRA],
        cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    absent, *objectives, shape, digits, download, neighbours = done.stdout.splitlines()
    assert absent == "[]"
    first, last = (float(re.fullmatch(r"objective (\S+)", objectives[i])[1]) for i in (0, -1))
    assert first > 0.4
    assert last < 0.05
    assert shape == "torch.Size([2000, 16, 12, 12])"
    assert digits == neighbours == "the package sklearn is missing: pip install 'simmatch[eval]'"
    assert download == "the package torchvision is missing: pip install 'simmatch[eval]'"


def test_the_locked_versions_are_within_the_declared_ranges() -> None:
    """All but aeon, which wants an older numba and pandas: the image does not carry it."""
    locked = dict(line.split("==") for line in (ROOT / "infra/requirements.lock").read_text().splitlines()[1:])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = {canonicalize_name(name): version for name, version in locked.items()}
    wrong = [
        text
        for text in sum(project["optional-dependencies"].values(), project["dependencies"])
        if (wanted := Requirement(text)).name not in ("setuptools", "aeon")  # pip freeze leaves out the former
        and versions.get(canonicalize_name(wanted.name), "0") not in wanted.specifier
    ]
    assert wrong == []


def required(requirements: Iterable[str]) -> dict[str, Distribution]:
    """Name → distribution of all that these requirements install, extras left out."""
    distributions: dict[str, Distribution] = {}
    waiting = [(Requirement(text), frozenset[str]()) for text in requirements]
    while waiting:
        requirement, extras = waiting.pop()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in (extras or {""})):
            continue
        if (known := distributions.get(requirement.name)) is None or requirement.extras:
            known = distributions[requirement.name] = distribution(requirement.name)
            waiting += [(Requirement(text), frozenset(requirement.extras)) for text in known.requires or []]
    return distributions


def link(distributions: dict[str, Distribution], site: Path) -> None:
    """Links to the distributions' files and folders, as they lie in their own site-packages."""
    for each in distributions.values():
        tops = {file.parts[0] for file in each.files or [] if file.parts[0] not in ("..", "__pycache__")}
        for top in tops - {path.name for path in site.iterdir()}:
            (site / top).symlink_to(Path(str(each.locate_file(top))))
