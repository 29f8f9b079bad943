"""What the sources must not call, what a run must not leave behind, and who may reach its ports."""

from __future__ import annotations

import ast
import ipaddress
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

import jobs.sync
from cluster.collectives import open_store
from cluster.config import RunConfig
from cluster.controller import RunFailed
from cluster.messages import Traceback
from cluster.network import LOOPBACK
from cluster.redaction import Redactor, one_line
from cluster.training import Assignment
from cluster.worker import Worker
from jobs import pretrain
from jobs.options import read_yaml
from jobs.training_job import TrainingJob
from simmatch.config import parse
from simmatch.data.formats import DataError, read_cifar_batch
from tests.exchanges import of_type

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("simmatch", "cluster", "jobs")

FORBIDDEN = {
    r"(pickle|cPickle|cloudpickle|dill|marshal|shelve|joblib)(\..*)?": "runs what it reads",
    r"torch\.(load|save|hub.*)": "pickle",
    r".*\.(all_gather|gather|scatter|broadcast|send|recv)_object(_list)?": "pickle from the network",
    r"(np|numpy)\.load": "needs a look at allow_pickle",
    r"yaml\.(unsafe_|full_)?load(_all)?": "makes objects unless its loader is safe",
    r"eval|exec|compile|os\.(system|popen)|subprocess\.(getoutput|getstatusoutput)": "runs text",
    r"tempfile\.mktemp": "a name that another may take first",
}
"""Name of a call or an import, as a regular expression → why not."""

ALLOWED = {
    ("simmatch/data/formats.py", "pickle"): "CIFAR's own format, read by an unpickler that knows no class but its own",
    ("simmatch/data/formats.py", "pickle._Unpickler"): "the base of that unpickler",
    ("jobs/benchmarks/processes.py", "pickle"): "between the processes of one benchmark, over pipes it has made",
    ("jobs/benchmarks/stream/rivals.py", "pickle"): "the size of what it writes, which nothing reads",
    ("simmatch/documents.py", "yaml.load"): "its loader is a yaml.SafeLoader",
}
"""(file, module or name) → why it may; a name allowed as a module allows what is in it."""


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Everything imported, called or inherited from, by its dotted name; aliases of imports are undone."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {name.asname or name.name: name.name for name in node.names}
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            known |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
            yield from ((f"{node.module}.{name.name}", node.lineno) for name in node.names)
    for node in ast.walk(tree):
        used = [node.func] if isinstance(node, ast.Call) else node.bases if isinstance(node, ast.ClassDef) else []
        for expression in used:
            head, dot, rest = ast.unparse(expression).partition(".")
            yield known.get(head, head) + dot + rest, expression.lineno


def dangers(source: str, file: str) -> list[str]:
    """What a file does that it must not."""
    tree = ast.parse(source)
    findings = []
    for name, line in names(tree):
        allowed = (file, name) in ALLOWED or (file, name.partition(".")[0]) in ALLOWED
        findings += [
            f"{file}:{line}: {name}: {why}"
            for pattern, why in FORBIDDEN.items()
            if re.fullmatch(pattern, name) and not allowed
        ]
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("shell", "allow_pickle", "trust_remote_code"):
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                findings.append(f"{file}:{node.value.lineno}: {node.arg}={ast.unparse(node.value)}")
        elif isinstance(node, ast.keyword) and node.arg == "weights_only":
            findings.append(f"{file}:{node.value.lineno}: weights_only")
    return findings


def test_the_sources_load_no_code() -> None:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 80
    findings = [line for path in files for line in dangers(path.read_text(), str(path.relative_to(ROOT)))]
    assert findings == []


def test_what_is_allowed_is_there_still() -> None:
    for file, name in ALLOWED:
        assert any(
            name == used or used.startswith(f"{name}.") for used, _ in names(ast.parse((ROOT / file).read_text()))
        )


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(b'')", "from pickle import loads\nloads(b'')", "import dill as c\nc.load(f)",
        "import torch\ntorch.load('x')", "from torch import load as a\na('x')", "import torch as t\nt.load('x')",
        "import torch.distributed as d\nd.all_gather_object(a, b)", "import numpy as np\nnp.load('x')",
        "import yaml\nyaml.load(text, yaml.Loader)", "import yaml\nyaml.unsafe_load(text)", "eval('1')",
        "import subprocess\nsubprocess.run('ls', shell=True)", "import os\nos.system('ls')",
        "f(allow_pickle=True)", "f(shell=flag)", "import joblib",
    ],
)  # fmt: skip
def test_what_the_check_finds(source: str) -> None:
    assert dangers(source, "x.py") != []


def test_the_one_loader_of_yaml_makes_no_objects() -> None:
    from simmatch.documents import Loader

    assert issubclass(Loader, yaml.SafeLoader)
    with pytest.raises(yaml.constructor.ConstructorError):
        yaml.load("!!python/object/apply:os.getpid []", Loader)


def test_a_pickle_that_runs_something_does_not(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError):
        read_cifar_batch(path)
    assert not (tmp_path / "ran").exists()


# --- what a run leaves behind --------------------------------------------------------------------------------------

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCY",
    "MLFLOW_TRACKING_PASSWORD": "correct-horse-battery",
    "MLFLOW_TRACKING_TOKEN": "staple-of-tokens-77",
    "RAY_AUTH_TOKEN": "5eC" + "0123456789abcdef" * 4,
    "SIMMATCH_TEST_API_KEY": "api-key-of-the-test",
    "AZURE_STORAGE_KEY": "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1==",
    "AZURE_STORAGE_CONNECTION_STRING": "DefaultEndpointsProtocol=https;AccountName=ada;AccountKey=bm90aGluZw93+x==",
}
USERINFO = "pa55-in-the-uri"
SMALL = (
    "data.train_images=200", "data.test_images=50", "model.layers.0.out_channels=6", "model.layers.1.out_channels=12",
    "model.layers.1.train.epochs=1", "probe.readout=ridge", "tracking.flush_s=0", "tracking.timeout_s=1",
    "cluster.poll_s=0.1",
)  # fmt: skip


@dataclass
class Job:
    """A small run on two ranks, as somebody might start it, with secrets all around.

    Attributes
    ----------
    listening: (address, name of the process) of every port that one of its processes listened on.
    commands: command lines of all its processes, which every user of the machine may read.
    """

    run_dir: Path
    ray_dir: Path
    code: int = -1
    output: str = ""
    listening: set[tuple[str, str]] = field(default_factory=set)
    commands: set[str] = field(default_factory=set)

    def watch(self, pid: int) -> None:
        """Look at the processes once."""
        with suppress(psutil.Error):
            for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
                with suppress(psutil.Error):
                    name = process.name()
                    self.commands.add(" ".join(process.cmdline()))
                    for link in process.net_connections("inet"):
                        if link.status == psutil.CONN_LISTEN:
                            self.listening.add((link.laddr.ip, name))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    ray_dir = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # the path of a socket may have 107 characters
    job = Job(tmp_path_factory.mktemp("secret") / "run", ray_dir)
    words = [sys.executable, "-m", "jobs.pretrain", "--config", str(ROOT / "jobs/configs/digits.yaml")]
    words += ["--run-dir", str(job.run_dir)]
    for assignment in SMALL:
        words += ["--set", assignment]
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
    environment = kept | SECRETS | {
        "MLFLOW_TRACKING_URI": f"http://ada:{USERINFO}@127.0.0.1:1", "RAY_TMPDIR": str(ray_dir),
        "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    environment.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", None)  # the job's own default is what is tested
    process = subprocess.Popen(
        words, env=environment, cwd=job.run_dir.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    reader = threading.Thread(target=lambda: setattr(job, "output", process.stdout.read()), daemon=True)
    reader.start()
    try:
        deadline = time.monotonic() + 110
        while process.poll() is None and time.monotonic() < deadline:
            job.watch(process.pid)
            time.sleep(0.1)
        job.code = process.poll() if process.poll() is not None else -1
        if process.poll() is None:
            process.terminate()
            process.wait(30)
        reader.join(30)
        yield job
    finally:
        assert process.stdout is not None
        process.stdout.close()
        shutil.rmtree(ray_dir, ignore_errors=True)


def leaks(folder: Path) -> list[str]:
    """Files that hold a secret."""
    secrets = [value.encode() for value in (*SECRETS.values(), USERINFO)]
    leaked, seen = [], 0
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content, seen = path.read_bytes(), seen + 1
            leaked += [f"{path}: {secret.decode()}" for secret in secrets if secret in content]
    assert seen > 0
    return leaked


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_no_secret_is_left_behind(job: Job) -> None:
    assert job.code == 0, job.output
    for secret in (*SECRETS.values(), USERINFO):
        assert secret not in job.output
        assert not any(secret in command for command in job.commands)
    written = {path.name for path in job.run_dir.iterdir()}
    assert {"config.yaml", "events.jsonl", "summary.json", "checkpoints", "model", "figures"} <= written
    assert leaks(job.run_dir) == []
    assert "http://***@127.0.0.1:1" in (job.run_dir / "events.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_no_secret_is_left_in_rays_logs(job: Job) -> None:
    assert any(job.ray_dir.rglob("raylet.out")), "Ray has put its files elsewhere: the test shows nothing"
    assert leaks(job.ray_dir) == []


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_no_secret_reaches_mlflow(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole run is sent to a store in a file, which can be looked through byte by byte."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    assert jobs.sync.main([str(job.run_dir), "--uri", f"sqlite:///{tmp_path}/mlflow.db"]) == 0
    assert (tmp_path / "mlflow.db").stat().st_size > 100_000
    assert any((tmp_path / "mlartifacts").rglob("*.pt2"))
    assert leaks(tmp_path) == []
    assert leaks(job.run_dir) == []
    assert not any(secret in "".join(capsys.readouterr()) for secret in (*SECRETS.values(), USERINFO))


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_every_port_of_a_run_is_on_loopback(job: Job) -> None:
    """The driver's, the ranks', torch's store and gloo, and those of the Ray that runs for this job alone."""
    assert job.code == 0, job.output
    processes = {name.partition(".")[0] for _, name in job.listening}
    assert {"gcs_server", "raylet", "ray::Worker"} <= processes
    assert (LOOPBACK, "ray::Worker") in job.listening, "gloo was not seen: the test shows too little"
    assert sorted(place for place in job.listening if not on_loopback(place[0])) == []


def on_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def test_torchs_store_listens_where_it_is_told() -> None:
    """It has no authentication, and listens everywhere by itself."""
    process = psutil.Process()
    before = {link.laddr for link in process.net_connections("inet") if link.status == psutil.CONN_LISTEN}
    store, port = open_store(LOOPBACK, 10.0)
    after = {link.laddr for link in process.net_connections("inet") if link.status == psutil.CONN_LISTEN}
    assert [(address.ip, address.port) for address in after - before] == [(LOOPBACK, port)]
    del store


# --- messages ------------------------------------------------------------------------------------------------------


def test_secrets_are_found_by_their_names() -> None:
    hide = Redactor(
        {**SECRETS, "PATH": "/usr/bin:/bin", "RAY_AUTH_TOKEN_PATH": "/home/ada/token", "MAX_TOKENS": "100000"}
    )
    for secret in SECRETS.values():
        assert hide(f"401 for {secret}!") == "401 for ***!"
    assert hide("account bm90aGluZw93+x== and bm90aGluZw93%2Bx%3D%3D") == "account *** and ***"
    assert hide("key wJalrXUtnFEMI%2FK7MDENG%2FbPxRfiCY in a query") == "key *** in a query"
    assert hide("/usr/bin:/bin, /home/ada/token, 100000") == "/usr/bin:/bin, /home/ada/token, 100000"
    assert hide("https://ada:x@host/?X-Amz-Signature=abc&b=1") == "https://***@host/?X-Amz-Signature=***&b=1"
    nested = {"a": ["correct-horse-battery", 1.0, {"b": None}], "c": OSError("correct-horse-battery")}
    assert hide.all(nested) == {"a": ["***", 1.0, {"b": None}], "c": "***"}


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("DEPLOY_KEY", "0123abcd", "0123abcd"),
        ("DATABASE_PASSWD", "0123abcd", "0123abcd"),
        ("AZURE_STORAGE_SAS", "0123abcd", "0123abcd"),
        ("SMTP_PASS", "0123abcd", "0123abcd"),
        ("GITHUB_PAT", "0123abcd", "0123abcd"),
        ("SERVICE_CREDENTIALS_JSON", '{"id": 1,\n "x": "y"}', '{"id": 1, "x": "y"}'),
        ("SIGNING_PRIVATE_KEY", "-----BEGIN\nMIIEvQIBADANBgkqhkiG9w0B\n-----END", "MIIEvQIBADANBgkqhkiG9w0B"),
        ("SIGNING_PRIVATE_KEY", "-----BEGIN\nMIIE\n-----END", r"-----BEGIN\nMIIE\n-----END"),
        ("HTTPS_PROXY", "http://ada:0123%40bcd@proxy:3128", "0123@bcd"),
        ("MLFLOW_TRACKING_URI", "postgresql://ada:0123abcd@db/x", "0123abcd"),
        ("BUS_CONNECTION_STRING", "Endpoint=sb://x/;SharedAccessKey=0123abcd", "0123abcd"),
    ],
)
def test_kinds_of_secrets(name: str, value: str, text: str) -> None:
    assert Redactor({name: value})(f"401: {text} is wrong") == "401: *** is wrong"
    assert Redactor({})(f"401: {text} is wrong") == f"401: {text} is wrong"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Authorization: Bearer 0123abcd", "Authorization: Bearer ***"),
        ("{'authorization': 'Basic YWRhOnNlY3JldA==', 'x': 1}", "{'authorization': 'Basic ***', 'x': 1}"),
        ("bearer 0123abcd was refused", "bearer *** was refused"),
        ("a bearer token was refused", "a bearer token was refused"),
        ("https://host/?sv=1&client_secret=a&sig=b&key=c&page=2", "https://host/?sv=1&client_secret=***&sig=***&key=***&page=2"),
        ("AccountName=ada;AccountKey=x+y==;Protocol=https", "AccountName=ada;AccountKey=***;Protocol=https"),
        ("-----BEGIN PRIVATE KEY-----\nMII\n-----END", "-----BEGIN PRIVATE KEY-----***-----END"),
        ("a" * 100_000, "a" * 100_000),
    ],
)  # fmt: skip
def test_secrets_that_a_text_itself_shows(text: str, shown: str) -> None:
    started = time.monotonic()
    assert Redactor({})(text) == shown
    assert time.monotonic() - started < 1


def test_a_secret_is_known_from_when_it_comes_to_exist(tmp_path: Path) -> None:
    """As Ray's token does, made after the job's redactor, or kept in a file; what was one once stays one."""
    environment: dict[str, str] = {}
    hide = Redactor(environment)
    assert hide("token 5eC0123abcd") == "token 5eC0123abcd"
    environment["RAY_AUTH_TOKEN"] = "5eC0123abcd"
    assert hide("token 5eC0123abcd") == hide.all("token 5eC0123abcd") == "token ***"
    environment["RAY_AUTH_TOKEN"] = "another-token"
    assert hide("5eC0123abcd, another-token") == "***, ***"
    del environment["RAY_AUTH_TOKEN"]
    (tmp_path / "token").write_text("token-of-a-file\n")
    environment["RAY_AUTH_TOKEN_PATH"] = str(tmp_path / "token")
    assert hide(f"5eC0123abcd, token-of-a-file of {tmp_path}/token") == f"***, *** of {tmp_path}/token"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("token-of-ray")
    environment["HOME"] = str(tmp_path)
    assert hide("token-of-ray") == "***"


def test_a_line_for_a_fault_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRETS["MLFLOW_TRACKING_PASSWORD"])
    line = one_line(OSError("first\n  second " + SECRETS["MLFLOW_TRACKING_PASSWORD"] + "x" * 10**6))
    assert line.startswith("first second ***xxx")
    assert len(line) < 2001


@pytest.mark.parametrize(
    "assignment",
    ["tracking.uri=[https://ada:pa55-in-the-uri@host]", "tracking.uri=htp://ada:pa55-in-the-uri@host",
     "tracking.token=correct-horse-battery", "name=correct-horse-battery!"],
)  # fmt: skip
def test_a_wrong_configuration_is_not_quoted_with_its_secrets(
    assignment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRETS["MLFLOW_TRACKING_PASSWORD"])
    words = ["--config", str(ROOT / "jobs/configs/digits.yaml"), "--set", assignment, "--dry-run"]
    code = pretrain.main(words)
    out, err = capsys.readouterr()
    assert USERINFO not in out + err
    assert "correct-horse" not in out + err
    assert code == 2 or "htp" in assignment  # a dry run opens no tracker, and prints what there is


def test_a_failure_is_told_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the traceback of a rank, in the summary, on the terminal, in the spool; also of a token that came later."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    everything = " ".join([*SECRETS.values(), f"https://ada:{USERINFO}@host"])

    def fail(self: TrainingJob, display: Any, start_step: int) -> None:
        monkeypatch.setenv("RAY_AUTH_TOKEN", SECRETS["RAY_AUTH_TOKEN"])
        display.note(f"rank 1:\nTraceback (most recent call last):\nOSError: {everything}")
        raise RunFailed(f"rank 1 was lost: {everything}")

    monkeypatch.setattr(TrainingJob, "_train", fail)
    words = ["--config", str(ROOT / "jobs/configs/digits.yaml"), "--run-dir", str(tmp_path / "run")]
    assert pretrain.main([*words, "--set", "tracking.enabled=false"]) == 1
    out, err = capsys.readouterr()
    hidden = " ".join(["***"] * len(SECRETS))
    assert f"OSError: {hidden} https://***@host" in out
    assert err == f"error: rank 1 was lost: {hidden} https://***@host\n"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["message"] == err[7:-1]
    assert leaks(tmp_path) == []


def test_a_rank_hides_the_secrets_of_its_own_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver, on another node, need not know them."""
    secret = SECRETS["AZURE_STORAGE_KEY"]
    monkeypatch.setenv("AZURE_STORAGE_KEY", secret)

    class Broken:
        def __init__(self, *_: Any) -> None: ...

        def run(self) -> None:
            raise PermissionError(f"refused: {secret}")

    config = parse(RunConfig, read_yaml(ROOT / "jobs/configs/digits.yaml"))
    worker = Worker(Assignment(config, tmp_path, 0))
    monkeypatch.setattr(worker, "training_class", Broken)
    worker.begin(1)
    assert worker._thread is not None
    worker._thread.join(30)
    status = worker.poll(0)
    assert status.failure is not None
    assert status.failure.message == "rank 0: PermissionError: refused: ***"
    [traceback] = [message.text for message in of_type(status.messages, Traceback)]
    assert "PermissionError: refused: ***" in traceback
    assert secret not in traceback


# --- Ray -----------------------------------------------------------------------------------------------------------

EMBEDDED = """
import os, sys
from jobs.ray_session import start_ray
said = start_ray(1, 60.0)
import ray
print(said, ray.get_runtime_context().gcs_address, os.environ.get("RAY_AUTH_TOKEN"), sep="\\n", flush=True)
sys.stdin.read()
ray.shutdown()
"""


def knock(address: str, token: str | None) -> str:
    """Ask Ray's control store for its nodes; returns the status of the answer."""
    import grpc

    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
        metadata = [("authorization", f"Bearer {token}")] if token else []
        try:
            call(b"", metadata=metadata, timeout=20)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "mode", [None, pytest.param("disabled", marks=pytest.mark.fault)], ids=["by itself", "switched off"]
)
def test_who_may_reach_an_embedded_ray(mode: str | None, tmp_path: Path) -> None:
    """Token authentication is on unless the user has said otherwise; then the job says what that means.

    The token is the run's own, and in no file that others may read.
    """
    ray_dir = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = kept | {"HOME": str(tmp_path), "RAY_TMPDIR": ray_dir, "PYTHONPATH": str(ROOT)}
    if mode is not None:
        environment["RAY_AUTH_MODE"] = mode
    process = subprocess.Popen(
        [sys.executable, "-c", EMBEDDED], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with process.stdout, process.stdin:
            said, address, token = (process.stdout.readline().strip() for _ in range(3))
            assert address.startswith("127.0.0.1:")
            assert len(token) == 64
            assert knock(address, token) == "OK"
            stranger = "UNAUTHENTICATED" if mode is None else "OK"
            assert (knock(address, None), knock(address, "f" * 64)) == (stranger, stranger)
            assert said == ("embedded" if mode is None else "embedded, open to every process of this machine")
        assert process.wait(60) == 0
        assert not (tmp_path / ".ray").exists()
        assert not any(token.encode() in path.read_bytes() for path in Path(ray_dir).rglob("*") if path.is_file())
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(ray_dir, ignore_errors=True)


# --- what is shipped -------------------------------------------------------------------------------------------------


def test_shipped_commands_stay_on_loopback() -> None:
    """Every command of a server that the project tells its users to run, and every one that it runs, unless the server
    asks for passwords."""
    told = [ROOT / "README.md", ROOT / "Makefile", *(each for each in (ROOT / "infra").rglob("*") if each.is_file())]
    commands = [line for path in told for line in re.findall(r".*mlflow (?:server|ui)\b.*", path.read_text())]
    assert len(commands) >= 2
    for line in commands:
        if "--app-name basic-auth" in line:
            continue
        assert not re.search(r"0\.0\.0\.0|--host (?!127\.0\.0\.1)|-h (?!127\.0\.0\.1)", line), line
        assert "--host 127.0.0.1" in line or "mlflow ui" in line  # whose default it is
