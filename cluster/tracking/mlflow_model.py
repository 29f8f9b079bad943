"""Logs an exported model to MLflow as a logged model, in the `pt2` format: a traced graph, no pickle.

It has two flavors: `pytorch` gives back the module, `python_function` takes arrays and can be served.
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cluster.tracking.simmatch_scoring as scoring
from cluster.tracking.delivery import RejectedError
from simmatch.files import write_whole

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.models import ModelSignature
    from torch import Tensor, nn

MODEL = "model"
"""Name of the logged model."""
MODEL_KEY_TAG = "simmatch.model_key"
# torch.export turns an axis of length 1 into a constant: the batch has to be longer to stay open
EXAMPLE_BATCH = 2
MOST_SHOWN = 50_000
"""Values of an example that is kept as JSON."""
EXAMPLES = "input_example.json", "serving_input_example.json"
"""MLflow's names of the example, and of the request that holds it. It keeps that of an array, but with an array it
would also add its own flavor, which takes no named outputs; of a tensor it keeps none."""


@dataclass(frozen=True)
class ModelLogger:
    """Logs exported models to a run.

    Called again with the same key, it completes the model that it began and makes no second one.
    """

    load: Callable[[str], nn.Module]
    """Loads the exported folder as a module in evaluation mode: `[B, C, H, W]` in [0, 1] → a dictionary of tensors,
    `features` `[B, F]` and, if supervised, `scores` `[B, classes]`."""

    def __call__(self, path: Path, input_shape: Sequence[int], run_id: str, key: str, client: MlflowClient) -> None:
        run = client.get_run(run_id)
        linked = {output.model_id for output in run.outputs.model_outputs} if run.outputs else set()
        model = self._find(client, run.info.experiment_id, run_id, key, linked)
        if model is not None and model.status == "READY" and model.model_id in linked:
            return
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            try:
                _save(self.load(str(path)), folder, input_shape)
            except OSError:  # a full disk may have room later
                raise
            except Exception as error:  # a model that cannot be exported now cannot be later either
                raise RejectedError(f"{type(error).__name__}: {error}") from error
            if model is None:  # only once it can be filled: a job that ends meanwhile leaves no pending model
                model = client.create_logged_model(
                    run.info.experiment_id,
                    name=MODEL,
                    source_run_id=run_id,
                    tags={MODEL_KEY_TAG: key},
                    model_type="simmatch",
                )
            _name(folder, model)
            client.log_model_artifacts(model.model_id, str(folder))
        self._link(client, run_id, model.model_id)

    def tidy(self, run_id: str, client: MlflowClient) -> None:
        """Remove models begun for this run that are not among its outputs, if one with the same key is."""
        run = client.get_run(run_id)
        linked = {output.model_id for output in run.outputs.model_outputs} if run.outputs else set()
        models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'")
        done = {model.tags.get(MODEL_KEY_TAG) for model in models if model.model_id in linked}
        for model in models:
            if model.model_id not in linked and model.tags.get(MODEL_KEY_TAG) in done:
                client.delete_logged_model(model.model_id)

    @staticmethod
    def _find(client: MlflowClient, experiment_id: str, run_id: str, key: str, linked: set[str]) -> LoggedModel | None:
        models = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
        # if a request that came late has made a second one, always take the same: the one in use
        candidates = sorted(models, key=lambda m: (m.model_id not in linked, m.status != "READY", m.model_id))
        return next((model for model in candidates if model.tags.get(MODEL_KEY_TAG) == key), None)

    def _link(self, client: MlflowClient, run_id: str, model_id: str) -> None:
        from mlflow.entities import LoggedModelOutput

        client.finalize_logged_model(model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])


def load_exported(path: str) -> nn.Module:
    """`simmatch.load_model` as a module with named outputs."""
    from simmatch.model import Outputs, load_model

    return Outputs(load_model(path))


def signature_of(example: Tensor, outputs: dict[str, Tensor]) -> ModelSignature:
    """Signature of a module with one input and named outputs; the first axis, the batch, is open."""
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    def spec(tensor: Tensor, name: str | None = None) -> Any:
        array = tensor.numpy()
        return TensorSpec(array.dtype, (-1, *array.shape[1:]), name)

    return ModelSignature(Schema([spec(example)]), Schema([spec(value, name) for name, value in outputs.items()]))


def _name(folder: Path, logged: LoggedModel) -> None:
    """Write into an MLflow model folder which logged model it is."""
    from mlflow.models import Model

    model = Model.load(str(folder))
    model.artifact_path, model.run_id = logged.artifact_location, logged.source_run_id
    model.model_uuid = model.model_id = logged.model_id
    model.save(str(folder / "MLmodel"))


def _save(module: nn.Module, path: Path, input_shape: Sequence[int]) -> None:
    """Write an MLflow model folder; the example, and with it the signature, has the dtype of the weights."""
    import mlflow.pytorch
    import torch
    from mlflow.models import Model

    module = module.eval().cpu()
    drawn = torch.rand(EXAMPLE_BATCH, *input_shape, generator=torch.Generator().manual_seed(0))
    example = drawn.to(scoring.dtype_of(module))
    model = Model()
    # MLflow's own takes no named outputs; written as `mlflow.pyfunc`, which takes seconds to import, would
    model.add_flavor(
        "python_function",
        loader_module=Path(scoring.__file__).stem,
        python_version=platform.python_version(),
        data="data",
        code="code",
        env={"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
    )
    shown = example.numel() <= MOST_SHOWN
    if shown:
        model.saved_input_example_info = {
            "artifact_path": EXAMPLES[0], "serving_input_path": EXAMPLES[1], "type": "ndarray", "format": "tf-serving"
        }  # fmt: skip
    with torch.no_grad():
        mlflow.pytorch.save_model(
            module,
            str(path),
            mlflow_model=model,
            signature=signature_of(example, module(example)),
            input_example=example,
            serialization_format="pt2",
            code_paths=[scoring.__file__],
            # given, because MLflow would start a process to find them
            pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}", f"mlflow=={mlflow.__version__}"],
        )
    for name, content in zip(EXAMPLES, (example.tolist(), {"inputs": example.tolist()}), strict=True):
        if shown:
            write_whole(path / name, json.dumps(content))
