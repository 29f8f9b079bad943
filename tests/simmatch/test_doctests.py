"""The examples in docstrings do what they show, and every public function and class of `simmatch` has one.

Oracle: the results that the examples print.
"""

import ast
import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest
import torch

import simmatch

ROOT = Path(__file__).parents[2]

ON_A_CARD = ("certificate", "coordinate", "gradient", "gradient_wide", "increments", "transpose")
"""Modules of `simmatch.kernels` written in Triton, whose examples need a CUDA device."""

WITHOUT_EXAMPLES = {"simmatch.kernels.solve"}
"""Public names whose example would need a CUDA device."""


class Finder(doctest.DocTestFinder):
    """Finds the examples of decorated functions too, whose wrapper belongs to another module."""

    def _from_module(self, module: ModuleType | None, object: object) -> bool:
        return super()._from_module(module, inspect.unwrap(object) if callable(object) else object)


def examples(module: ModuleType) -> list[doctest.DocTest]:
    return [test for test in Finder(exclude_empty=True).find(module, extraglobs={"torch": torch}) if test.examples]


def modules_with_examples() -> list[str]:
    """Modules of this checkout whose source holds an example; the others are not imported."""
    names = []
    for package in ("simmatch", "cluster", "jobs"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if ">>>" in path.read_text(encoding="utf-8"):
                names.append(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    return names


def library_modules() -> list[str]:
    names = [info.name for info in pkgutil.walk_packages(simmatch.__path__, "simmatch.")]
    return [name for name in names if not (".kernels." in name and name.rpartition(".")[2] in ON_A_CARD)]


def public_names(module: ModuleType) -> list[str]:
    """Functions and classes that the module defines and whose name has no leading underscore."""
    tree = ast.parse(inspect.getsource(module))
    definitions = (node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)))
    return [node.name for node in definitions if not node.name.startswith("_")]


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_print_what_they_show(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name.startswith("simmatch.kernels.") and name.rpartition(".")[2] in ON_A_CARD and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    products, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        for test in examples(module):
            runner.run(test)
    finally:  # `exact_float32` is for the whole process
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions
    assert runner.failures == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", library_modules())
def test_every_example_is_run(name: str) -> None:
    """Doctest skips what it does not find; count the prompts in the source."""
    module = importlib.import_module(name)
    assert sum(len(test.examples) for test in examples(module)) == inspect.getsource(module).count(">>> ")


@pytest.mark.parametrize("name", library_modules())
def test_every_public_function_and_class_has_an_example(name: str) -> None:
    module = importlib.import_module(name)
    shown = {test.name for test in examples(module)}
    wanted = {f"{name}.{public}" for public in public_names(module)} - WITHOUT_EXAMPLES
    missing = sorted(path for path in wanted if not any(f"{each}.".startswith(f"{path}.") for each in shown))
    assert not missing, f"no example in the docstring of {', '.join(missing)}"


def test_everything_that_simmatch_exports_has_an_example() -> None:
    """A name is defined in a module that the test above covers."""
    for name in simmatch.__all__:
        exported = getattr(simmatch, name)
        assert exported.__module__ in library_modules()
        assert exported.__name__ in public_names(importlib.import_module(exported.__module__))
