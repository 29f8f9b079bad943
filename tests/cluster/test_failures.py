"""Which errors are retryable: Ray's own objects, and what gloo and the store raise when a real peer has gone."""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import ray.exceptions as rx
import torch
import torch.distributed as dist
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo

from cluster.checkpoints.manifest import DamagedError
from cluster.collectives import PeerTimeout, TorchExchange, connect_store, open_store
from cluster.failures import SETTLE_S, classify, group_failure
from cluster.messages import RankStatus
from cluster.monitors import TrainingFault
from cluster.policy import Failure
from cluster.training import Assignment
from cluster.worker import Worker
from simmatch.chunks import ChunkLost
from simmatch.config import ConfigError, DynamicsConfig
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.memory import Lever, MemoryWatch, OutOfMemory
from simmatch.remote import StorageError
from simmatch.sharding.faults import SharedFault
from simmatch.sharding.mesh import Mesh
from simmatch.sharding.rows import split_rows
from tests.exchanges import results
from tests.faults import Kind, inject
from tests.simmatch.kernels import scripted

LOOPBACK = "127.0.0.1"

CUDA_ADVICE = (
    "Search for `cudaErrorAssert' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for it.\n"
    "CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)


def in_an_actor(error: Exception) -> rx.RayTaskError:
    """What `ray.get` raises for an exception of an actor's method."""
    return rx.RayTaskError("join", f"Traceback\n{type(error).__name__}: {error}", error).as_instanceof_cause()


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


RETRYABLE = [
    DamagedError("x: expected sha256 1…, got 2…"),
    StorageError("s3://x: away"),
    raised_from(TrainingFault("layer 1, step 3: x"), ChunkLost("encoded images: x: Input/output error")),
    rx.ActorDiedError(),
    rx.ActorUnavailableError("the connection is broken", None),
    rx.RayActorError(),
    rx.WorkerCrashedError(),
    rx.NodeDiedError("node 7"),
    rx.LocalRayletDiedError(),
    rx.GetTimeoutError("Get timed out"),
    rx.ObjectLostError("id", None, ""),
    rx.OwnerDiedError("id", None, ""),
    rx.ObjectFetchTimedOutError("id", None, ""),
    rx.RaySystemError("System error: broken"),
    rx.RpcError("RPC error: unavailable", 14),
    rx.OutOfMemoryError("Task was killed due to the node running low on memory."),
    rx.OutOfDiskError("full"),
    rx.ObjectStoreFullError("full"),
    rx.ActorPlacementGroupRemoved(),
    rx.TaskPlacementGroupRemoved(),
    rx.ActorUnschedulableError("no node"),
    rx.TaskUnschedulableError("no node"),
    in_an_actor(dist.DistNetworkError("The client socket has failed to connect")),
    in_an_actor(dist.DistStoreError("wait timeout after 3000ms, keys: /generation-0//cpu//0")),
    in_an_actor(PeerTimeout("rank 0 of 2 waited for exchange 7 (limit 3 s): closed")),
    PeerTimeout("rank 0 of 2 waited for exchange 7 (limit 3 s): closed"),
    dist.DistBackendError("NCCL error in: …, remote process exited or there was a network error\nncclRemoteError: …"),
    dist.DistBackendError("NCCL error in: …, unhandled system error\nncclSystemError: Call to ibv_modify_qp failed"),
    RuntimeError("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7) ran for 120000 ms"),
    RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
    torch.AcceleratorError(f"CUDA error: device-side assert triggered\n{CUDA_ADVICE}"),
    RuntimeError(f"CUDA error: unspecified launch failure\n{CUDA_ADVICE}"),
    torch.AcceleratorError(f"CUDA error: an illegal memory access was encountered\n{CUDA_ADVICE}"),
    torch.AcceleratorError("CUDA error: the launch timed out and was terminated"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
    RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\ndevices unavailable"),
    torch.AcceleratorError("CUDA error: uncorrectable NVLink error detected during the execution"),
    OutOfMemory("layer 0, learning: out of GPU memory", elsewhere=True),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    TimeoutError("timed out"),
    OSError(errno.ENETUNREACH, "Network is unreachable"),
    OSError(errno.EIO, "Input/output error"),
    raised_from(TrainingFault("layer 0, step 3: …"), RuntimeError("CUDA error: uncorrectable ECC error encountered")),
]

FATAL = [
    rx.ActorDiedError(rx.RayTaskError("__init__", "Traceback\nModuleNotFoundError: No module named 'cluster'", None)),
    rx.RuntimeEnvSetupError("pip failed"),
    rx.AuthenticationError("a token is needed"),
    rx.RpcError("RPC error: InvalidAuthToken: Authentication token is missing or incorrect", 16),
    ConnectionError("RPC error: InvalidAuthToken: Authentication token is missing or incorrect"),
    rx.TaskCancelledError(),
    in_an_actor(ValueError("cluster.interface: expected eth7, got lo")),
    in_an_actor(FileNotFoundError(errno.ENOENT, "--run-dir: expected a folder")),
    ConfigError("mesh: expected a larger cluster"),
    dist.DistBackendError("NCCL error in: …, invalid usage\nncclInvalidUsage: Duplicate GPU detected"),
    dist.DistBackendError("NCCL error in: …, invalid argument\nncclInvalidArgument: …"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    raised_from(OutOfMemory("layer 0, learning: out of memory"), MemoryError()),
    torch.AcceleratorError("CUDA error: invalid device ordinal"),
    torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    MemoryError(),
    OSError(errno.ENOSPC, "No space left on device"),
    PermissionError(errno.EACCES, "Permission denied"),
    KeyError("lr"),
    TrainingFault("layer 0, step 3: non-finite activities on rank 1", diverged=True),
    raised_from(TrainingFault("layer 0, step 3: exception on rank 1"), SharedFault("exception", [1])),
]


def named(error: BaseException) -> str:
    return f"{type(error).__name__}-{str(error)[:30]}"


@pytest.mark.parametrize(
    ("error", "retryable"), [(error, True) for error in RETRYABLE] + [(error, False) for error in FATAL], ids=named
)
def test_every_error_is_classified(error: BaseException, retryable: bool) -> None:
    failure = classify(error)
    assert failure.retryable == retryable
    assert failure.message
    assert "\n" not in failure.message
    assert failure.diverged == getattr(error, "diverged", False)
    assert failure.fits is None


def test_every_error_of_ray_is_considered() -> None:
    """A new version of Ray may add errors: they count as fatal until somebody has decided."""
    not_raised_here = {
        "AsyncioActorExit",
        "CrossLanguageError",
        "ObjectRefStreamEndOfStreamError",
        "OufOfBandObjectRefSerializationException",
        "PendingCallsLimitExceeded",
        "PlasmaObjectNotAvailable",
        "RayError",
        "UnserializableException",
        "UserCodeException",
        "ActorAlreadyExistsError",
        "ActorHandleNotFoundError",
        "RayTaskError",
    }
    tested = {kind.__name__ for error in (*RETRYABLE, *FATAL) for kind in type(error).__mro__}
    known = {name for name, kind in vars(rx).items() if isinstance(kind, type) and issubclass(kind, rx.RayError)}
    derived = {
        name
        for name in known
        for kind in vars(rx)[name].__mro__[1:]
        if kind.__name__ in {"ObjectLostError", "RaySystemError"}
    }
    assert known - tested - not_raised_here - derived == set()


@pytest.mark.parametrize(
    ("reason", "text", "preempted", "end"),
    [
        ("AUTOSCALER_DRAIN_PREEMPTED", "The actor died because its node has died.", True, "; its node was drained"),
        (
            "EXPECTED_TERMINATION",
            "The actor died because its node has died.\n\tthe actor's node was terminated expectedly: received SIGTERM",
            True,
            "; its node was ended: received SIGTERM",
        ),
        (
            "UNEXPECTED_TERMINATION",
            "The actor died because its node has died.\n\tthe actor's node was terminated unexpectedly: no heartbeats",
            False,
            "its node has died.",
        ),
    ],
)
def test_a_node_that_is_taken_away_on_purpose_is_no_failure(reason: str, text: str, preempted: bool, end: str) -> None:
    """As Ray reports an actor of it."""
    died = ActorDiedErrorContext(
        error_message=text, actor_id=bytes(16), node_death_info=NodeDeathInfo(reason=NodeDeathInfo.Reason.Value(reason))
    )
    failure = classify(rx.ActorDiedError(died))
    assert (failure.retryable, failure.preempted) == (True, preempted)
    assert failure.message.endswith(end)


def test_the_message_is_one_line_without_details() -> None:
    error = in_an_actor(ValueError("cluster.interface: expected eth7,\n  got lo"))
    assert classify(error) == Failure("ValueError: cluster.interface: expected eth7,", retryable=False)
    error = rx.ActorDiedError(rx.RayTaskError("__init__", "Traceback\nModuleNotFoundError: No module 'x'", None))
    assert classify(error).message == "ModuleNotFoundError: No module 'x'"
    error = torch.AcceleratorError(f"CUDA error: device-side assert triggered\n{CUDA_ADVICE}")
    assert classify(error).message == "AcceleratorError: CUDA error: device-side assert triggered"
    assert classify(PeerTimeout("rank 0 waited: closed\nat pair.cc:547")).message == "rank 0 waited: closed"


# -- one rank's error and what the others say of it --------------------------------------------------------------------


def of_rank(rank: int, error: Exception | None, idle_s: float = 0.0) -> RankStatus:
    failure = None if error is None else classify(error)
    return RankStatus(rank, error is not None, failure, [], [], {"": 7}, idle_s=idle_s)


def in_update(error: Exception | None = None) -> Exception:
    """What a rank's training ends with after an exception of rank 1; `error` is its own."""
    shared = SharedFault("exception", [1])
    shared.__cause__ = error
    return raised_from(TrainingFault("layer 0, step 3: exception on rank 1"), shared)


LOST_CARD = torch.AcceleratorError("CUDA error: unspecified launch failure")
LOST_PEER = PeerTimeout("rank 0 of 2 waited for exchange 7 (limit 3 s): closed")


@pytest.mark.parametrize("told", [in_update(), LOST_PEER], ids=["told", "waited"])
@pytest.mark.parametrize("own", [in_update(LOST_CARD), LOST_CARD, in_update(KeyError("lr"))], ids=named)
def test_the_rank_with_the_error_speaks_for_all(told: Exception, own: Exception) -> None:
    """Whoever reports first, and whether or not the error is one that a new group may survive."""
    for statuses in ([of_rank(0, told), of_rank(1, own)], [of_rank(0, own), of_rank(1, told)]):
        assert group_failure(statuses, 100.0, 100.0) == classify(own)


def test_the_rank_with_the_error_is_waited_for() -> None:
    """The others have been told of it, and their poll may come before its own report."""
    assert group_failure([of_rank(0, in_update()), of_rank(1, None, 99.0)], 100.0, 100.0) is None
    failure = group_failure([of_rank(0, in_update(), SETTLE_S + 1.0), of_rank(1, None)], 100.0, 100.0)
    assert failure == classify(in_update())


def learn_and_look(exchange: TorchExchange, kind: Kind) -> Failure | None:
    """Updates whose faults are recorded, as on a GPU: rank 1's second one fails, and all ranks look after the third."""
    rows = split_rows(8, exchange.world_size)[exchange.rank]
    dynamics = DynamicsConfig(exchange="gather_state")
    layer = SimilarityMatchingConv2d(1, 8, kernel_size=3, dynamics=dynamics, rows=rows, mesh=Mesh.of_owners(exchange))
    try:
        with MemoryWatch(torch.device("cpu")) as memory, pytest.MonkeyPatch.context() as patch:
            scripted.use(patch)
            memory.begin("layer 0, learning", Lever("model.layers.0.train.batch_size", 5))
            for update in range(3):
                if (exchange.rank, update) == (1, 1):
                    inject(kind, layer)
                layer.partial_fit(layer.prepare(torch.rand(5, 1, 6, 6)), recorded=True)
            layer.raise_faults()
    except Exception as error:
        return classify(error)
    return None


@pytest.mark.parametrize(
    ("kind", "text", "retryable"),
    [
        ("memory", "layer 0, learning: out of GPU memory (asked for 2.1 GiB, ", False),
        ("card", "SharedFault: exception on rank 1 in update 2: AcceleratorError: CUDA error: unspecified", True),
        ("exception", "SharedFault: exception on rank 1 in update 2: InjectedError: injected", False),
        ("nan feedforward", "SharedFault: non-finite weights on rank 1 in update 2", False),
    ],
)
def test_recorded_faults_keep_their_rank_and_their_cause(ranks: Any, kind: Kind, text: str, retryable: bool) -> None:
    told, own = results(ranks(learn_and_look, 2, kind))
    assert own.message.startswith(text)
    assert (own.retryable, own.secondary) == (retryable, False)
    assert told.secondary == (kind != "nan feedforward")
    assert told.message.endswith(f"{'weights' if 'nan' in kind else 'exception'} on rank 1 in update 2")
    statuses = [RankStatus(rank, True, failure, [], [], {"": 12}) for rank, failure in enumerate((told, own))]
    assert group_failure(statuses, 100.0, 100.0) == own


@pytest.mark.parametrize(("device", "name"), [("cpu", "rank 0"), ("cuda", f"rank 0 on {socket.gethostname()}, GPU 3")])
def test_a_rank_on_a_gpu_is_named_with_it(
    device: str, name: str, digits_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def __init__(self, *_: Any) -> None:
            raise LOST_CARD

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    worker = Worker(Assignment(digits_config(1, device=device), tmp_path, 0))
    worker.training_class = Failing  # type: ignore[assignment]
    worker._run(torch.get_num_threads())
    failure = worker.poll(0).failure
    assert failure == Failure(f"{name}: AcceleratorError: CUDA error: unspecified launch failure", retryable=True)


# -- what gloo and the store raise -------------------------------------------------------------------------------------


def exchange_once(exchange: TorchExchange) -> dist.Work:
    gathered = torch.zeros(exchange.world_size, 1000)
    return dist.all_gather_single(gathered.view(-1), gathered[exchange.rank], group=exchange.group, async_op=True)


def lose_a_peer(exchange: TorchExchange, how: str) -> str:
    """The text of gloo's own error, as a plain RuntimeError has it, on the rank that is left."""
    exchange_once(exchange).wait()
    if exchange.rank == 1:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3.0)
        return "away"
    try:
        time.sleep(0.5 if how == "kill" else 0.0)
        for _ in range(3):
            exchange_once(exchange).wait()
    except RuntimeError as error:
        return f"{type(error).__name__}|{error}"
    return "no error"


@pytest.mark.parametrize("how", ["kill", "sleep"])
def test_the_error_of_gloo_about_a_lost_peer_is_retryable(ranks: Any, how: str) -> None:
    """gloo has no type for it: the text is all there is."""
    kind, _, text = ranks(lose_a_peer, 2, how, exchange_timeout_s=2.0)[0].partition("|")
    assert kind == "RuntimeError"
    assert classify(RuntimeError(text)).retryable, text


def test_the_error_of_the_store_about_missing_ranks_is_retryable() -> None:
    store, port = open_store(LOOPBACK, 0.5)
    with pytest.raises(dist.DistStoreError) as caught:
        store.get("never set")
    assert classify(caught.value).retryable
    other = connect_store(LOOPBACK, port, 0.5)
    with pytest.raises(dist.DistStoreError) as caught:
        other.wait(["never set"], timedelta(seconds=0.2))
    assert classify(caught.value).retryable


def test_a_missing_store_is_retryable() -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(dist.DistNetworkError) as caught:
        connect_store(LOOPBACK, port, 0.5)
    assert classify(caught.value).retryable


def leave_with_the_store(exchange: TorchExchange) -> str:
    """Rank 0, which holds the store, dies; the error that rank 1 gets when it uses the store."""
    if exchange.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    try:
        store = dist.distributed_c10d._get_default_store()
        for number in range(10):
            store.set(f"key-{number}", "value")
            store.get(f"key-{number}")
    except Exception as error:
        return f"{type(error).__name__}|{error}"
    return "no error"


def test_the_error_of_a_store_that_died_is_retryable(ranks: Any) -> None:
    error = ranks(leave_with_the_store, 2, exchange_timeout_s=2.0)[1]
    if isinstance(error, str):
        kind, _, text = error.partition("|")
        error = getattr(dist, kind, RuntimeError)(text)
    assert classify(error).retryable, error  # an exception where the store was gone while the rank still joined
