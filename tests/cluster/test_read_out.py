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
from cluster.training import Assignment, Training
from simmatch import load_model
from simmatch.config import parse
from simmatch.data.sources import load_dataset, to_unit
from simmatch.readout import fit_readout
from simmatch.sharding.exchange import IDENTITY
from tests.exchanges import of_type


@pytest.mark.parametrize("features", ["last", "all", "unsupervised"])
@pytest.mark.parametrize("pool", [None, 2])
def test_a_readout_sees_the_exported_models_features(
    digits_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    features: str,
    pool: int | None,
) -> None:
    values = digits_config(1, checkpoint={"every_steps": 1000}, probe={"train_images": 100, "readout": "ridge"})
    values = values.model_dump(mode="json")
    values["model"] |= {"features": features, "feature_pool": pool}
    values["model"]["layers"][0] |= {"pool": 3, "power": 0.5}
    config = parse(RunConfig, values)
    read: dict[str, Tensor] = {}

    def recorded(name: Any, train: Tensor, labels: Tensor) -> Any:
        readout = fit_readout(name, train, labels)
        score = readout.score

        def scored(test: Any, labels: Any) -> float:
            read["test"] = torch.from_numpy(test)
            return float(score(test, labels))

        read["train"], readout.score = train, scored
        return readout

    monkeypatch.setattr("cluster.read_out.fit_readout", recorded)
    with torch.no_grad():
        Training(Assignment(config, tmp_path, 0), IDENTITY, Outbox(), torch.device("cpu")).run()
    model, data = load_model(tmp_path / "model"), load_dataset(config.data)
    expected = {"train": data.train_images[:100], "test": data.test_images}
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
        Training(Assignment(config, tmp_path, 0), IDENTITY, outbox, torch.device("cpu")).run()
    (warning,) = of_type(outbox.messages, TrainingWarning)
    assert warning.text.startswith(f"the {readout} readout is left out: ValueError: ")
    (scored,) = of_type(outbox.messages, ReadoutScored)
    assert (scored.readout, scored.train_images, scored.accuracy) == (readout, 1, None)
    assert scored.accuracy_decode is not None
    assert scored.accuracy_decode > 0.1
    assert load_model(tmp_path / "model").features(torch.rand(2, 1, 8, 8)).shape[0] == 2
    assert outbox.phases[-1] == Progress("readout", 1, 1)
