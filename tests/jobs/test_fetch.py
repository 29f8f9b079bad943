"""Fetching, with every way to the network replaced."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

import jobs.fetch
from simmatch.data.config import DataConfig
from simmatch.data.formats import DataError
from simmatch.data.sources import load_dataset

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def write_files(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in FILES:
        sizes = (5, 4, 4) if "images" in name else (5,)
        header = struct.pack(f">BBBB{len(sizes)}I", 0, 0, 8, len(sizes), *sizes)
        (folder / name).write_bytes(header + bytes(80 if "images" in name else 5))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No server answers and no package tool exists; the files are nowhere yet."""

    def refuse(name: str, root: Path, *, timeout_s: float) -> None:
        raise DataError("refused")

    monkeypatch.setattr(jobs.fetch, "_answers", lambda url, timeout_s: False)
    monkeypatch.setattr(jobs.fetch, "download", refuse)
    monkeypatch.setattr(jobs.fetch.shutil, "which", lambda tool: None)
    monkeypatch.delenv("SIMMATCH_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_nothing_to_do(offline, capsys):
    write_files(offline / "root" / "FashionMNIST" / "raw")
    assert jobs.fetch.main(["fashion_mnist", "--root", str(offline / "root")]) == 0
    assert capsys.readouterr().out == (
        "already here: fashion_mnist, train (5, 1, 4, 4), test (5, 1, 4, 4), 10 classes\n"
    )


@pytest.mark.parametrize("answers", [False, True])
def test_no_way_works(offline, monkeypatch, capsys, answers):
    monkeypatch.setattr(jobs.fetch, "_answers", lambda url, timeout_s: answers)
    assert jobs.fetch.main(["fashion_mnist", "--root", "root"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in ("refused" if answers else "no server answers", "no apt-get", "dataset-fashion-mnist", "data.root"):
        assert part in error
    assert list((offline / "root").iterdir()) == []


def test_a_folder_that_cannot_be_written(offline, capsys):
    (offline / "file").touch()
    assert jobs.fetch.main(["fashion_mnist", "--root", str(offline / "file" / "x")]) == 2
    message = f"error: --root: expected a folder that can be written, got {offline / 'file' / 'x'}: Not a directory\n"
    assert capsys.readouterr().err == message


def test_unknown_name(capsys):
    assert jobs.fetch.main(["mnsit"]) == 2
    assert "did you mean 'mnist'" in capsys.readouterr().err


def test_download_is_moved_into_place(offline, monkeypatch, capsys):
    monkeypatch.setattr(jobs.fetch, "_answers", lambda url, timeout_s: True)
    monkeypatch.setattr(jobs.fetch, "download", lambda name, root, timeout_s: write_files(root / "MNIST" / "raw"))
    assert jobs.fetch.main(["mnist"]) == 0
    assert sorted(path.name for path in (offline / "data" / "MNIST" / "raw").iterdir()) == sorted(FILES)
    assert [path.name for path in (offline / "data").iterdir()] == ["MNIST"]
    load_dataset(DataConfig(name="mnist"))
    assert jobs.fetch.main(["mnist"]) == 0
    assert "already here" in capsys.readouterr().out


def test_damaged_files_are_fetched_anew(offline, monkeypatch, capsys):
    write_files(offline / "data" / "MNIST" / "raw")
    damaged = offline / "data" / "MNIST" / "raw" / FILES[0]
    damaged.write_bytes(damaged.read_bytes()[:50])
    monkeypatch.setattr(jobs.fetch, "_answers", lambda url, timeout_s: True)
    monkeypatch.setattr(jobs.fetch, "download", lambda name, root, timeout_s: write_files(root / "MNIST" / "raw"))
    assert jobs.fetch.main(["mnist"]) == 0
    assert "unusable" in capsys.readouterr().out


def test_damaged_download_is_not_moved_into_place(offline, monkeypatch, capsys):
    def damaged(name: str, root: Path, timeout_s: float) -> None:
        write_files(root / "MNIST" / "raw")
        (root / "MNIST" / "raw" / FILES[0]).write_bytes(b"\0\0\x08\x03")

    monkeypatch.setattr(jobs.fetch, "_answers", lambda url, timeout_s: True)
    monkeypatch.setattr(jobs.fetch, "download", damaged)
    assert jobs.fetch.main(["mnist"]) == 1
    assert "header of 16 bytes, got 4" in capsys.readouterr().err
    assert list((offline / "data").iterdir()) == []


@pytest.mark.parametrize("has_lists", [True, False])
def test_package_is_unpacked(offline, monkeypatch, has_lists, capsys):
    """`apt-get` and `dpkg` replaced by what they leave behind; without package lists fresh private ones are made."""
    commands = []

    def tool(command, *, cwd, **options):
        commands.append(" ".join(command))
        if "update" in command:
            assert f"Dir::State::Lists={cwd}/lists" in command
        elif command[0] == "dpkg":
            write_files(Path(command[3], "usr/share/datasets/fashion-mnist"))
        elif has_lists or len(commands) > 1:
            Path(cwd, "some.deb").touch()
        else:
            raise subprocess.CalledProcessError(100, command, stderr="E: Unable to locate package\n")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(jobs.fetch.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(jobs.fetch.subprocess, "run", tool)
    assert jobs.fetch.main(["fashion_mnist", "--root", "root"]) == 0
    assert capsys.readouterr().out.count("; trying Debian's package\n") == 1
    assert len(commands) == (2 if has_lists else 4)
    assert [path.name for path in (offline / "root").iterdir()] == ["fashion-mnist"]


def test_package_tool_without_network_fails_at_once(offline, monkeypatch, capsys):
    calls = []

    def tool(command, **options):
        calls.append(command)
        raise subprocess.CalledProcessError(
            100, command, stderr="E: Failed to fetch http://mirror  Could not connect\n"
        )

    monkeypatch.setattr(jobs.fetch.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(jobs.fetch.subprocess, "run", tool)
    assert jobs.fetch.main(["fashion_mnist", "--root", "root"]) == 1
    assert "apt-get failed: E: Failed to fetch" in capsys.readouterr().err
    assert len(calls) == 1


def test_a_server_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.undo()
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        start = time.monotonic()
        assert not jobs.fetch._answers(url, 0.3)
        assert time.monotonic() - start < 2


def test_help_from_the_command_line(offline):
    root = Path(jobs.fetch.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.fetch", "--help"], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    assert "--root" in done.stdout
    assert "fashion_mnist" in done.stdout
