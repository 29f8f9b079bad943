"""What all tests share: one thread per process, the digits, and the CUDA device where there is one."""

from __future__ import annotations

import atexit
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partialmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from simmatch import captured
from simmatch.data.config import DataConfig
from simmatch.data.sources import Dataset, load_dataset
from simmatch.precision import exact_float32
from tests.tape import TapeGraph

if TYPE_CHECKING:
    from tests.pretended import Place

OURS = ("simmatch", "cluster", "jobs", "tests")

# The problems are small and the machines that run them are shared: more threads only add noise.
torch.set_num_threads(1)

# A developer's own server and user must not decide what the tests see.
for _name in [name for name in os.environ if re.match("MLFLOW_(TRACKING|REGISTRY|EXPERIMENT)_", name)]:
    del os.environ[_name]

# What runs of the tests keep on the node's disk, and where workers of a Ray cluster that outlives a test keep it.
os.environ["SIMMATCH_CACHE"] = tempfile.mkdtemp(prefix="simmatch-tests-")
atexit.register(shutil.rmtree, os.environ["SIMMATCH_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders that nobody has used. Pytest would look through all that it has made whenever it makes one."""
    parent = tmp_path_factory.mktemp("caches")
    return (parent / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def own_cache(caches: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test encodes its images itself."""
    folder = next(caches)
    folder.mkdir()
    monkeypatch.setenv("SIMMATCH_CACHE", str(folder))
    return folder


class MaybeMissing(pytest.Module):
    """A file of tests that is skipped where a package that it imports is not installed."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            _ = self.obj  # imports it
        except self.CollectError as error:
            missing = error.__cause__
            if not isinstance(missing, ModuleNotFoundError) or str(missing.name).startswith(OURS):
                raise
            pytest.skip(f"needs {missing.name}, which is not installed", allow_module_level=True)
        return super().collect()


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """With `-m gpu`, files of tests may need packages that a machine for the tests of a GPU does not have."""
    if parent.config.option.markexpr != "gpu":
        return None
    return MaybeMissing.from_parent(parent, path=module_path)  # type: ignore[no-any-return]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process is left alone with them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """The 8 × 8 digits inside scikit-learn: no network, no files of ours."""
    return load_dataset(DataConfig(name="digits"))


@pytest.fixture
def cuda() -> torch.device:
    """The CUDA device; a test that asks for it is skipped where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none here")
    return torch.device("cuda")


@pytest.fixture(params=["pretended", pytest.param("cuda", marks=pytest.mark.gpu)])
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """`cuda` as a GPU that is pretended, and as a CUDA device; the latter is skipped where there is none."""
    from tests.pretended import Place, pretended

    if request.param == "cuda":
        request.getfixturevalue("cuda")
        pytest.importorskip("triton", reason="needs Triton, which comes with torch for CUDA")
        exact_float32()
        yield Place(tolerance=0.05, real=True)
        return
    with pretended(monkeypatch):
        yield Place(tolerance=1e-4, real=False)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at each replay of a captured update."""
    seen: list[int] = []

    def counted(graph: Any, replay: Callable[[Any], None]) -> None:
        seen.append(1)
        replay(graph)

    for kind in (captured.CudaGraph, TapeGraph):
        monkeypatch.setattr(kind, "replay", partialmethod(counted, kind.replay))
    return seen
