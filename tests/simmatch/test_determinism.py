"""The same bits in every run on one GPU. Oracles: torch's own list of operations that do not give them, and two runs.

The list is read from the documentation of `torch.use_deterministic_algorithms`, so it is that of the installed version.
The operations are those of whole updates and encodings on fake tensors, as in `test_without_waiting`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from simmatch.config import LayerConfig, ModelConfig, PlasticityConfig, TrainConfig
from simmatch.data.sources import Dataset, to_unit
from simmatch.fit import Trainer
from simmatch.model import InputConfig, Stack
from simmatch.precision import exact_float32, repeatable_convolutions

pytest.importorskip("triton", reason="needs Triton, whose kernels are not launched but imported")

from tests.simmatch.test_without_waiting import CARD, IMAGES, POSITIONS, SETTINGS, card, make_layer  # noqa: F401

CONVOLUTIONS = ("convolution", "convolutionbackward")


def plain(name: str) -> str:
    """`scatter_add_` and `Tensor.scatter_add` are one operation."""
    return name.replace("_", "").lower()


def listed() -> set[str]:
    """Operations without a gradient of their own that differ from run to run on a GPU, by torch's documentation.

    Left out: what only concerns gradients by automatic differentiation, which no layer uses, and the CPU; convolutions,
    whose algorithms are looked at one by one; and of `bmm`, `cumsum` and `resize_` forms that need sparse, quantised or
    floating-point tensors.
    """
    entries = re.findall(
        r"^\s*\* ((?:.|\n)*?)(?=\n\s*\*|\n\s*\n)", torch.use_deterministic_algorithms.__doc__ or "", re.M
    )
    names = set()
    for entry in entries:
        if re.search(r"attempting\s+to\s+differentiate|requires\s+grad|called\s+on\s+a\s+CPU\s+tensor$", entry):
            continue
        name = plain(re.match(r":\w+:`([\w.]+)`", entry)[1].rpartition(".")[2])  # type: ignore[index]
        if not name.startswith("conv") and name not in ("bmm", "resize"):
            names.add(name)
    return names


LISTED = listed()


class Operations(TorchDispatchMode):
    """The operations of a step, and what of it does not give the same bits in every run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = plain(func.overloadpacket.__name__)
        self.names.add(name)
        if name in LISTED and not (name == "cumsum" and not args[0].is_floating_point()):
            self.found.append(str(func))
        if name in CONVOLUTIONS and (torch.backends.cudnn.benchmark or not torch.backends.cudnn.deterministic):
            self.found.append(f"{func} with any algorithm")
        return func(*args, **(kwargs or {}))


def test_the_list_is_read_from_the_documentation() -> None:
    assert {"indexput", "scatteradd", "indexadd", "cumsum", "histc", "bincount", "put", "median"} <= LISTED
    assert not LISTED & {"gather", "indexselect", "topk", "sort", "mm", "adaptiveavgpool2d", "avgpool2d"}


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("setting", SETTINGS)
def test_no_operation_of_an_update_differs_from_run_to_run(
    setting: str,
    drawn: bool,
    card: FakeTensorMode,  # noqa: F811 - the fixture
) -> None:
    with card, Operations() as operations:
        layer = make_layer(**SETTINGS[setting])
        labels = torch.zeros(IMAGES, dtype=torch.int64, device=CARD) if layer.num_classes else None
        x = to_unit(torch.zeros(IMAGES, 1, 28, 28, dtype=torch.uint8, device=CARD))
        layer.partial_fit(layer.prepare(x, POSITIONS) if drawn else layer.prepare(x), labels, recorded=True)
    assert operations.found == []
    if not drawn:
        assert set(CONVOLUTIONS) <= operations.names
    else:
        assert {"topk", "sort", "take"} <= operations.names


def test_no_operation_of_an_encoding_differs_from_run_to_run(card: FakeTensorMode) -> None:  # noqa: F811
    with card, Operations() as operations:
        layer = make_layer()
        x = to_unit(torch.zeros(IMAGES, 1, 28, 28, dtype=torch.uint8, device=CARD))
        drive = layer.drive(x)
        F.adaptive_avg_pool2d(drive.view(layer.out_channels, IMAGES, 24, 24).transpose(0, 1), 4)
    assert operations.found == []
    assert "convolution" in operations.names


def test_the_check_notices_what_it_looks_for() -> None:
    with FakeTensorMode(), Operations() as operations:
        x = torch.zeros(4, 1, 8, 8, device=CARD)
        F.conv2d(x, torch.zeros(2, 1, 3, 3, device=CARD))
        x.flatten().index_add_(0, torch.zeros(3, dtype=torch.int64, device=CARD), torch.zeros(3, device=CARD))
        x.cumsum(0)
        torch.zeros(3, dtype=torch.int64, device=CARD).cumsum(0)
    assert len(operations.found) == 3


def test_settings_of_the_process_come_back() -> None:
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    try:
        cudnn.deterministic, cudnn.benchmark = False, True
        with repeatable_convolutions(torch.device("cpu")):
            assert (cudnn.deterministic, cudnn.benchmark) == (False, True)
        with repeatable_convolutions(torch.device("cuda")):
            assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
        assert (cudnn.deterministic, cudnn.benchmark) == (False, True)
        other = repeatable_convolutions(torch.device("cuda"))  # of another thread, say
        other.__enter__()
        with repeatable_convolutions(torch.device("cuda")):
            other.__exit__(None, None, None)
            assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
        assert (cudnn.deterministic, cudnn.benchmark) == (False, True)
    finally:
        cudnn.deterministic, cudnn.benchmark = before


# -- on a card ---------------------------------------------------------------------------------------------------------

RATES = PlasticityConfig(lr=0.1)
LAYERS = (
    LayerConfig(
        out_channels=24,
        kernel_size=3,
        padding=1,
        pool=4,
        normalize="contrast",
        whiten=True,
        whiten_images=500,
        train=TrainConfig(batch_size=50, epochs=2, images=600, positions=20),
        plasticity=RATES,
    ),
    LayerConfig(
        out_channels=40,
        kernel_size=3,
        padding=1,
        pool=1,
        train=TrainConfig(batch_size=60, epochs=1, images=500),  # all positions, and a smaller last batch
        plasticity=RATES,
    ),
    LayerConfig(
        out_channels=64,
        kernel_size="full",
        supervised=True,
        label_gain=30.0,
        train=TrainConfig(batch_size=50, epochs=2, images=500),
        plasticity=RATES,
    ),
)


def trained(dataset: Dataset, device: torch.device) -> dict[str, Tensor]:
    """Weights after three layers with drawn positions, all positions and labels; features and scores of test images."""
    source = InputConfig(in_channels=1, height=8, width=8, num_classes=10)
    stack = Stack(ModelConfig(layers=LAYERS), source, seed=3, device=device)
    Trainer(stack, dataset.train_images, dataset.train_labels, encode_batch=300).fit()
    x = to_unit(dataset.test_images[:100]).to(device)
    with torch.no_grad():
        return {**stack.state_dict(), "features": stack.features(x), "scores": stack.decode(x)}


def assert_two_runs_agree(run: Callable[[], dict[str, Tensor]]) -> None:
    one, other = run(), run()
    for name, value in one.items():
        assert torch.equal(other[name], value), name
    assert float(one["scores"].std()) > 0


def test_two_runs_on_a_cpu_give_the_same_bits(digits: Dataset) -> None:
    assert_two_runs_agree(lambda: trained(digits, torch.device("cpu")))


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch raises an error for operations that differ from run to run, and fills what is not initialised with NaN."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    exact_float32()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
def test_two_runs_on_a_card_give_the_same_bits(cuda: torch.device, digits: Dataset) -> None:
    """Updates captured where they can be."""
    exact_float32()
    assert_two_runs_agree(lambda: trained(digits, cuda))


@pytest.mark.gpu
@pytest.mark.usefixtures("strict")
def test_a_card_needs_no_operation_that_differs_from_run_to_run(cuda: torch.device, digits: Dataset) -> None:
    assert_two_runs_agree(lambda: trained(digits, cuda))
