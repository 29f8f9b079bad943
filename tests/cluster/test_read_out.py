"""What a readout sees is what the exported model calls features; one that cannot be made costs only its accuracy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.config import RunConfig
from cluster.messages import Outbox, Progress, ReadoutScored, TrainingWarning
from cluster.read_out import Parts, Ranks, Sample, choose, fit
from cluster.training import Assignment, Training
from simmatch import load_model
from simmatch.config import parse
from simmatch.data.sources import load_dataset, to_unit
from simmatch.features import FeatureStore
from simmatch.labels import UNLABELLED
from simmatch.memory import Lever
from simmatch.model import Stack
from simmatch.readout import LinearClassifier, ReadoutName, fit_readout
from simmatch.seeding import seeded
from simmatch.sharding.exchange import Exchange
from simmatch.sharding.mesh import Mesh
from tests.exchanges import ThreadExchange, of_type, results, run_owners
from tests.live_bytes import LiveBytes


@pytest.mark.parametrize("features", ["last", "all", "unsupervised"])
@pytest.mark.parametrize("pool", [None, 2])
def test_a_readout_sees_the_exported_models_features(
    digits_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    features: str,
    pool: int | None,
) -> None:
    values = digits_config(1, checkpoint={"every_steps": 1000}, probe={"readout": "ridge"})
    values = values.model_dump(mode="json")
    values["model"] |= {"features": features, "feature_pool": pool}
    values["model"]["layers"][0] |= {"pool": 3, "power": 0.5}
    config = parse(RunConfig, values)
    read: dict[str, Tensor] = {}

    def recorded(config: Any, stack: Stack, data: Any, train: Parts, test: FeatureStore, **_: Any) -> None:
        read["train"] = torch.cat([features for _, features in train])
        read["test"] = torch.cat([features for _, features in test.encode(stack.features)])

    monkeypatch.setattr("cluster.training.read_out", recorded)
    with torch.no_grad():
        Training(Assignment(config, tmp_path, 0), Mesh(), Outbox(), torch.device("cpu")).run()
    model, data = load_model(tmp_path / "model"), load_dataset(config.data)
    expected = {"train": data.train_images, "test": data.test_images}
    sizes = {"last": 10, "all": 10 * (pool or 3) ** 2 + 10, "unsupervised": 10 * (pool or 3) ** 2}
    for part, images in expected.items():
        assert read[part].shape == (len(images), sizes[features])
        # batches of 20 and of all images round differently
        torch.testing.assert_close(read[part], model.features(to_unit(images)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("readout", ["logistic", "knn"])
def test_a_readout_that_cannot_be_made_is_left_out(
    digits_config: Callable[..., RunConfig], tmp_path: Path, readout: str
) -> None:
    """One labelled image holds one class, and is fewer than the neighbours that are asked."""
    config = digits_config(1, probe={"readout": readout, "train_images": 1})
    outbox = Outbox()
    with torch.no_grad():
        Training(Assignment(config, tmp_path, 0), Mesh(), outbox, torch.device("cpu")).run()
    (warning,) = of_type(outbox.messages, TrainingWarning)
    assert warning.text.startswith(f"the {readout} readout is left out: ")
    (scored,) = of_type(outbox.messages, ReadoutScored)
    assert (scored.readout, scored.train_images, scored.accuracy) == (readout, 1, None)
    assert scored.accuracy_decode is not None
    assert scored.accuracy_decode > 0.1
    assert load_model(tmp_path / "model").features(torch.rand(2, 1, 8, 8)).shape[0] == 2
    assert outbox.phases[-1] == Progress("readout", 1, 1)


# -- many images, several ranks ----------------------------------------------------------------------------------------

CHUNK = 100
CPU = torch.device("cpu")


def features_of(chunk: int, size: int) -> Tensor:
    return torch.randn(CHUNK, size, generator=seeded("features", chunk))


def every_second(images: int, size: int, exchange: Exchange) -> Parts:
    """The features of a chunk of images, made when they are asked for: on every rank in turn."""
    for chunk in range(exchange.rank, images // CHUNK, exchange.world_size):
        yield slice(chunk * CHUNK, (chunk + 1) * CHUNK), features_of(chunk, size)


def together(exchange: Exchange) -> Ranks:
    return Ranks(exchange, CPU, lambda work: None if work is None else work(), Lever("probe.train_images", 1))


def labels_of(images: int) -> Tensor:
    """Three classes, and every seventh image without a label."""
    labels = torch.arange(images) % 3
    labels[::7] = UNLABELLED
    return labels


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("name", "size"), [("ridge", 20), ("ridge", 600), ("logistic", 20), ("knn", 20)])
def test_ranks_fit_what_one_fits_on_all_features(ranks: int, name: ReadoutName, size: int) -> None:
    """Moments and, with more features than images, the dual form; every rank has a linear readout, rank 0 the other."""
    images = 600
    chosen = (labels_of(images) != UNLABELLED).nonzero().flatten()
    sample = Sample(chosen, labels_of(images)[chosen])
    features = torch.cat([features_of(chunk, size) for chunk in range(images // CHUNK)])
    expected = fit_readout(name, features[chosen], sample.labels)

    def owner(exchange: ThreadExchange) -> Any:
        return fit(name, every_second(images, size, exchange), sample, size, together(exchange))

    for rank, readout in enumerate(results(run_owners(ranks, owner))):
        if isinstance(expected, LinearClassifier):
            torch.testing.assert_close(readout.scores(features), expected.scores(features), rtol=0, atol=2e-6)
        elif rank == 0:
            assert torch.equal(readout.predict(features), expected.predict(features))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_memory_of_ridge_does_not_grow_with_the_images(ranks: int) -> None:
    """Ten times as many images, whose features take 41 MB; the moments 2 MB."""
    size = 512

    def peak(images: int) -> int:
        def owner(exchange: ThreadExchange) -> int:
            sample = Sample(torch.arange(images), torch.arange(images) % 3)
            ranks = together(exchange)
            with LiveBytes() as live:
                assert fit("ridge", every_second(images, size, exchange), sample, size, ranks) is not None
            return live.peak

        return int(results(run_owners(ranks, owner))[0])

    few, many = peak(2000), peak(20_000)
    assert many < 1.15 * few
    assert many < 0.25 * 20_000 * size * 4


def test_a_subset_is_balanced_drawn_with_the_seed_and_named(digits_config: Callable[..., RunConfig]) -> None:
    labels = torch.cat([torch.zeros(50), torch.ones(500), torch.full((30,), -1)]).long()

    def chosen(**probe: Any) -> Sample:
        return choose(digits_config(1, probe=probe), labels, features=100, value_bytes=4)

    whole = chosen(readout="logistic", max_feature_bytes=550 * 400)
    assert (len(whole.images), whole.subset) == (550, "")
    assert len(chosen(readout="ridge", max_feature_bytes=400).images) == 550
    sample = chosen(readout="logistic", max_feature_bytes=150 * 400)
    assert torch.bincount(sample.labels).tolist() == [50, 100]
    assert torch.equal(labels[sample.images], sample.labels)
    assert torch.equal(sample.images, chosen(readout="knn", max_feature_bytes=150 * 400).images)
    assert sample.subset == (
        "150 of 550 labelled images, drawn with seed 0, balanced over 2 classes: probe.max_feature_bytes is 60 kB, "
        "and the features of all take 220 kB"
    )
    assert torch.bincount(chosen(readout="knn", max_feature_bytes=41 * 400).labels).tolist() == [20, 20]
    assert len(chosen(readout="knn", max_feature_bytes=1).images) == 2  # one of each class


def test_the_accuracy_on_a_subset_says_so(digits_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = digits_config(1, probe={"readout": "logistic", "max_feature_bytes": 10 * 4 * 200})
    outbox = Outbox()
    with torch.no_grad():
        Training(Assignment(config, tmp_path, 0), Mesh(), outbox, CPU).run()
    (warning,) = of_type(outbox.messages, TrainingWarning)
    (scored,) = of_type(outbox.messages, ReadoutScored)
    assert warning.text == f"the logistic readout is fitted on {scored.subset}"
    assert 150 < scored.train_images <= 200
    assert scored.accuracy is not None
    assert scored.accuracy > 0.3
