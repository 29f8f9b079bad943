"""The trainer against a slow one written out here, and what its observer sees and may do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import reduce
from torch import Tensor

from simmatch import LayerConfig, ModelConfig, Stack, fit_stack
from simmatch.chunks import Chunks
from simmatch.config import parse
from simmatch.data.order import epoch_order
from simmatch.data.sources import Dataset, to_unit
from simmatch.fit import Trainer
from simmatch.geometry import draw_positions
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.model import pooled
from simmatch.observer import Observer, Update
from simmatch.seeding import folded, stream
from simmatch.sharding.mesh import Mesh

MODEL = parse(
    ModelConfig,
    {
        "layers": [
            {
                "out_channels": 8,
                "kernel_size": 3,
                "normalize": "contrast",
                "whiten": True,
                "whiten_images": 150,
                "pool": 3,
                "power": 0.5,
                "train": {"images": 200, "batch_size": 30, "positions": 10},
            },
            {
                "out_channels": 12,
                "kernel_size": "full",
                "whiten": True,
                "supervised": True,
                "label_gain": 30.0,
                "train": {"epochs": 2, "batch_size": 100},
                "dynamics": {"tolerance": 1e-3},
            },
        ]
    },
)
SEED = 5


@pytest.fixture(scope="module")
def images(digits: Dataset) -> Tensor:
    return digits.train_images[:400]


@pytest.fixture(scope="module")
def labels(digits: Dataset) -> Tensor:
    return digits.train_labels[:400]


def stack_of(images: Tensor, dtype: torch.dtype = torch.float64) -> Stack:
    from simmatch.model import InputConfig

    return Stack(MODEL, InputConfig.of(images, 10), seed=SEED, dtype=dtype)


def encoded(layer: SimilarityMatchingConv2d, x: Tensor, *, to_tolerance: bool) -> Tensor:
    return layer.solve(x).y if to_tolerance else layer(x)


@torch.no_grad()
def slowly(images: Tensor, labels: Tensor, *, to_tolerance: bool) -> Stack:
    """Greedy learning as the definition has it: every image in memory, nothing shared, nothing kept for later."""
    stack = stack_of(images)
    x = to_unit(images, torch.float64)
    for index, config in enumerate(MODEL.layers):
        layer, train = stack.layer(index), config.train
        layer.calibrate(x[: config.whiten_images], config.whiten_patches)
        for epoch in range(train.epochs):
            order = epoch_order(len(x), seed=SEED, epoch=epoch, images=train.images)
            for chosen in order.split(train.batch_size):
                drawn = None
                if train.positions is not None:
                    key = folded(stream("positions", SEED + index), int(layer.updates))
                    drawn = draw_positions(train.positions, len(chosen), (6, 6), key)
                layer.partial_fit(layer.prepare(x[chosen], drawn), labels[chosen] if config.supervised else None)
        layer.recertify()
        y = encoded(layer, x, to_tolerance=to_tolerance)
        if config.supervised:
            z = torch.nn.functional.one_hot(labels, 10).double()
            layer.settle_label(reduce(y, "b k h w -> k b", "mean") @ z, z.T @ z)
        x = pooled(y, config)
    return stack


@pytest.mark.parametrize("to_tolerance", [False, True])
@pytest.mark.parametrize("cache", [True, False])
def test_against_the_definition(images: Tensor, labels: Tensor, to_tolerance: bool, cache: bool) -> None:
    """float64; images are encoded in parts of 70 here and at once there: products round differently."""
    trained = Trainer(stack_of(images), images, labels, encode_batch=70, to_tolerance=to_tolerance, cache=cache).fit()
    expected = slowly(images, labels, to_tolerance=to_tolerance).state_dict()
    for name, value in trained.state_dict().items():
        scale = float(expected[name].abs().amax()) if value.numel() else 0.0
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-9 * scale, msg=name)
    assert int(trained.layer(0).updates) == 7
    assert int(trained.layer(1).updates) == 8


class Recorder(Observer):
    """Records all calls of a trainer in order, and ends the training after a given update."""

    def __init__(self, last: tuple[int, int] | None = None) -> None:
        self.said: list[tuple[Any, ...]] = []
        self.updates: list[Update] = []
        self.encoded_images = [0, 0]
        self.last = last

    def restore(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        self.said.append(("restore", index))

    def started(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        assert layer.calibrated
        self.said.append(("started", index))

    def updated(self, update: Update) -> None:
        self.updates.append(update)
        if (update.index, update.number) == self.last:
            raise KeyboardInterrupt

    def learnt(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        self.said.append(("learnt", index))

    def encoded(self, index: int, activities: Tensor, passed: Tensor) -> None:
        assert torch.equal(pooled(activities, MODEL.layers[index]), passed)
        self.encoded_images[index] += len(passed)

    def progress(self, phase: str, done: int, total: int, *, layer: int, **figures: float) -> None:
        if done == total:
            self.said.append((phase, layer))


def test_an_observer_sees_all_of_it_in_order(images: Tensor, labels: Tensor) -> None:
    observer = Recorder()
    Trainer(stack_of(images), images, labels, observer=observer, measure_every=5).fit()
    assert observer.said == [
        *(("restore", 0), ("calibrate", 0), ("started", 0), ("learnt", 0), ("encode", 0)),
        *(("restore", 1), ("calibrate", 1), ("cache", 1), ("started", 1), ("learnt", 1), ("encode", 1)),
    ]
    assert observer.encoded_images == [400, 400]
    assert [(update.index, update.number, update.total) for update in observer.updates] == [
        *((0, number, 7) for number in range(1, 8)),
        *((1, number, 8) for number in range(1, 9)),
    ]
    assert [update.images for update in observer.updates] == [30] * 6 + [20] + [100] * 8
    measured = [(update.index, update.number) for update in observer.updates if update.measurement is not None]
    assert measured == [(0, 5), (0, 7), (1, 5), (1, 8)]


def test_a_trainer_trains_once(images: Tensor, labels: Tensor) -> None:
    trainer = Trainer(stack_of(images), images, labels)
    trainer.fit()
    with pytest.raises(RuntimeError, match=r"fit: expected one call, got another; train on with a new Trainer"):
        trainer.fit()


@pytest.mark.parametrize("last", [(0, 3), (0, 7), (1, 2), (1, 8)])
def test_a_run_that_was_ended_goes_on_bit_by_bit(images: Tensor, labels: Tensor, last: tuple[int, int]) -> None:
    """All that a resumed run needs is in the layers' buffers."""
    expected = Trainer(stack_of(images), images, labels).fit().state_dict()
    ended = stack_of(images)
    with pytest.raises(KeyboardInterrupt):
        Trainer(ended, images, labels, observer=Recorder(last)).fit()
    continued = stack_of(images)
    continued.load_state_dict(ended.state_dict())
    Trainer(continued, images, labels).fit()
    for name, value in continued.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_first_layers_alone(images: Tensor, labels: Tensor) -> None:
    """Nothing asks for labels, and the last layer that learns does not encode unless it must."""
    observer, reader = Recorder(), Recorder()
    stack = Trainer(stack_of(images), images, observer=observer, depth=1).fit()
    whole = Trainer(stack_of(images), images, labels).fit()
    assert torch.equal(stack.layer(0).feedforward, whole.layer(0).feedforward)
    assert int(stack.layer(1).updates) == 0
    assert observer.encoded_images == [0, 0]
    Trainer(stack_of(images), images, observer=reader, depth=1, encode_last=True).fit()
    assert reader.encoded_images == [400, 0]


def test_the_last_layer_keeps_its_output_only_for_an_observer_that_reads_it(images: Tensor, labels: Tensor) -> None:
    """Else a comparison of one layer held all its maps in memory: 36 GB for 50,000 images of CIFAR-10."""

    class Keeper(Observer):
        def __init__(self, keep: bool) -> None:
            self.keep = keep
            self.shapes: list[tuple[int, ...]] = []

        def keeps(self, index: int) -> bool:
            return self.keep

        def advanced(self, index: int, features: Chunks) -> None:
            self.shapes.append(tuple(features[torch.arange(3)].shape))

    kept, left = Keeper(True), Keeper(False)
    stacks = [Trainer(stack_of(images), images, labels, observer=each, encode_last=True).fit() for each in (kept, left)]
    assert kept.shapes[0] == left.shapes[0]  # the layer above learns from it
    assert (kept.shapes[1][0], left.shapes[1]) == (3, (3, 0))
    assert len(kept.shapes[1]) == 4
    for name, value in stacks[0].state_dict().items():
        assert torch.equal(value, stacks[1].state_dict()[name]), name


def test_an_exchange_of_one_rank_learns_the_same(images: Tensor, labels: Tensor) -> None:
    """Its own layers for the ranks' rows; `auto` stands for another solver there, so the solver is named."""
    layers = tuple(
        layer.model_copy(update={"dynamics": layer.dynamics.model_copy(update={"solver": "accelerated"})})
        for layer in MODEL.layers
    )
    model = MODEL.model_copy(update={"layers": layers})
    stacks = [Stack(model, stack_of(images).source, seed=SEED, dtype=torch.float64) for _ in range(2)]
    one = Trainer(stacks[0], images, labels).fit().state_dict()
    other = Trainer(stacks[1], images, labels, mesh=Mesh()).fit().state_dict()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_the_short_way_in(images: Tensor, labels: Tensor) -> None:
    stack = fit_stack(MODEL, to_unit(images), labels, seed=SEED)
    expected = Trainer(stack_of(images, torch.float32), images, labels).fit()
    for name, value in stack.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name
    right = stack.decode(to_unit(images)).argmax(dim=1) == labels
    assert right.float().mean() > 0.6  # chance is 0.1
    assert not stack.training


LAYER = LayerConfig(out_channels=4, kernel_size=3)
SUPERVISED = LayerConfig(out_channels=4, kernel_size=3, supervised=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: fit_stack(ModelConfig(layers=(LAYER,)), x[0]),
            r"images: expected a tensor \[N, C, H, W\], got \[1, 8, 8\]",
        ),
        (lambda x: fit_stack(ModelConfig(layers=(LAYER,)), x[:0]), r"images: expected \[N, 1, 8, 8\], got \[0, "),
        (
            lambda x: fit_stack(ModelConfig(layers=(LAYER, SUPERVISED)), x),
            "labels: expected one for every image, layer 1 is supervised, got none",
        ),
        (
            lambda x: fit_stack(ModelConfig(layers=(SUPERVISED,)), x, torch.zeros(3, dtype=torch.int64)),
            r"labels: expected a tensor of integers \[400\], the class of each image, got \[3\] of torch.int64",
        ),
        (
            lambda x: fit_stack(ModelConfig(layers=(LAYER,)), x.tolist()),
            r"images: expected a tensor \[N, C, H, W\], got list",
        ),
        (lambda x: fit_stack(ModelConfig(layers=(LAYER,)), x.numpy()), r"images: expected a tensor .*, got ndarray"),
        (lambda x: fit_stack(ModelConfig(layers=(LAYER,)), x[:, :0]), r"in_channels: expected greater than 0, got 0"),
        (
            lambda x: fit_stack(ModelConfig(layers=(SUPERVISED,)), x, [0] * 400),  # type: ignore[arg-type]
            r"labels: expected a tensor of integers \[400\], the class of each image, got list",
        ),
        (
            lambda x: fit_stack(ModelConfig(layers=(SUPERVISED,)), x, torch.zeros(0, dtype=torch.int64)),
            r"labels: expected a tensor of integers \[400\], the class of each image, got \[0\] of torch.int64",
        ),
        (
            lambda x: fit_stack(ModelConfig(layers=(SUPERVISED,)), x, torch.full((400,), -5)),
            "labels: expected classes 0 … 0 or -1, got -5",
        ),
        (
            lambda x: Trainer(stack_of(x), x, torch.zeros(400, dtype=torch.int64), measure_every=0),
            "measure_every: expected at least 1, got 0",
        ),
        (
            lambda x: Trainer(stack_of(x), x, torch.zeros(400, dtype=torch.int64), encode_batch=0),
            "encode_batch: expected at least 1, got 0",
        ),
        (lambda x: Trainer(stack_of(x), x[:, :, :7], torch.zeros(400)), r"images: expected \[N, 1, 8, 8\], got \[400"),
    ],
)
def test_what_does_not_fit_is_refused(images: Tensor, call: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(images)
