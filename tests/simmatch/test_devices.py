"""Devices that are not there, or that this torch cannot use: one line that says why, from every entry of the API."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from simmatch import (
    ConfigError,
    LayerConfig,
    ModelConfig,
    SimilarityMatchingConv2d,
    Stack,
    fit_stack,
    load_model,
    save_model,
)
from simmatch.devices import check_device
from simmatch.model import InputConfig

MODEL = ModelConfig(layers=(LayerConfig(out_channels=4, kernel_size=3),))
SOURCE = InputConfig(in_channels=1, height=6, width=6, num_classes=2)

ENTRIES: dict[str, Callable[[str, Path], Any]] = {
    "layer": lambda device, _: SimilarityMatchingConv2d(1, 4, kernel_size=3, device=device),
    "stack": lambda device, _: Stack(MODEL, SOURCE, device=device),
    "fit_stack": lambda device, _: fit_stack(MODEL, torch.rand(5, 1, 6, 6), device=device),
    "load_model": lambda device, folder: load_model(folder, device=device),
}


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], None]:
    """(number of cards, text of the error) → torch as it is there, for a device beyond the last card."""

    def set_up(count: int, text: str) -> None:
        real = torch.empty

        def empty(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
            found = torch.device("cpu" if device is None else device)
            if found.type == "cuda" and (found.index or 0) >= count:
                raise RuntimeError(text)
            return real(*size, **options)

        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)

    return set_up


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_a_card_that_is_not_there_is_named(entry: Callable[[str, Path], Any], cards: Any, tmp_path: Path) -> None:
    save_model(Stack(MODEL, SOURCE), tmp_path)
    cards(1, "CUDA error: invalid device ordinal\nGPU device may be out of range")
    with pytest.raises(ConfigError) as caught:
        entry("cuda:1", tmp_path)
    assert str(caught.value) == ("device: expected one that torch can use here, got 'cuda:1': torch sees cuda:0 only")


@pytest.mark.parametrize(
    ("device", "count", "built", "reason"),
    [
        ("cuda", 0, False, f"this build of torch, {torch.__version__}, has no CUDA"),
        ("cuda", 0, True, "torch sees no CUDA device, for want of a driver or because CUDA_VISIBLE_DEVICES hides it"),
        ("cuda:5", 4, True, "torch sees cuda:0 to cuda:3 only"),
    ],
)
@pytest.mark.parametrize("touch", [True, False])
def test_the_reason_is_given(
    device: str, count: int, built: bool, reason: str, touch: bool, cards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards(count, "Found no NVIDIA driver on your system.")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    with pytest.raises(ConfigError) as caught:
        check_device(device, touch=touch)
    assert str(caught.value).endswith(f"got {device!r}: {reason}")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "cpu:-1", None])
def test_names_of_no_device(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"^device: expected cpu, cuda or cuda:N, got "):
        check_device(name)


@pytest.mark.parametrize("name", ["xpu", "hpu", "vulkan"])
def test_kinds_of_device_that_this_torch_lacks(name: str) -> None:
    with pytest.raises(ConfigError, match=f"finds no {name} device$"):
        check_device(name)


def test_a_card_that_fails_is_no_missing_card(cards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new process may get it: the error stays what it is, so that it can be classified."""
    cards(0, "CUDA error: CUDA-capable device(s) is/are busy or unavailable")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RuntimeError, match="busy or unavailable"):
        check_device("cuda")
    assert check_device("cuda", touch=False).type == "cuda"
