"""A readout that cannot be made costs an accuracy, and nothing that was learnt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.config import RunConfig
from cluster.messages import Progress, ReadoutScored, TrainingWarning
from cluster.training import Assignment, Training
from cluster.worker import Outbox
from simmatch import load_model
from simmatch.sharding.exchange import IDENTITY
from tests.exchanges import of_type


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
