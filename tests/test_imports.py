"""Who may import whom: jobs → cluster → simmatch, and simmatch neither ray nor mlflow."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "simmatch": {"simmatch"},
    "cluster": {"cluster", "simmatch"},
    "jobs": {"jobs", "cluster", "simmatch"},
}
"""Package → those of this project that it may import."""

LISTED = {
    "simmatch": {"torch", "einops", "numpy", "pydantic", "yaml", "safetensors"},
    "simmatch, inside functions": {"torchvision", "sklearn", "scipy"},
}
"""What `simmatch` may import beside the standard library."""

LOAD = """
import importlib, pkgutil, sys
import {package}
for module in pkgutil.walk_packages({package}.__path__, "{package}."):
    {each}
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
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
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(name.name, node.lineno, node in later) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: expected an absolute import"
            found.append((str(node.module), node.lineno, node in later))
    return found


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


def test_what_simmatch_is_made_of() -> None:
    """Anything new is a decision, to be written down in `LISTED`."""
    strange = []
    for path in sorted((ROOT / "simmatch").rglob("*.py")):
        for module, line, is_later in imports(path):
            name = module.partition(".")[0]
            allowed = LISTED["simmatch"] | (LISTED["simmatch, inside functions"] if is_later else set())
            if name not in allowed | {"simmatch"} | set(sys.stdlib_module_names):
                strange.append(f"{path.relative_to(ROOT)}:{line}: {module}")
    assert strange == []


def loaded(package: str, *, whole: bool) -> set[str]:
    """Top-level modules in a fresh process that has imported a package, or every module of it."""
    program = LOAD.format(package=package, each="importlib.import_module(module.name)" if whole else "pass")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_simmatch_loads_neither_ray_nor_mlflow() -> None:
    assert not loaded("simmatch", whole=True) & {"ray", "mlflow", "cluster", "jobs"}


def test_simmatch_is_light() -> None:
    """What takes seconds to import waits until it is needed."""
    assert not loaded("simmatch", whole=False) & {"torchvision", "sklearn", "scipy", "matplotlib", "pandas"}
