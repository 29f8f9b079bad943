"""Out of memory: the line that a user reads, from every activity, and a proposed value that fits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import simmatch.features
import simmatch.inputs
import simmatch.model
from simmatch import LayerConfig, ModelConfig, SimilarityMatchingConv2d, Stack, fit_stack
from simmatch.config import TrainConfig
from simmatch.learning import Setup
from simmatch.memory import Lever, MemoryWatch, OutOfMemory, Shortage
from simmatch.sharding.faults import SharedFault

CPU_TEXT = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4294967296 bytes. Error code 12 (Cannot allocate memory)"
)
GIB = 2**30


def cuda_text(asked: int, free: int, total: int, held: int, spare: int = 0, others: int = 0) -> str:
    """As torch's allocator writes it, with two digits behind the point."""

    def size(num_bytes: int) -> str:
        for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if num_bytes >= scale:
                return f"{num_bytes / scale:.2f} {unit}"
        return f"{num_bytes} bytes"

    other = f"Process 2493055 has {size(others)} memory in use. " if others else ""
    return (
        f"CUDA out of memory. Tried to allocate {size(asked)}. GPU 0 has a total capacity of {size(total)} of which "
        f"{size(free)} is free. {other}Including non-PyTorch memory, this process has {size(held + spare)} memory in "
        f"use. Of the allocated memory {size(held)} is allocated by PyTorch, and {size(spare)} is reserved by PyTorch "
        "but unallocated. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF="
        "expandable_segments:True to avoid fragmentation."
    )


# -- what allocators say -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            torch.OutOfMemoryError(cuda_text(2 * GIB, GIB, 80 * GIB, 70 * GIB, 9 * GIB)),
            "out of GPU memory (asked for 2 GiB, 1 GiB of 80 GiB free)",
        ),
        (
            torch.OutOfMemoryError(cuda_text(2 * GIB, GIB, 80 * GIB, 38 * GIB, 0, others=41 * GIB)),
            "out of GPU memory (asked for 2 GiB, 1 GiB of 80 GiB free, 41 GiB held by other processes)",
        ),
        (torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemory"), "out of GPU memory"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "out of GPU memory",
        ),
        (RuntimeError(CPU_TEXT), "out of memory (asked for 4 GiB)"),
        (MemoryError("Unable to allocate 7.11 PiB for an array"), "out of memory (asked for 7.11 PiB)"),
        (MemoryError(), "out of memory"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), None),
        (OSError(28, "No space left on device"), None),
    ],
)
def test_what_allocators_say(error: Exception, line: str | None) -> None:
    shortage = Shortage.of(error)
    assert (None if shortage is None else str(shortage)) == line


def test_real_allocations_that_cannot_be_had() -> None:
    for allocate in (lambda: torch.empty(10**15), lambda: bytearray(10**15)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert Shortage.of(caught.value) is not None


def test_memory_that_others_hold_may_come_back() -> None:
    watch = MemoryWatch(torch.device("cpu"))
    for others, expected in ((41 * GIB, True), (0, False)):
        with pytest.raises(OutOfMemory) as caught, watch:
            raise torch.OutOfMemoryError(cuda_text(2 * GIB, GIB, 80 * GIB, 38 * GIB, 0, others))
        assert caught.value.elsewhere is expected


# -- what is proposed --------------------------------------------------------------------------------------------------


@dataclass
class Card:
    """A GPU whose allocator has no fragments, and fails as torch's does."""

    total: int
    held: int = 0

    def allocate(self, num_bytes: int) -> None:
        if self.held + num_bytes > self.total:
            raise torch.OutOfMemoryError(cuda_text(num_bytes, self.total - self.held, self.total, self.held))
        self.held += num_bytes


def use(card: Card, batch: int, each: int, kept: int, chunks: int, watch: MemoryWatch) -> None:
    """An activity over many chunks, that uses `each` bytes per image at a time and keeps `kept` in the end."""
    for chunk in range(1, chunks + 1):
        before = card.held
        card.allocate(each * batch)
        card.held = before
        card.allocate(kept // chunks)
        watch.proceed(chunk / chunks)


@settings(max_examples=300, deadline=None)
@given(
    stands=st.integers(0, 75),
    kept=st.integers(0, 60),
    chunks=st.integers(1, 5),
    each=st.integers(1, 2**24),
    batch=st.integers(1, 100_000),
)
def test_what_is_proposed_fits(stands: int, kept: int, chunks: int, each: int, batch: int) -> None:
    """A batch of the proposed size gets through, unless nothing is known yet of what is kept: then through a chunk."""
    card, kept_bytes = Card(total=80 * GIB, held=stands * GIB), kept * GIB
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "memory_allocated", lambda device: card.held)
        watch = MemoryWatch(torch.device("cuda"))
        try:
            with watch:
                watch.begin("layer 1, encoding", Lever("encode_batch", batch), otherwise="use more ranks")
                use(card, batch, each, kept_bytes, chunks, watch)
            return
        except OutOfMemory as error:
            message = str(error)
        known = "at a time" if card.held == stands * GIB else "kept"
        card.held = stands * GIB
        match = re.search(r": set encode_batch to at most (\d+) \(now (\d+)\), or use more ranks$", message)
        room = card.total - card.held - (kept_bytes if known == "kept" else 0)
        if match is None:
            assert message.endswith(": use more ranks")
            # what the first chunk keeps looks like memory that is used at a time
            largest = max(each * batch, kept_bytes // chunks if known == "at a time" else 0)
            assert batch == 1 or room * batch < 1.3 * largest
            return
        proposed = int(match[1])
        assert 1 <= proposed <= batch // 2
        if known == "kept":
            use(card, proposed, each, kept_bytes, chunks, watch)
        else:
            card.allocate(proposed * each)


def test_a_batch_that_nearly_fits_is_halved_and_others_are_cut_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 GiB stand, 4 GiB an image: 17 images would fill the card; two digits, a margin of a quarter."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 * GIB)
    for batch, proposed in ((20, 10), (100, 14), (1000, 14)):
        watch = MemoryWatch(torch.device("cuda"))
        watch.begin("layer 0, learning", Lever("batch_size", batch))
        with pytest.raises(OutOfMemory, match=rf"at most {proposed} \(now {batch}\)$"), watch:
            Card(total=80 * GIB, held=10 * GIB).allocate(4 * GIB * batch)


def test_what_is_kept_is_named_where_it_alone_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(total=80 * GIB, held=10 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: card.held)
    watch = MemoryWatch(torch.device("cuda"))
    watch.begin("layer 1, encoding", Lever("encode_batch", 500), otherwise="use more ranks")
    with pytest.raises(OutOfMemory) as caught, watch:
        use(card, 500, 2**20, 100 * GIB, 10, watch)
    assert str(caught.value).endswith(" free); its result takes about 100 GiB in all: use more ranks")


# -- every activity of a training --------------------------------------------------------------------------------------

MODEL = ModelConfig(
    layers=(
        LayerConfig(out_channels=4, kernel_size=3, pool=2, train=TrainConfig(batch_size=20, positions=8)),
        LayerConfig(out_channels=5, kernel_size="full", whiten=True, whiten_images=30),
    )
)
IMAGES = torch.rand(40, 1, 6, 6)


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError(CPU_TEXT)


def fail_shared(*_: Any, **__: Any) -> Any:
    """As where the exception was held until the next exchange."""
    try:
        fail()
    except RuntimeError as error:
        raise SharedFault("exception", [0]) from error


PLACES: dict[str, tuple[Any, str, Callable[..., Any], str]] = {
    "weights": (
        simmatch.model,
        "build_layer",
        fail,
        "layer 0, making its weights: {}: set model.layers.0.out_channels to at most 2 (now 4)",
    ),
    "calibration": (
        SimilarityMatchingConv2d,
        "set_input",
        fail,
        "layer 0, calibrating: {}: set encode_batch to at most 20 (now 40)",
    ),
    "learning": (
        SimilarityMatchingConv2d,
        "partial_fit",
        fail_shared,
        "layer 0, learning: {}: set model.layers.0.train.batch_size to at most 10 (now 20), or use more ranks",
    ),
    "encoding": (
        Setup,
        "encoded",
        fail,
        "layer 0, encoding: {}: set encode_batch to at most 20 (now 40), or use more ranks",
    ),
    "cache": (
        simmatch.inputs.LayerInputs,
        "_fill",
        fail,
        "layer 1, caching its input: {}: set cache_features to false",
    ),
}


@pytest.mark.parametrize(("owner", "name", "failing", "line"), PLACES.values(), ids=PLACES)
def test_every_activity_has_its_line(
    owner: Any, name: str, failing: Callable[..., Any], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(OutOfMemory) as caught:
        fit_stack(MODEL, IMAGES)
    assert str(caught.value) == line.format("out of memory (asked for 4 GiB)")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_positions_are_lowered_where_the_batch_is_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimilarityMatchingConv2d, "partial_fit", fail)
    train = MODEL.layers[0].train.model_copy(update={"batch_size": 1})
    model = ModelConfig(layers=(MODEL.layers[0].model_copy(update={"train": train}),))
    with pytest.raises(OutOfMemory, match=r": set model\.layers\.0\.train\.positions to at most 4 \(now 8\), or use"):
        fit_stack(model, IMAGES)


def test_other_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    error = KeyError("lr")

    def raise_error(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(SimilarityMatchingConv2d, "partial_fit", raise_error)
    with pytest.raises(KeyError) as caught:
        fit_stack(MODEL, IMAGES)
    assert caught.value is error
    assert Stack(MODEL, simmatch.model.InputConfig(in_channels=1, height=6, width=6, num_classes=2)) is not None
