"""Streams of images and their rows."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.covariance import OAS
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from jobs.benchmarks.stream.discriminant import NearestMean, StreamingDiscriminant, fourier_features
from jobs.benchmarks.stream.image_rivals import LeNetRow
from jobs.benchmarks.stream.image_rows import SPLIT_ROWS, discriminant_size, own_bytes
from jobs.benchmarks.stream.images import turned
from jobs.benchmarks.stream.prequential import run_stream
from jobs.benchmarks.stream.rivals import NetworkSettings
from jobs.benchmarks.stream.rows import Fixed, WithReadout
from jobs.benchmarks.stream.streams import Labelling, Part, Stream
from jobs.evaluation.backprop import TrainSettings
from simmatch.online.readout import OnlineReadout, ReadoutConfig
from simmatch.readout import fit_ridge

SIZE, CLASSES = 12, 4


def records(count: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated Gaussian features [N, 1, 1, F] in float64, class by class, of unequal numbers."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(count, generator=generator).square() * CLASSES).long().sort().values
    mixing = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    means = torch.randn(CLASSES, SIZE, generator=generator, dtype=torch.float64)
    x = torch.randn(count, SIZE, generator=generator, dtype=torch.float64) @ mixing + means[labels]
    return x.reshape(count, 1, 1, SIZE), labels


def flat(x: Tensor) -> Tensor:
    return x.flatten(1)


def learnt(row: StreamingDiscriminant | NearestMean, x: Tensor, labels: Tensor, batch: int = 30) -> None:
    for some, given in zip(x.split(batch), labels.split(batch), strict=True):
        row.predict(some)
        row.learn(some, given)
    row.end_segment(0)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_streaming_discriminant_is_that_of_all_records_together(shrinkage: float) -> None:
    x, labels = records()
    row = StreamingDiscriminant(flat, SIZE, CLASSES, shrinkage)
    learnt(row, x, labels)
    oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(flat(x).numpy(), labels.numpy())
    others, _ = records(300, seed=1)
    assert row.predict(others).tolist() == oracle.predict(flat(others).numpy()).tolist()


def test_oracle_shrinkage_is_that_of_scikit_learn() -> None:
    x, labels = records()
    row = StreamingDiscriminant(flat, SIZE, CLASSES)
    learnt(row, x, labels)
    means = torch.stack([flat(x)[labels == each].mean(dim=0) for each in range(CLASSES)])
    oracle = OAS(assume_centered=True).fit((flat(x) - means[labels]).numpy())
    torch.testing.assert_close(row.covariance(), torch.from_numpy(oracle.covariance_), rtol=1e-9, atol=1e-12)


def test_nearest_mean_is_that_of_all_records_together() -> None:
    x, labels = records()
    row = NearestMean(flat, SIZE, CLASSES)
    learnt(row, x, labels)
    oracle = NearestCentroid().fit(flat(x).numpy(), labels.numpy())
    others, _ = records(300, seed=1)
    assert row.predict(others).tolist() == oracle.predict(flat(others).numpy()).tolist()


def test_fourier_features_approach_a_gaussian_kernel() -> None:
    x, size, gamma = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(4)), 20_000, 0.3
    features = fourier_features(size, 16, gamma, seed=0)(x)
    kernel = torch.exp(-gamma * torch.cdist(flat(x), flat(x)).square())
    assert (features @ features.T - kernel).abs().max() < 5 / math.sqrt(size)  # the products' deviation is < 1/√F


def test_randumb_is_the_discriminant_of_all_fourier_features_together() -> None:
    generator = torch.Generator().manual_seed(5)
    x, labels = torch.rand(300, 1, 4, 4, generator=generator), torch.arange(CLASSES).repeat_interleave(75)
    x += labels.reshape(-1, 1, 1, 1) / 4
    features = fourier_features(40, 16, 0.2, seed=1)
    row = StreamingDiscriminant(features, 40, CLASSES, shrinkage=0.1)
    learnt(row, x, labels)
    oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1)
    oracle.fit(features(x).double().numpy(), labels.numpy())
    others = torch.rand(200, 1, 4, 4, generator=generator) + 0.4
    assert row.predict(others).tolist() == oracle.predict(features(others).double().numpy()).tolist()


@pytest.fixture(scope="module")
def stream() -> Stream:
    """Two segments of two classes each: bright top or left, then bottom or right."""

    def part(name: str, classes: list[int], count: int, seed: int) -> Part:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.tensor(classes).repeat(count)
        x = 0.3 * torch.rand(len(labels), 1, 16, 16, generator=generator)
        for image, label in zip(x, labels.tolist(), strict=True):
            image.transpose(1, 2 if label % 2 else 1)[:, slice(0, 6) if label < 2 else slice(10, 16)] += 0.5
        return Part(name, (255 * x).to(torch.uint8), labels)

    parts = [part("warm-up", [0, 1], 20, 0), part("0, 1", [0, 1], 20, 1), part("2, 3", [2, 3], 20, 2)]
    held_out = part("0, 1", [0, 1], 10, 3), part("2, 3", [2, 3], 10, 4)
    return Stream("example", 4, parts[0], tuple(parts[1:]), held_out, batch_size=10)


@pytest.mark.parametrize("name", list(SPLIT_ROWS))
def test_rows_learn_a_stream(stream: Stream, name: str) -> None:
    kind = SPLIT_ROWS[name]
    settings = next(iter(kind.candidates.values()))
    if isinstance(settings, TrainSettings):
        settings = settings.shortened(0.02)
    result = run_stream(stream, kind.make(stream, 0, settings), Labelling(), seed=0)
    assert result.final is not None
    assert result.state_bytes > 0
    if not name.startswith(("LeNet", "joint, LeNet")):  # which needs more steps
        assert result.final > 0.5, result.held_out


def test_frozen_features_forget_nothing(stream: Stream) -> None:
    """Scores from sums, collected class by class, are those of a ridge regression of all records together."""
    row = SPLIT_ROWS["similarity matching, frozen"].make(stream, 0, None)
    run_stream(stream, row, Labelling(), seed=0)
    assert isinstance(row, WithReadout)
    x, labels = (
        torch.cat(values) for values in zip(*(next(part.batches(40)) for part in stream.segments), strict=True)
    )
    encoded = row.features.encode(x)
    scores = row.readout.scores(encoded) if row.readout else None
    penalty = row.config.penalty + row.config.initial_penalty * encoded.shape[1] / len(labels)
    expected = fit_ridge(encoded, labels, penalty).scores(encoded)
    torch.testing.assert_close(scores, expected, rtol=0.0, atol=5e-3)  # the penalty is that of a few records ago


def test_a_readout_is_recomputed_where_features_move() -> None:
    level = [1.0]

    class Moving(Fixed):
        def learn(self, x: Tensor, labels: Tensor) -> None:
            level[0] += 1.0

    row = WithReadout(Moving(lambda x: level[0] * flat(x)), ReadoutConfig(reservoir=100), recompute_every=4)
    x, labels = records(80)
    for number, (some, given) in enumerate(zip(x.split(10), labels.split(10), strict=True), start=1):
        row.learn(some, given)
        oracle = OnlineReadout(SIZE, row.config)
        oracle.learn(level[0] * flat(x[: 10 * number]), labels[: 10 * number], inputs=x[: 10 * number])
        assert row.readout is not None
        expected = oracle.scores(flat(x))
        same = expected is None or torch.allclose(row.readout.scores(flat(x)), expected)  # type: ignore[arg-type]
        assert same == (number % 4 == 0 or expected is None)


def test_state_of_all_rows_of_equal_bytes_is_ours(stream: Stream) -> None:
    own = own_bytes(stream)
    size = discriminant_size(own, 4)
    state = [StreamingDiscriminant(flat, each, 4).nbytes for each in (size, size + 1)]
    assert state[0] <= own < state[1]
    row = SPLIT_ROWS["LeNet, replay at equal bytes"].make(stream, 0, NetworkSettings())
    assert isinstance(row, LeNetRow)
    record = 16 * 16 + 8
    assert own - record < row.nbytes + row.settings.replay * record <= own


def test_images_turn_counter_clockwise() -> None:
    image = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    image[..., 2:6, 10:18] = 255
    assert turned(image, torch.tensor([90.0])).equal(image.rot90(1, dims=(2, 3)))
    assert turned(image, torch.tensor([0.0])).equal(image)
