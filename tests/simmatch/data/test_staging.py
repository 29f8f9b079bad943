"""Batches one ahead of their use. Oracles: the same batches without a thread, a log of events, correct rounding."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from simmatch.config import LayerConfig, ModelConfig, PlasticityConfig, TrainConfig
from simmatch.data.sources import Dataset, to_unit
from simmatch.data.staging import IN_FLIGHT, THREAD, Tensors, Transfer, staged
from simmatch.fit import Trainer
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.model import InputConfig, Stack
from simmatch.observer import Observer, Update

CPU = torch.device("cpu")
END_S = 5.0
"""Limit for a thread that has been told to end."""


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


def assert_no_thread_is_left() -> None:
    for thread in threads():
        thread.join(END_S)
    assert threads() == []


def numbered(count: int) -> Iterator[Tensors]:
    return ((torch.full((2,), number), torch.tensor([number])) for number in range(count))


@pytest.mark.parametrize("ahead", [False, True])
def test_batches_come_in_order(ahead: bool) -> None:
    found = [(one.tolist(), other.item()) for one, other in staged(numbered(20), CPU, ahead=ahead)]
    assert found == [([number, number], number) for number in range(20)]
    assert_no_thread_is_left()


def test_exactly_one_batch_is_prepared_ahead() -> None:
    """While a batch is used the next one is prepared, and no other."""
    prepared = [threading.Event() for _ in range(5)]

    def batches() -> Iterator[Tensors]:
        for event in prepared:
            event.set()
            yield (torch.zeros(1),)

    with closing(staged(batches(), CPU, ahead=True)) as parts:
        for number, _ in enumerate(parts):
            if number < 4:
                assert prepared[number + 1].wait(END_S)
            assert not any(event.is_set() for event in prepared[number + 2 :])


def test_an_exception_is_raised_where_its_batch_is_asked_for() -> None:
    def batches() -> Iterator[Tensors]:
        yield from numbered(3)
        raise OSError("shard 7: cannot be read")

    parts = staged(batches(), CPU, ahead=True)
    for _ in range(3):
        next(parts)
        time.sleep(0.01)  # the fourth fails meanwhile
    with pytest.raises(OSError, match="shard 7: cannot be read"):
        next(parts)
    assert_no_thread_is_left()


def test_closing_ends_the_thread_even_in_the_middle_of_a_read() -> None:
    reading, finish = threading.Event(), threading.Event()

    def batches() -> Iterator[Tensors]:
        yield (torch.zeros(1),)
        reading.set()
        finish.wait(END_S)
        yield (torch.zeros(1),)

    with closing(staged(batches(), CPU, ahead=True)) as parts:
        next(parts)
        assert reading.wait(END_S)
    (thread,) = threads()  # closing did not wait for it
    assert thread.daemon  # nor would the end of the program
    finish.set()
    assert_no_thread_is_left()


def test_reading_is_hidden_behind_computing() -> None:
    """20 ms each: 12 batches one after the other take 480 ms, one ahead 260 ms."""

    def batches() -> Iterator[Tensors]:
        for _ in range(12):
            time.sleep(0.02)
            yield (torch.zeros(1),)

    started = time.perf_counter()
    for _ in staged(batches(), CPU, ahead=True):
        time.sleep(0.02)
    assert time.perf_counter() - started < 0.42


# -- to a CUDA device --------------------------------------------------------------------------------------------------


class FakeEvent:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def synchronize(self) -> None:
        self.log.append("device reached")


class FakeTransfers:
    """Stands in for streams, events and tensors of a card, and notes what is done with them."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.log: list[str] = []

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = event or FakeEvent(self.log)
        self.log.append("event")
        return event

    def wait_event(self, event: FakeEvent) -> None:
        self.log.append("wait for event")

    def pin_memory(self) -> FakeTransfers:
        self.log.append("pin")
        return self

    def to(self, device: torch.device, *, non_blocking: bool) -> FakeTransfers:
        self.log.append(f"copy to {device}, {non_blocking=}")
        return self

    def record_stream(self, stream: FakeTransfers) -> None:
        self.log.append("in use")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTransfers:
    fake = FakeTransfers()

    @contextmanager
    def stream(chosen: FakeTransfers) -> Iterator[None]:
        fake.log.append("side stream")
        yield
        fake.log.append("end")

    monkeypatch.setattr("torch.cuda.Stream", lambda device: fake)
    monkeypatch.setattr("torch.cuda.Event", lambda *, blocking: FakeEvent(fake.log))
    monkeypatch.setattr("torch.cuda.stream", stream)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: fake)
    return fake


def test_a_batch_is_pinned_copied_and_waited_for_by_the_stream_that_uses_it(fake: FakeTransfers) -> None:
    transfer = Transfer(torch.device("cuda"))
    tensors: Any = (fake, fake)
    with transfer.stream():
        sent = transfer.send(tensors)
    transfer.receive(sent)
    copy = ["pin", "copy to cuda, non_blocking=True"]
    received = ["wait for event", "event", "in use", "in use"]
    assert fake.log == ["side stream", *copy, *copy, "event", "end", *received]


def test_no_more_than_a_few_batches_wait_for_the_device(fake: FakeTransfers) -> None:
    """Each batch is sent before the one before it is received, as by the thread."""
    transfer, tensors = Transfer(torch.device("cuda")), (fake,)
    waits = []
    sent = transfer.send(tensors)  # type: ignore[arg-type]
    for _ in range(10):
        before = fake.log.count("device reached")
        following = transfer.send(tensors)  # type: ignore[arg-type]
        waits.append(fake.log.count("device reached") - before)
        transfer.receive(sent)
        sent = following
    assert waits == [0] * (IN_FLIGHT + 1) + [1] * (9 - IN_FLIGHT)


@pytest.mark.gpu
def test_a_card_receives_what_was_read_without_a_wait_of_the_host(cuda: torch.device) -> None:
    images = torch.randint(0, 256, (640, 3, 32, 32), dtype=torch.uint8)
    torch.zeros(1, device=cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = ((part, torch.arange(64)) for part in images.split(64))
        found = [to_unit(part) for part, _ in staged(batches, cuda, ahead=True)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(torch.cat(found).cpu(), to_unit(images))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_card_converts_pixels_as_the_cpu_does(dtype: torch.dtype, cuda: torch.device) -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_unit(pixels.to(cuda), dtype).cpu(), to_unit(pixels, dtype))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 24), (torch.float64, 53)])
def test_pixels_are_divided_with_correct_rounding(dtype: torch.dtype, bits: int) -> None:
    """The error of v/255 is at most half a unit in the last place; a product with 1/255 misses that in float32."""
    values = to_unit(torch.arange(256, dtype=torch.uint8), dtype)
    for pixel, value in enumerate(values.tolist()):
        exact = Fraction(pixel, 255)
        exponent = 0 if pixel == 0 else -next(n for n in range(1, 10) if exact * 2**n >= 1)
        assert abs(Fraction(value) - exact) <= Fraction(2) ** (exponent - bits)
    if dtype == torch.float32:
        assert not torch.equal(values, torch.arange(256, dtype=dtype) * (1.0 / 255.0))


class Divisors(TorchDispatchMode):
    """Notes by what is divided."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_):
            self.found.append(args[1])
        return func(*args, **(kwargs or {}))


def test_a_card_divides_by_a_tensor_of_its_own() -> None:
    """A number, or a tensor on the host, is divided by as a product with its reciprocal there."""
    with FakeTensorMode(allow_non_fake_inputs=True), Divisors() as seen:
        assert to_unit(torch.zeros(4, dtype=torch.uint8, device="cuda")).device.type == "cuda"
    (divisor,) = seen.found
    assert isinstance(divisor, Tensor)
    assert divisor.device.type == "cuda"


# -- learning from images that are read --------------------------------------------------------------------------------


class Read:
    """Images that are not in memory: their number, and reading some of them, which may take long or fail."""

    def __init__(self, images: Tensor, before: Callable[[int], None] = lambda count: None) -> None:
        self._images, self._before = images, before

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, indices: Tensor) -> Tensor:
        assert indices.dtype == torch.int64
        assert indices.ndim == 1
        self._before(len(indices))
        return self._images[indices]


RATES = PlasticityConfig(lr=0.1)
LAYERS = (
    LayerConfig(
        out_channels=6,
        kernel_size=3,
        pool=3,
        normalize="contrast",
        whiten=True,
        whiten_images=100,
        train=TrainConfig(batch_size=30, epochs=2, positions=8),
        plasticity=RATES,
    ),
    LayerConfig(
        out_channels=12,
        kernel_size="full",
        supervised=True,
        label_gain=10.0,
        train=TrainConfig(batch_size=40, epochs=1, images=190),
        plasticity=RATES,
    ),
)
IMAGES = 200


def trainer(images: Any, dataset: Dataset, *, stack: Stack | None = None, **options: Any) -> Trainer:
    source = InputConfig(in_channels=1, height=8, width=8, num_classes=10)
    stack = stack or Stack(ModelConfig(layers=LAYERS), source, seed=3)
    return Trainer(stack, images, dataset.train_labels[:IMAGES], encode_batch=80, **options)


@pytest.mark.parametrize("cache", [True, False])
def test_read_images_teach_what_images_in_memory_teach(cache: bool, digits: Dataset) -> None:
    images = digits.train_images[:IMAGES]
    one, other = (trainer(each, digits, cache=cache).fit().state_dict() for each in (images, Read(images)))
    for name, value in one.items():
        assert torch.equal(other[name], value), name
    assert_no_thread_is_left()


class Faults(Observer):
    """Notes at which update of which layer an exception passed."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int, str]] = []

    @contextmanager
    def updating(self, index: int, layer: SimilarityMatchingConv2d) -> Iterator[None]:
        try:
            yield
        except OSError as fault:
            self.found.append((index, int(layer.updates), str(fault)))
            raise


def test_a_read_that_fails_stops_its_own_update_and_nothing_is_lost(digits: Dataset) -> None:
    """The fourth read of a batch of 30 fails."""
    images, observer, batches = digits.train_images[:IMAGES], Faults(), itertools.count(1)

    def fail(count: int) -> None:
        if count == 30 and next(batches) == 4:
            raise OSError("a damaged shard")

    first = trainer(Read(images, fail), digits, observer=observer)
    with pytest.raises(OSError, match="a damaged shard"):
        first.fit()
    assert observer.found == [(0, 3, "a damaged shard")]
    assert int(first.stack.layer(0).updates) == 3
    assert_no_thread_is_left()
    resumed = trainer(Read(images), digits, stack=first.stack).fit().state_dict()
    for name, value in trainer(images, digits).fit().state_dict().items():
        assert torch.equal(resumed[name], value), name


class Stop(Observer):
    """Stops in the middle of the second layer's epoch, as a job does that is asked to."""

    def updated(self, update: Update) -> None:
        if (update.index, update.number) == (1, 2):
            raise InterruptedError


def test_a_stop_ends_the_thread_and_loses_nothing(digits: Dataset) -> None:
    images = digits.train_images[:IMAGES]
    first = trainer(Read(images), digits, observer=Stop(), cache=False)
    with pytest.raises(InterruptedError):
        first.fit()
    assert_no_thread_is_left()
    resumed = trainer(Read(images), digits, stack=first.stack, cache=False).fit().state_dict()
    for name, value in trainer(images, digits, cache=False).fit().state_dict().items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.parametrize(("shape", "given"), [((20, 3, 8, 8), r"\[20, 3, 8, 8\]"), ((0, 1, 8, 8), r"\[0\]")])
def test_read_images_of_another_shape_are_refused(shape: tuple[int, ...], given: str, digits: Dataset) -> None:
    with pytest.raises(ValueError, match=rf"images: expected \[N, 1, 8, 8\], got {given}"):
        trainer(Read(torch.zeros(shape, dtype=torch.uint8)), digits)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda found: found[:-1], r"expected a tensor \[30, C, H, W\] for as many indices, got \[29, 1, 8, 8\]"),
        (lambda found: found.numpy(), r"expected a tensor \[30, C, H, W\] for as many indices, got ndarray"),
        (
            lambda found: found[:, :, :7],
            r"expected the shape of those that were read first, \[1, 8, 8\], got \[1, 7, 8\]",
        ),
    ],
)
def test_reads_that_are_not_what_was_asked_for_are_refused(
    spoil: Callable[[Tensor], Any], message: str, digits: Dataset
) -> None:
    """In the middle of learning, where a layer would learn from what it gets."""

    class Spoilt(Read):
        batches = 0

        def __getitem__(self, indices: Tensor) -> Any:
            self.batches += len(indices) == 30
            found = super().__getitem__(indices)
            return spoil(found) if self.batches == 4 else found

    first = trainer(Spoilt(digits.train_images[:IMAGES]), digits)
    with pytest.raises(ValueError, match=message):
        first.fit()
    assert int(first.stack.layer(0).updates) == 3
    assert_no_thread_is_left()
