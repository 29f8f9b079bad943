"""Shards against one rank, and two hosts on a slow link: counts against formulas, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from matplotlib.figure import Figure

from jobs.benchmark import main
from jobs.benchmarks.links import Link
from jobs.benchmarks.namespaces import NAMESPACES, exits_on_sigterm
from jobs.benchmarks.network import PLAIN, ways
from jobs.benchmarks.processes import Host, Member, RankFailed, RankGroup
from jobs.benchmarks.scaling import draw_map, draw_ratios
from jobs.benchmarks.sweep import Cell
from jobs.benchmarks.timing import Timings
from jobs.benchmarks.updates import Comparison, exchanges, modes
from jobs.reporting import MissingError
from simmatch.solvers.block import TAIL
from tests.cluster.actors import is_alive

CHANNELS, PADDED, PATCH, PIXELS = 7, 4, 25, 64
"""7 channels on 2 ranks: slices are padded to 4 rows. 5 × 5 patches, as many columns as an 8 × 8 image has pixels."""

ONE = ["one rank, accelerated", "one rank, coordinate_descent"]
"""One rank's ways: the solver of a mode that exchanges activities, and of one that does not."""

FLOAT = 4
"""Bytes."""

CERTIFY = {"exchanges": 2, "bytes": ((2 + 2) * PADDED + 2) * FLOAT}
"""What every update moves for the bound of λmax(M): twice two values a channel and a mark."""

SLOW = 100e6
"""Bits per second of the limited link."""


def expected(way: str, iterations: int, columns: int) -> dict[str, int]:
    """Exchanges of one update, and bytes that reach one of two ranks, on a single tile that reaches the tolerance.

    every_iteration: y with two rows behind it at every iteration, and those two rows alone at the end.
    block: y, or its increments in two bytes each, with `TAIL` rows behind it at every iteration.
    gather_state: own rows of W and M with a mark, then as many sums.
    """
    if way == "gather_state":
        exchanged, moved = 2, 2 * (PADDED * (PATCH + CHANNELS) + 1) * FLOAT
    elif way.startswith("every_iteration"):
        width = 2 if "bfloat16" in way else FLOAT
        exchanged, moved = iterations + 1, (iterations * (PADDED * width + 2 * FLOAT) + 2 * FLOAT) * columns
    else:
        width = {"block": FLOAT, "block, bfloat16": 2}[way]
        exchanged, moved = iterations, iterations * (PADDED * width + TAIL * FLOAT) * columns
    return {"exchanges": exchanged + CERTIFY["exchanges"], "bytes": moved + CERTIFY["bytes"]}


def benchmark(subcommand: str, run_dir: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows of a run on the digits."""
    common = ["--quick", "--data", "digits", "--channels", str(CHANNELS), "--run-dir", str(run_dir)]
    assert main([subcommand, *common, *arguments]) == 0
    return [json.loads(line) for line in (run_dir / f"{subcommand}.jsonl").read_text().splitlines()]


def of_kind(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == kind]


def left_behind() -> list[str]:
    """Processes of ours that still serve, and namespaces of ours that still exist."""
    serving = [
        f"process {process.pid}"
        for process in psutil.Process().children(recursive=True)
        if any("jobs.benchmarks.processes" in word for word in process.cmdline())
    ]
    return serving + namespaces_of(os.getpid())


def namespaces_of(pid: int) -> list[str]:
    return [path.name for path in NAMESPACES.glob(f"simmatch-{pid}-*")]


@pytest.fixture(scope="module")
def namespaces() -> None:
    """Skips where network namespaces cannot be made."""
    try:
        with Link():
            pass
    except MissingError as error:
        pytest.skip(str(error))


# ------------------------------------------------------------------------------------------- scaling


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return benchmark("scaling", tmp_path_factory.mktemp("scaling"), "--batches", "2", "--update-seconds", "1000")


def test_every_mode_takes_part(rows: list[dict[str, Any]]) -> None:
    updates = of_kind(rows, "update")
    assert [row["way"] for row in updates] == [*ONE, *exchanges()]
    assert {(row["channels"], row["images"], row["columns"]) for row in updates} == {(CHANNELS, 2, 2 * PIXELS)}
    assert [(row["ranks"], row["threads_per_rank"]) for row in updates] == [(1, 2)] * 2 + [(2, 1)] * len(exchanges())
    baselines = {row["way"]: row["baseline"] for row in updates}
    assert baselines == dict.fromkeys(exchanges(), ONE[0]) | {"gather_state": ONE[1]} | {way: way for way in ONE}
    for row in updates:
        assert None not in (row["seconds"], row["ratio"], row["ratio_fastest"], row["waiting"])
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert row["residual"] <= 1e-2
    (best,) = of_kind(rows, "best")
    assert best["fastest"] == min(updates[:2], key=lambda row: row["seconds"])["way"]
    assert best["ratio_fastest"] == max(row["ratio_fastest"] for row in updates[2:])
    assert best["reached"] == (best["ratio_fastest"] >= 0.95)


@pytest.mark.parametrize("mode", ["every_iteration", "block", "gather_state"])
def test_counts_are_exact(rows: list[dict[str, Any]], mode: str) -> None:
    (found,) = (row for row in of_kind(rows, "update") if row["way"] == mode)
    wanted = expected(mode, found["iterations"], found["columns"])
    assert found["exchanges"] == wanted["exchanges"]
    assert found["bytes_per_rank"] == [wanted["bytes"]] * 2
    assert found["bytes"] == 2 * wanted["bytes"]


def test_all_ways_make_the_same_update(rows: list[dict[str, Any]]) -> None:
    """Equal to rounding where the dynamics are the same, and to the residual in `block`; counts repeat."""
    for row in of_kind(rows, "update"):
        assert row["counts_repeat"]
        assert row["distance"] <= (0.05 if row["way"] == "block" else 1e-4), row["way"]
    for one in of_kind(rows, "update")[:2]:
        assert (one["exchanges"], one["bytes"], one["waiting"], one["distance"]) == (0, 0, 0.0, 0.0)


def test_no_process_is_left(rows: list[dict[str, Any]]) -> None:
    assert rows
    assert left_behind() == []


@pytest.fixture(scope="module")
def other_axes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Replicas and stages, on one thread each."""
    run_dir = tmp_path_factory.mktemp("axes")
    common = ["--quick", "--data", "digits", "--channels", str(CHANNELS), "--run-dir", str(run_dir)]
    assert main(["scaling", "--axes", *common]) == 0
    return [json.loads(line) for line in (run_dir / "scaling.jsonl").read_text().splitlines()]


def test_replicas_make_the_update_of_shards_and_of_one_rank(other_axes: list[dict[str, Any]]) -> None:
    """To the tolerance of the dynamics. Replicas exchange sums: half of W and M, twice, and the bound."""
    found = {row["way"]: row for row in other_axes if row["kind"] == "replicas"}
    assert list(found) == [
        *ONE,
        "1 × 2, every_iteration",
        "1 × 2, gather_state",
        "2 × 1, accelerated",
        "2 × 1, coordinate_descent",
    ]
    for row in found.values():
        assert row["residual"] <= row["tolerance"]
        assert row["distance"] < 0.05
        assert row["counts_repeat"]
    half = -(-CHANNELS * (PATCH + CHANNELS) // 2)
    for way in ("2 × 1, accelerated", "2 × 1, coordinate_descent"):
        assert found[way]["bytes_per_rank"][0] >= 2 * half * FLOAT
        assert found[way]["bytes_per_rank"][0] < 2 * half * FLOAT + 40 * CHANNELS


def test_stages_learn_the_bits_of_one_rank(other_axes: list[dict[str, Any]]) -> None:
    alone, pair = (row for row in other_axes if row["kind"] == "stages")
    assert alone["bits_equal"]
    assert pair["bits_equal"]
    assert alone["busy"] == [1.0]
    assert len(pair["busy"]) == 2
    assert all(0 < share <= 1 for share in pair["busy"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "3"], "--threads: expected a multiple of 2 for so many ranks, got 3"),
        (["--channels", "1"], "--channels: expected at least 2, one per rank, got 1"),
        (["--batches", "9999"], "--batches: expected at most 1437 images of digits, got 9999"),
    ],
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "--data", "digits", "--run-dir", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def synthetic(seconds: dict[str, float]) -> Comparison:
    return Comparison(Timings({way: [taken] * 5 for way, taken in seconds.items()}), {}, {})


def test_map_shows_the_fastest_mode() -> None:
    """A cell's colour is the winner's, its text the winner's ratio to one rank's fastest way; a cut batch says so."""
    names = exchanges()
    cells = []
    for index, (channels, batch) in enumerate([(64, 1), (64, 8), (128, 1), (128, 8)]):
        seconds = dict.fromkeys(names, 4.0) | {ONE[0]: 6.0, ONE[1]: 3.0, names[index % len(names)]: 2.0}
        cells.append(Cell(channels, batch, min(batch, 4), 784, synthetic(seconds)))
    figure = Figure()
    draw_map(figure, cells)
    (axes,) = figure.axes
    winners = axes.images[0].get_array()
    assert winners is not None
    assert winners.astype(int).tolist() == [[0, 1 % len(names)], [2 % len(names), 3 % len(names)]]
    texts = [text.get_text().split("\n") for text in axes.texts]
    assert [(text[0], text[1]) for text in texts] == [("1.50", names[index % len(names)]) for index in range(4)]
    assert [len(text) == 3 for text in texts] == [False, True, False, True]


def test_ratio_against_width() -> None:
    """A panel per batch, and in it a line per mode through seconds of one rank with the same solver / of the mode."""
    cells = [
        Cell(channels, 8, 8, 6272, synthetic(dict.fromkeys(exchanges(), 2.0) | {ONE[0]: taken, ONE[1]: 1.0}))
        for channels, taken in [(1024, 1.8), (512, 1.5)]
    ]
    figure = Figure()
    draw_ratios(figure, cells, modes(1e-2))
    (axes,) = figure.axes
    assert [container.get_label() for container in axes.containers] == list(exchanges())
    for container in axes.containers:
        line = container.lines[0]
        assert line.get_xdata().tolist() == [512, 1024]
        assert line.get_ydata().tolist() == ([0.5, 0.5] if container.get_label() == "gather_state" else [0.75, 0.9])


# ------------------------------------------------------------------------------------------- processes


def raise_on_rank_1(member: Member) -> None:
    if member.exchange.rank == 1:
        raise ValueError("no such luck")
    member.exchange.all_gather(torch.zeros(2, 1)).wait()  # rank 0 waits for what never comes


def test_a_failure_in_a_namespace_names_its_rank_and_leaves_nothing(namespaces: None) -> None:
    group = RankGroup([], threads=1)

    def fail() -> None:
        nonlocal group
        with Link() as link, RankGroup(link.hosts, threads=1) as group:
            assert all(process.poll() is None for process in group.processes)
            assert len(namespaces_of(os.getpid())) == 3  # two hosts and their bridge
            group.ask(raise_on_rank_1)

    with pytest.raises(RankFailed) as caught:
        fail()
    assert str(caught.value) == "rank 1 of 2 raised ValueError: no such luck"
    assert "in raise_on_rank_1" in str(caught.value.__cause__)
    assert [process.returncode is None for process in group.processes] == [False, False]
    assert left_behind() == []


def test_a_rank_that_cannot_start() -> None:
    with (
        pytest.raises(RankFailed, match=r"^rank 0 of 1 ended without an answer$"),
        RankGroup([Host(("false",))], threads=1),
    ):
        pytest.fail("it has started")
    assert left_behind() == []


# ------------------------------------------------------------------------------------------- exact


def test_the_price_of_exact_sums(tmp_path: Path) -> None:
    """The same update but for rounding, one exchange more, and integers of eight bytes in place of the sums."""
    rows = of_kind(benchmark("exact", tmp_path, "--layouts", "--images", "3"), "update")
    assert [(row["ranks"], row["reduce"]) for row in rows] == [(1, "fast"), (1, "exact"), (2, "fast"), (2, "exact")]
    fast, exact = rows[2:]
    assert rows[1]["exchanges"] == 0
    assert exact["exchanges"] == fast["exchanges"] + 1
    weights = FLOAT * (PADDED * (PATCH + CHANNELS) + 1)
    sums = 8 * (PADDED * (PATCH + 1 + CHANNELS) + 1)
    assert exact["bytes_per_rank"] == [weights + FLOAT * 4 + sums + CERTIFY["bytes"]] * 2
    assert exact["distance"] < 1e-5
    assert exact["longer"] == pytest.approx(1 / exact["ratio"], rel=1e-5)  # both have six digits


# ------------------------------------------------------------------------------------------- network


def test_ways_begin_with_the_plain_one() -> None:
    """A float32 exchange at every iteration of the accelerated solver; every mode is among the others, none twice."""
    found = ways(1e-3)
    plain = next(iter(found.values()))
    assert next(iter(found)) == PLAIN
    assert (plain.exchange, plain.solver, plain.exchange_dtype) == ("every_iteration", "accelerated", None)
    assert {config.exchange for config in found.values()} == set(exchanges())
    assert {config.tolerance for config in found.values()} == {1e-3}
    for mode in ("every_iteration", "block"):
        assert found[f"{mode}, bfloat16"].exchange_dtype == "bfloat16"
    assert len({config.model_dump_json() for config in found.values()}) == len(found)


@pytest.fixture(scope="module")
def network(namespaces: None, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Batches of 2 and 3 images, both cut to one."""
    arguments = ["--batches", "2", "3", "--update-seconds", "1e-6", "--rates", f"{SLOW / 1e6:g}"]
    return benchmark("network", tmp_path_factory.mktemp("network"), *arguments)


def test_the_rate_is_limited(network: list[dict[str, Any]]) -> None:
    """In both directions; TCP's headers and the timers of a busy machine take some of it, and nothing adds to it."""
    unlimited, limited = of_kind(network, "link")
    assert (unlimited["link"], unlimited["rate_bits_per_s"]) == ("unlimited", None)
    assert min(unlimited["measured_bits_per_s"]) > 2 * SLOW
    assert limited["rate_bits_per_s"] == SLOW
    assert all(0.5 * SLOW <= rate <= 1.05 * SLOW for rate in limited["measured_bits_per_s"])


def test_network_counts_are_exact(network: list[dict[str, Any]]) -> None:
    updates = of_kind(network, "update")
    assert {row["link"] for row in updates} == {"unlimited", f"{SLOW / 1e6:g} Mbit/s"}
    for row in updates:
        assert (row["batch"], row["images"], row["columns"], row["counts_repeat"]) == (2, 1, PIXELS, True)
        assert row["residual"] <= 1e-2
        busier = max(row["bytes_per_rank"])
        assert row["wire_s"] == (None if row["rate_bits_per_s"] is None else pytest.approx(busier * 8 / SLOW, rel=1e-5))
        way = "every_iteration" if row["way"] == PLAIN else row["way"]
        wanted = expected(way, row["iterations"], PIXELS)
        assert (row["exchanges"], busier) == (wanted["exchanges"], wanted["bytes"]), way


def test_network_names_the_best_way(network: list[dict[str, Any]]) -> None:
    for best in of_kind(network, "best"):
        updates = [row for row in of_kind(network, "update") if row["link"] == best["link"]]
        assert [row["way"] for row in updates] == list(ways(1e-2))
        assert best["ratio"] == max(row["ratio"] for row in updates)
        assert best["reached"] == (None if best["rate_bits_per_s"] is None else best["ratio"] >= 3.0)
    assert len(of_kind(network, "best")) == 2


def test_network_leaves_nothing(network: list[dict[str, Any]]) -> None:
    assert network
    assert left_behind() == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_namespaces_are_removed_after_a_failure(namespaces: None, error: type[BaseException]) -> None:
    def fail() -> None:
        with Link() as link:
            assert all((NAMESPACES / name).exists() for name in link.namespaces)
            raise error

    with pytest.raises(error):
        fail()
    assert left_behind() == []


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals need the main thread")
def test_namespaces_are_removed_on_sigterm(namespaces: None) -> None:
    """SIGTERM becomes an exception within the block, and is what it was behind it."""
    before = signal.getsignal(signal.SIGTERM)

    def terminated() -> None:
        with exits_on_sigterm(), Link() as link:
            assert all((NAMESPACES / name).exists() for name in link.namespaces)
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("nothing came of the signal")

    with pytest.raises(SystemExit) as caught:
        terminated()
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert left_behind() == []


def test_hosts_for_a_command(namespaces: None, tmp_path: Path) -> None:
    """It sees every host, and the other from one; its exit status is passed on; what it leaves running is ended."""
    script = tmp_path / "command"
    script.write_text(f"""
        read -r name address namespace <<<"$SIMMATCH_HOSTS"
        ip netns exec "$namespace" {sys.executable} -c "import time; print(flush=True); time.sleep(99)" >{tmp_path}/up &
        echo $! >{tmp_path}/pid
        until [ -s {tmp_path}/up ]; do sleep 0.1; done
        echo "$SIMMATCH_HOSTS"
        exit 7
    """)
    words = [sys.executable, "-m", "jobs.benchmarks.namespaces", "one", "two", "--", "bash", str(script)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 7
    unique = rf"simmatch-{process.pid}-\w{{6}}"
    assert re.fullmatch(rf"one 198\.18\.0\.1 {unique}-0\ntwo 198\.18\.0\.2 {unique}-1\n", out)
    assert namespaces_of(process.pid) == []
    assert not is_alive(int((tmp_path / "pid").read_text()))


def fake_ip(folder: Path, refused: str) -> None:
    """An `ip` in this folder that refuses one subcommand and passes the others on to the real one."""
    real = shutil.which("ip")
    script = folder / "ip"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *"{refused}"*) echo "RTNETLINK answers: Operation not permitted" >&2; exit 2;; esac\n'
        f'exec {real} "$@"\n'
    )
    script.chmod(0o755)


def test_a_machine_that_refuses_the_link(
    namespaces: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that quotes the command and its answer, exit status 2, and the namespaces made before are gone."""
    fake_ip(tmp_path, "link add")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert main(["network", "--data", "digits", "--run-dir", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: network: `ip -n simmatch-")
    assert message.endswith("is not possible here: RTNETLINK answers: Operation not permitted")
    assert left_behind() == []


def test_without_iproute2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert main(["network", "--data", "digits", "--run-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: network: expected the command ip, which Debian's package iproute2 has"
    )


def test_without_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/sbin/{name}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["network", "--data", "digits", "--run-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: network: expected to run as root, which making network namespaces needs"
    )
