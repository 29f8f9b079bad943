"""A logged model as others use it: scored by MLflow, on a machine that need not have this project."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.tracking.mlflow_model import _save, load_exported
from simmatch.config import ModelConfig, parse
from simmatch.model import InputConfig, Stack, save_model

SIZE = (1, 6, 6)
CONVOLUTION = {"out_channels": 5, "kernel_size": 3, "pool": 2, "dynamics": {"encode_iterations": 3}}
DENSE = {"out_channels": 6, "kernel_size": "full", "supervised": True, "dynamics": {"encode_iterations": 3}}
OWN = ("simmatch", "cluster", "jobs")


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stack, Path]:
    """A stack of two layers, the upper one supervised, and the folder that MLflow keeps of it."""
    return log([CONVOLUTION, DENSE], torch.float32, tmp_path_factory.mktemp("float32") / "50% off? #1")


def log(layers: list[dict[str, Any]], dtype: torch.dtype, folder: Path) -> tuple[Stack, Path]:
    channels, height, width = SIZE
    source = InputConfig(in_channels=channels, height=height, width=width, num_classes=3)
    stack = Stack(parse(ModelConfig, {"layers": layers}), source, dtype=dtype)
    for name, tensor in stack.named_buffers():
        if name.endswith("label"):
            torch.nn.init.normal_(tensor, generator=torch.Generator().manual_seed(0))
    save_model(stack, folder / "model")
    _save(load_exported(str(folder / "model")), folder / "logged", SIZE)
    return stack.eval(), folder / "logged"


def images(batch: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(batch, *SIZE, generator=torch.Generator().manual_seed(batch)).to(dtype)


@pytest.fixture
def pyfunc(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`mlflow.pyfunc.load_model`, which puts a model's code on the path for good; no pickle is loaded, and the
    folder stays as it was saved: Python keeps no compiled code beside the model's."""
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's own type hints, which it looks at while it is imported
        import mlflow.pyfunc

    return mlflow.pyfunc.load_model


def check(found: dict[str, Any], expected: dict[str, torch.Tensor]) -> None:
    """The same outputs, each of the same dtype; JSON has none."""
    assert sorted(found) == sorted(expected)
    for name, values in expected.items():
        dtype = values.dtype if isinstance(found[name], list) else None
        torch.testing.assert_close(torch.as_tensor(found[name], dtype=dtype), values)


def test_arrays_of_any_batch_are_scored(logged: tuple[Stack, Path], pyfunc: Any) -> None:
    stack, folder = logged
    model = pyfunc(folder.as_uri())
    for batch in (1, 2, 9):  # it was traced with two
        found = model.predict(images(batch).numpy())
        assert {type(values) for values in found.values()} == {np.ndarray}
        check(found, stack.outputs(images(batch)))


@pytest.mark.parametrize("key", ["inputs", "instances"])
def test_the_scoring_protocol(key: str, logged: tuple[Stack, Path], pyfunc: Any) -> None:
    from mlflow.pyfunc.scoring_server import invocations

    stack, folder = logged
    model = pyfunc(folder.as_uri())
    body = json.dumps({key: images(4).tolist()})
    answer = invocations(body, "application/json", model, model.metadata.get_input_schema())
    assert answer.status == 200
    check(json.loads(answer.response)["predictions"], stack.outputs(images(4)))


def test_a_model_of_float64_takes_float64_and_json_of_either(tmp_path: Path, pyfunc: Any) -> None:
    """Of one layer that is not supervised: there are no scores."""
    from mlflow.pyfunc.scoring_server import invocations

    stack, folder = log([CONVOLUTION], torch.float64, tmp_path)
    model = pyfunc(folder.as_uri())
    [spec] = model.metadata.get_input_schema().inputs
    assert (spec.type, spec.shape) == (np.dtype("float64"), (-1, *SIZE))
    check(model.predict(images(3, torch.float64).numpy()), stack.outputs(images(3, torch.float64)))
    body = json.dumps({"inputs": images(3).tolist()})
    answer = invocations(body, "application/json", model, model.metadata.get_input_schema())
    found = json.loads(answer.response)["predictions"]
    assert sorted(found) == ["features"]
    check(found, stack.outputs(images(3, torch.float64)))


def test_the_folder_holds_the_graph_and_its_loader(logged: tuple[Stack, Path]) -> None:
    _, folder = logged
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    own = {"data/model.pt2", "code/simmatch_scoring.py"}
    examples = {"input_example.json", "serving_input_example.json"}
    assert files == own | examples | {"MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt"}


def test_the_kept_example_is_answered(logged: tuple[Stack, Path], pyfunc: Any) -> None:
    stack, folder = logged
    model = pyfunc(folder.as_uri())
    example = model.metadata.load_input_example(str(folder))
    assert (example.dtype, example.shape) == (np.float32, (2, *SIZE))
    check(model.predict(example), stack.outputs(torch.from_numpy(example)))


@pytest.fixture
def elsewhere(tmp_path: Path) -> dict[str, str]:
    """An environment in which this project cannot be imported."""
    for name in OWN:
        (tmp_path / f"{name}.py").write_text("raise ImportError('not on this machine')\n")
    paths = {"PYTHONPATH": str(tmp_path), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return {**os.environ, **paths, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}


@pytest.mark.fault
def test_mlflow_predicts_and_serves_without_this_project(
    logged: tuple[Stack, Path], tmp_path: Path, elsewhere: dict[str, str]
) -> None:
    stack, folder = logged
    body = tmp_path / "body.json"
    body.write_text(json.dumps({"inputs": images(3).tolist()}))
    command = [sys.executable, "-m", "mlflow", "models"]
    where = ["--model-uri", folder.as_uri(), "--env-manager", "local"]
    told = ["--content-type", "json", "--input-path", str(body), "--output-path", str(tmp_path / "found.json")]
    subprocess.run([*command, "predict", *where, *told], cwd=tmp_path, env=elsewhere, check=True, timeout=100)
    check(json.loads((tmp_path / "found.json").read_text())["predictions"], stack.outputs(images(3)))

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    log = tmp_path / "serve.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "serve", *where, "--host", "127.0.0.1", "--port", str(port)],
            cwd=tmp_path, env=elsewhere, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 100
        while (answer := ask(port, json.loads(body.read_text()))) is None:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        check(answer["predictions"], stack.outputs(images(3)))
        for batch in (1, 8):
            answer = ask(port, {"instances": images(batch).tolist()})
            assert answer is not None
            check(answer["predictions"], stack.outputs(images(batch)))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # its own session: nobody else's processes
        server.wait()


def ask(port: int, body: dict[str, Any]) -> Any:
    """What the server answers; None where nobody listens."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)
    except ConnectionError:
        return None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ConnectionRefusedError):
            return None
        raise
