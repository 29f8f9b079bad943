"""A real MQTT broker, mosquitto. It keeps every message until it is acknowledged, also over a restart."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from functools import cache
from pathlib import Path

import pytest

from jobs.fetch import unpack_packages
from simmatch.data.formats import DataError

PACKAGES = ("mosquitto", "libcjson1", "libmosquitto1", "libdlt2", "libwrap0", "libnsl2", "libtirpc3")
"""Debian's, without what every system has."""

START_S = 20.0


@cache
def program() -> tuple[str, str]:
    """mosquitto of this machine, or of Debian's package, unpacked; and where its libraries are.

    A test that asks for it where there is none is skipped.
    """
    path = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin"
    if found := shutil.which("mosquitto", path=path):
        return found, ""
    folder = Path(os.environ["SIMMATCH_CACHE"]) / "mosquitto"
    try:
        unpack_packages(PACKAGES, folder)
    except DataError as error:
        pytest.skip(f"needs mosquitto, an MQTT broker: {error}")
    libraries = sorted({str(library.parent) for library in folder.rglob("*.so*")})
    return str(folder / "usr/sbin/mosquitto"), ":".join(libraries)


class Broker:
    """mosquitto on a free port of the loopback interface, in a folder of its own.

    Parameters
    ----------
    folder: for its configuration, its log and the messages that it keeps.
    lines: of its configuration, more than those of `settings`.
    durable: each change is on the disk at once, so that a kill loses nothing; some 100 messages/s.
    """

    def __init__(self, folder: Path, *lines: str, durable: bool = False) -> None:
        self.folder, self.port = folder, _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        everybody = str(not any("password_file" in line for line in lines)).lower()
        settings = [f"listener {self.port} 127.0.0.1", f"allow_anonymous {everybody}", *lines]
        settings += ["persistence true", f"persistence_location {folder}/", "autosave_interval 1"]
        settings += [f"autosave_on_changes {str(durable).lower()}"]
        settings += ["max_queued_messages 0", "max_queued_bytes 0", "max_inflight_messages 0"]  # 0: no limit
        settings += [f"log_dest file {folder}/log", "log_type all", "user root" if os.getuid() == 0 else ""]
        (folder / "mosquitto.conf").write_text("\n".join(settings) + "\n")

    def __enter__(self) -> Broker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end(signal.SIGKILL)

    def start(self) -> None:
        """Until it answers."""
        executable, libraries = program()
        environment = {**os.environ, "LD_LIBRARY_PATH": libraries} if libraries else None
        command = [executable, "-c", str(self.folder / "mosquitto.conf")]
        self._process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.01)
        raise AssertionError(f"mosquitto does not start: {self.log()[-500:]}")

    def end(self, by: signal.Signals = signal.SIGTERM) -> None:
        """With SIGTERM it writes what it holds; with SIGKILL it cannot."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(by)
            process.wait(timeout=START_S)

    def log(self) -> str:
        """What it has written."""
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
