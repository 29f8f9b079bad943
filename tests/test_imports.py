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
    "simmatch/solvers/coordinate.py": {"numba"},
    "simmatch/kernels/certificate.py": {"triton"},
    "simmatch/kernels/coordinate.py": {"triton"},
    "simmatch/kernels/gradient.py": {"triton"},
    "simmatch/kernels/transpose.py": {"triton"},
}
"""What `simmatch` may import beside the standard library; a file named here is itself imported when it is needed."""

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
        own = LISTED.get(str(path.relative_to(ROOT)), set())
        for module, line, is_later in imports(path):
            name = module.partition(".")[0]
            allowed = LISTED["simmatch"] | own | (LISTED["simmatch, inside functions"] if is_later else set())
            if name not in allowed | {"simmatch"} | set(sys.stdlib_module_names):
                strange.append(f"{path.relative_to(ROOT)}:{line}: {module}")
    assert strange == []


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
