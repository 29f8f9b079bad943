"""Whether the driver and all ranks mean one place by the run directory: each reads what another has written there.

A folder of the same name on every node is not a shared one: shards would be written where nobody finds them.
"""

from __future__ import annotations

from contextlib import suppress
from secrets import token_hex

from cluster.storage import AnyPath, find, read, remove, write_whole

NAME = "reach-"
"""Begins the names of the files; they are gone once all have answered."""


def leave(run_dir: AnyPath, token: str) -> str:
    """The driver: write something that nobody else can know; returns it.

    Raises
    ------
    OSError
        It cannot write there itself.
    """
    nonce = token_hex(16)
    write_whole(run_dir / f"{NAME}{token}", nonce)
    return nonce


def answer(run_dir: AnyPath, token: str, rank: int) -> str:
    """A rank: repeat it in a file of its own; returns why it cannot, or nothing."""
    try:
        write_whole(run_dir / f"{NAME}{token}-{rank}", read(run_dir / f"{NAME}{token}"))
    except (FileNotFoundError, NotADirectoryError):
        return "does not find there what this job has written"
    except OSError as error:
        return " ".join(str(error).split())
    return ""


def heard(run_dir: AnyPath, token: str, nonce: str, answers: list[str]) -> list[str]:
    """The driver again: what is wrong by rank, as far as is seen from here; nothing where all is well."""
    found = list(answers)
    for rank in (rank for rank, why in enumerate(answers) if not why):
        try:
            said = read(run_dir / f"{NAME}{token}-{rank}").decode(errors="replace")
        except FileNotFoundError:
            said = ""
        if said != nonce:
            found[rank] = "writes there what this job does not find"
    with suppress(OSError):
        for path in find(run_dir, f"{NAME}{token}*"):
            remove(path)
    return found
