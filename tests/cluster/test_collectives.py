"""Real gloo between real processes: what arrives, what is counted, who can listen, and what a missing peer costs."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import time
import warnings
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cluster import collectives
from cluster.collectives import PeerTimeout, TorchExchange, connect_store, join_group, open_store
from simmatch.inputs import gather_images, own_part
from simmatch.sharding.exchange import Exchange, IdentityExchange
from simmatch.sharding.rows import split_rows
from simmatch.sharding.sums import sum_over_ranks
from tests.exchanges import results

LOOPBACK = "127.0.0.1"
SHAPES = [(1,), (3,), (17, 3), (1001,), (5, 0)]  # (5, 0): the label weights of an unsupervised layer
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8]
SLACK_S = 5.0  # a busy machine may be late, but a limit that is not kept is late by far more

Counted = tuple[int, int]


def pattern(rank: int, shape: tuple[int, ...], dtype: torch.dtype, salt: int = 0) -> Tensor:
    """Values that tell rank and place apart and that every dtype here holds exactly: integers below 128."""
    count = int(torch.tensor(shape).prod())
    return ((torch.arange(count) * 7 + rank * 31 + salt * 13) % 127).reshape(shape).to(dtype)


def stacked(world_size: int, shape: tuple[int, ...], dtype: torch.dtype, salt: int = 0) -> Tensor:
    """What everybody must hold in the end."""
    return torch.stack([pattern(rank, shape, dtype, salt) for rank in range(world_size)])


def begin(exchange: Exchange, shape: tuple[int, ...], dtype: torch.dtype, salt: int = 0) -> tuple[Tensor, Any]:
    """Start one gather; the slices of the others hold a value that no rank sends."""
    gathered = torch.full((exchange.world_size, *shape), 127, dtype=dtype)
    gathered[exchange.rank] = pattern(exchange.rank, shape, dtype, salt)
    return gathered, exchange.all_gather(gathered)


# -- what arrives ------------------------------------------------------------------------------------------------------


def gather_everything(exchange: TorchExchange) -> tuple[list[Tensor], list[Counted]]:
    found, counted = [], []
    for shape in SHAPES:
        for dtype in DTYPES:
            before = exchange.bytes_exchanged
            gathered, handle = begin(exchange, shape, dtype)
            handle.wait()
            found.append(gathered)
            counted.append((exchange.num_completed, exchange.bytes_exchanged - before))
    return found, counted


def gather_by_the_older_name(exchange: TorchExchange) -> tuple[list[Tensor], list[Counted]]:
    """The same without `all_gather_single`, as before torch 2.14. Later ones warn of the older name."""
    vars(dist).pop("all_gather_single", None)
    importlib.reload(collectives)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return gather_everything(exchange)


@pytest.mark.parametrize(
    ("program", "world_size"), [(gather_everything, 2), (gather_everything, 3), (gather_by_the_older_name, 2)]
)
def test_every_rank_holds_every_slice_and_counts_its_bytes(ranks: Any, program: Any, world_size: int) -> None:
    outcomes = ranks(program, world_size)
    cases = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    for found, counted in outcomes:
        for gathered, (shape, dtype) in zip(found, cases, strict=True):
            assert gathered.dtype == dtype
            assert torch.equal(gathered, stacked(world_size, shape, dtype))
        # by hand: what comes in is one slice from each of the others
        slices = [torch.empty(shape, dtype=dtype) for shape, dtype in cases]
        assert counted == [
            (number, (world_size - 1) * part.numel() * part.element_size()) for number, part in enumerate(slices, 1)
        ]
    assert ranks.num_exchanges == [len(cases)] * world_size


def exchange_everything(exchange: TorchExchange) -> tuple[list[Tensor], list[int]]:
    """Owner s sends owner r the pattern of s, salted by r."""
    found, counted = [], []
    for shape in SHAPES:
        for dtype in DTYPES:
            before = exchange.bytes_exchanged
            sent = torch.stack([pattern(exchange.rank, shape, dtype, to) for to in range(exchange.world_size)])
            received = torch.full_like(sent, 127)
            exchange.all_to_all(received, sent).wait()
            found.append(received)
            counted.append(exchange.bytes_exchanged - before)
    assert exchange.num_completed == exchange.num_exchanges
    return found, counted


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_rank_receives_what_each_sent_to_it(ranks: Any, world_size: int) -> None:
    outcomes = ranks(exchange_everything, world_size) if world_size > 1 else [everything_alone()]
    cases = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    for rank, (found, counted) in enumerate(results(outcomes)):
        for received, (shape, dtype) in zip(found, cases, strict=True):
            assert torch.equal(received, stacked(world_size, shape, dtype, salt=rank))
        slices = [torch.empty(shape, dtype=dtype) for shape, dtype in cases]
        assert counted == [(world_size - 1) * part.numel() * part.element_size() for part in slices]
    assert world_size == 1 or ranks.num_exchanges == [len(cases)] * world_size


def broadcast_everything(exchange: TorchExchange) -> tuple[list[Tensor], list[Counted]]:
    """The last owner sends its pattern."""
    found, counted = [], []
    for shape in SHAPES:
        for dtype in DTYPES:
            before = exchange.bytes_exchanged
            found.append(pattern(exchange.rank, shape, dtype))
            exchange.broadcast(found[-1], source=exchange.world_size - 1).wait()
            counted.append((exchange.num_completed, exchange.bytes_exchanged - before))
    return found, counted


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_broadcast_reaches_every_rank_once(ranks: Any, world_size: int) -> None:
    """In place, and not more bytes with more ranks: a gather brings a copy from each."""
    last = world_size - 1
    cases = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    for rank, (found, counted) in enumerate(results(ranks(broadcast_everything, world_size))):
        for number, (tensor, (shape, dtype)) in enumerate(zip(found, cases, strict=True), 1):
            assert torch.equal(tensor, pattern(last, shape, dtype))
            assert counted[number - 1] == (number, tensor.nbytes if rank != last else 0)


def gather_at_first(exchange: TorchExchange) -> list[Tensor]:
    found = []
    for shape in SHAPES:
        for dtype in DTYPES:
            whole = pattern(0, shape, dtype).new_empty(exchange.world_size if exchange.rank == 0 else 0, *shape)
            before = exchange.bytes_exchanged
            exchange.gather(pattern(exchange.rank, shape, dtype), whole).wait()
            assert exchange.bytes_exchanged - before == max(0, whole.nbytes - whole[:1].nbytes)
            found.append(whole)
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_gather_reaches_rank_0_alone(ranks: Any, world_size: int) -> None:
    first, *others = results(ranks(gather_at_first, world_size))
    cases = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    for whole, (shape, dtype) in zip(first, cases, strict=True):
        assert torch.equal(whole, torch.stack([pattern(rank, shape, dtype) for rank in range(world_size)]))
    assert all(len(whole) == 0 for found in others for whole in found)


def sums(exchange: TorchExchange) -> list[Tensor]:
    generator = torch.Generator().manual_seed(exchange.rank)
    return [sum_over_ranks(torch.randn(shape, generator=generator), exchange) for shape in SHAPES]


def test_a_sum_over_ranks_is_added_in_their_order(ranks: Any) -> None:
    """Bit by bit; gloo's own reduction adds in an order that depends on the rank."""
    generators = [torch.Generator().manual_seed(rank) for rank in range(3)]
    expected = []
    for shape in SHAPES:
        one, two, three = (torch.randn(shape, generator=generator) for generator in generators)
        expected.append(one + two + three)
    for found in results(ranks(sums, 3)):
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def everything_alone() -> Any:
    """The identity exchange keeps to the same protocol."""
    exchange: Any = IdentityExchange()
    exchange.num_completed = 0
    return exchange_everything(exchange)


def wait_for_a_late_rank(exchange: TorchExchange) -> list[float]:
    """Seconds waited in a gather and in an exchange to which rank 1 comes 0.6 s late, both after a common start."""
    waited = []
    sent = torch.zeros(exchange.world_size, 5)
    for start in (lambda: begin(exchange, (5,), torch.float32)[1], lambda: exchange.all_to_all(sent.clone(), sent)):
        begin(exchange, (1,), torch.float32)[1].wait()
        before = exchange.waited_s
        if exchange.rank == 1:
            time.sleep(0.6)
        start().wait()
        waited.append(exchange.waited_s - before)
    return waited


def test_time_spent_waiting_is_counted(ranks: Any) -> None:
    """On a busy machine rank 0 may itself be late, but hardly by half of 0.6 s."""
    for prompt, late in zip(*results(ranks(wait_for_a_late_rank, 2)), strict=True):
        assert 0.3 < prompt < 0.6 + SLACK_S
        assert 0.0 < late < prompt


def gather_in_flight(exchange: TorchExchange, count: int) -> tuple[list[Tensor], list[Counted]]:
    """Several gathers of different sizes under way; rank 1 is late, and the last begun is waited for first."""
    counted = []
    if exchange.rank == 1:
        time.sleep(0.3)
    under_way = [begin(exchange, (10 * number + 1,), torch.float32, number) for number in range(count)]
    counted.append((exchange.num_exchanges, exchange.num_completed))
    for _, handle in reversed(under_way):
        handle.wait()
    counted.append((exchange.num_exchanges, exchange.num_completed))
    return [gathered for gathered, _ in under_way], counted


def test_exchanges_in_flight_do_not_mix(ranks: Any) -> None:
    count = 5
    for found, counted in ranks(gather_in_flight, 3, count):
        for number, gathered in enumerate(found):
            assert torch.equal(gathered, stacked(3, (10 * number + 1,), torch.float32, number))
        assert counted == [(count, 0), (count, count)]


def gather_shares(exchange: Exchange, counts: list[int]) -> list[Tensor]:
    images = torch.arange(40.0).reshape(20, 2)
    return [gather_images(images[:count][own_part(count, exchange)], count, exchange) for count in counts]


def test_uneven_shares_come_back_in_order(ranks: Any) -> None:
    """Also where the last ranks have nothing: 1 image on 3 ranks, 4 on 3 (2, 2, 0)."""
    counts = [1, 2, 3, 4, 7, 20]
    for found in ranks(gather_shares, 3, counts):
        for count, images in zip(counts, found, strict=True):
            assert torch.equal(images, torch.arange(40.0).reshape(20, 2)[:count])


# -- who can listen ----------------------------------------------------------------------------------------------------


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """Address and port of every TCP socket on which a process accepts connections."""
    return {
        (entry.laddr.ip, entry.laddr.port)
        for entry in process.net_connections(kind="tcp")
        if entry.status == psutil.CONN_LISTEN
    }


def other_addresses() -> list[str]:
    """The machine's IPv4 addresses that are not loopback."""
    entries = [entry for found in psutil.net_if_addrs().values() for entry in found]
    return [entry.address for entry in entries if entry.family == socket.AF_INET and entry.address[:4] != "127."]


def test_the_store_listens_on_its_address_only() -> None:
    before = listening(psutil.Process())
    store, port = open_store(LOOPBACK, 5.0)
    assert listening(psutil.Process()) - before == {(LOOPBACK, port)}
    assert store.port == port
    with socket.create_connection((LOOPBACK, port), timeout=5.0):
        pass
    for address in other_addresses():
        with pytest.raises(OSError, match=r"refused|timed out|unreachable"):
            socket.create_connection((address, port), timeout=1.0)
    client = connect_store(LOOPBACK, port, 5.0)
    client.set("who", "rank 1")
    assert store.get("who") == b"rank 1"


def sockets_of_rank(exchange: TorchExchange) -> set[str]:
    gathered, handle = begin(exchange, (4,), torch.float32)
    handle.wait()
    assert torch.equal(gathered, stacked(exchange.world_size, (4,), torch.float32))
    connections = psutil.Process().net_connections(kind="tcp")
    return {entry.laddr.ip.removeprefix("::ffff:") for entry in connections}


def test_ranks_on_one_machine_use_loopback_only(ranks: Any) -> None:
    for addresses in ranks(sockets_of_rank, 2):
        assert addresses == {LOOPBACK}


def test_two_stores_never_share_a_port() -> None:
    """The port is the one that was bound, so two rendezvous at once cannot take each other's."""
    stores = [open_store(LOOPBACK, 5.0) for _ in range(5)]
    assert len({port for _, port in stores}) == 5
    for number, (store, _) in enumerate(stores):
        store.set("number", str(number))
    assert [store.get("number") for store, _ in stores] == [str(number).encode() for number in range(5)]


# -- who is missing ----------------------------------------------------------------------------------------------------


def stay_away(exchange: TorchExchange, absent: int) -> float | None:
    """The absent rank takes part in one gather and not in the second; the others say how long they waited."""
    begin(exchange, (3,), torch.float32)[1].wait()
    if exchange.rank == absent:
        time.sleep(1.0)
        return None
    started = time.monotonic()
    _, handle = begin(exchange, (3,), torch.float32)
    try:
        handle.wait()
    except PeerTimeout as error:
        error.add_note(str(time.monotonic() - started))
        raise
    return None


@pytest.mark.parametrize(("world_size", "absent"), [(2, 1), (3, 0)])
def test_a_missing_peer_is_a_timeout_that_names_rank_and_limit(ranks: Any, world_size: int, absent: int) -> None:
    limit_s = 2.0
    outcomes = ranks(stay_away, world_size, absent, exchange_timeout_s=limit_s)
    assert outcomes[absent] is None
    for rank in set(range(world_size)) - {absent}:
        error = outcomes[rank]
        assert isinstance(error, PeerTimeout)
        assert str(error).startswith(f"rank {rank} of {world_size} waited for exchange 2 (limit 2 s): ")
        waited_s = float(error.__notes__[0])
        assert limit_s - 0.1 <= waited_s < limit_s + SLACK_S


def die(exchange: TorchExchange) -> None:
    if exchange.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin(exchange, (3,), torch.float32)[1].wait()


def test_a_peer_that_died_is_noticed_before_the_limit(ranks: Any) -> None:
    started = time.monotonic()
    outcomes = ranks(die, 2, exchange_timeout_s=30.0)
    assert isinstance(outcomes[1], ChildProcessError)
    assert isinstance(outcomes[0], PeerTimeout)
    assert str(outcomes[0]).startswith("rank 0 of 2 waited for exchange 1 ")
    assert time.monotonic() - started < 20.0  # far from 30 s; starting two processes takes the most of it


def test_a_rendezvous_that_stays_incomplete_ends_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store, _ = open_store(LOOPBACK, 1.0)
    started = time.monotonic()
    with pytest.raises(dist.DistError):
        join_group(store, 0, 0, 2, torch.device("cpu"), 1.0)
    assert time.monotonic() - started < 1.0 + SLACK_S
    assert not dist.is_initialized()


def test_a_store_that_nobody_bound_is_given_up_at_its_limit() -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(dist.DistError):
        connect_store(LOOPBACK, port, 1.0)
    assert time.monotonic() - started < 1.0 + SLACK_S


def test_generations_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a group leaves in the store lies under its generation, so that no later group takes it for its own."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store, _ = open_store(LOOPBACK, 5.0)
    for generation in (3, 4):
        before = set(store.list_keys())
        join_group(store, generation, 0, 1, torch.device("cpu"), 5.0)
        dist.destroy_process_group()
        left = set(store.list_keys()) - before
        assert left
        assert all(key.startswith(f"generation-{generation}/") for key in left)


# -- GPUs --------------------------------------------------------------------------------------------------------------


def gather_on_gpus(exchange: TorchExchange) -> tuple[Tensor, int]:
    """The same gather under nccl, each rank on its own device."""
    return exchange_on_device(exchange, torch.device("cuda", exchange.rank))


def exchange_on_device(exchange: Exchange, device: torch.device) -> tuple[Tensor, int]:
    gathered = torch.full((exchange.world_size, 17, 3), 127.0, device=device)
    gathered[exchange.rank] = pattern(exchange.rank, (17, 3), torch.float32).to(device)
    exchange.all_gather(gathered).wait()
    return gathered.cpu(), exchange.bytes_exchanged


def alone_under_nccl(_: Exchange) -> tuple[Tensor, Tensor]:
    """A group of one rank: what it gathers and what it sends itself."""
    torch.cuda.set_device(0)
    store, _port = open_store(LOOPBACK, 20.0)
    exchange = join_group(store, 0, 0, 1, torch.device("cuda"), 20.0)
    gathered, _ = exchange_on_device(exchange, torch.device("cuda"))
    sent = pattern(0, (1, 5, 2), torch.float32).to("cuda")
    received = torch.full_like(sent, torch.nan)
    exchange.all_to_all(received, sent).wait()
    return gathered, received.cpu()


@pytest.mark.gpu
def test_one_rank_under_nccl(ranks: Any, cuda: torch.device) -> None:
    ((gathered, received),) = ranks(alone_under_nccl, 1)
    assert torch.equal(gathered, stacked(1, (17, 3), torch.float32))
    assert torch.equal(received, pattern(0, (1, 5, 2), torch.float32))


@pytest.mark.gpu
def test_two_devices_gather_under_nccl(ranks: Any) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, one for each rank, and torch sees {torch.cuda.device_count()}")
    for gathered, moved in ranks(gather_on_gpus, 2, device="cuda"):
        assert torch.equal(gathered, stacked(2, (17, 3), torch.float32))
        assert moved == 17 * 3 * 4


def test_row_ranges_as_gathered(ranks: Any) -> None:
    """10 channels on 3 ranks: slices are padded to 4 rows and the padding is dropped again."""
    whole = torch.arange(30.0).reshape(10, 3)
    for found in ranks(gather_whole, 3):
        assert torch.equal(found, whole)


def gather_whole(exchange: Exchange) -> Tensor:
    from simmatch.sharding.state import gather_rows

    rows = split_rows(10, exchange.world_size)[exchange.rank]
    assert rows.padded == 4
    return gather_rows(torch.arange(30.0).reshape(10, 3)[rows.start : rows.stop], rows, exchange)
