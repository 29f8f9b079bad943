"""Whether the driver and all ranks see the same run directory: each reads what the other has written there.

A folder of the same name on every node need not be shared: shards would be written where nobody reads them.
"""

from __future__ import annotations

from contextlib import suppress
from secrets import token_hex

from cluster.storage import AnyPath, find, read, remove, write_whole

PREFIX = "reach-"
"""Of the names of the files, which are deleted once all ranks have answered."""


def write_nonce(run_dir: AnyPath, token: str) -> str:
    """The driver writes a random number; returns it.

    token: of the group, in the names of the files.

    Raises
    ------
    OSError
        The driver cannot write there.
    """
    nonce = token_hex(16)
    write_whole(run_dir / f"{PREFIX}{token}", nonce)
    return nonce


def copy_nonce(run_dir: AnyPath, token: str, rank: int) -> str:
    """A rank copies it to a file of its own. Returns why it cannot, or an empty string."""
    try:
        write_whole(run_dir / f"{PREFIX}{token}-{rank}", read(run_dir / f"{PREFIX}{token}"))
    except (FileNotFoundError, NotADirectoryError):
        return "does not see the file that this job wrote there"
    except OSError as error:
        return " ".join(str(error).split())
    return ""


def check_copies(run_dir: AnyPath, token: str, nonce: str, errors: list[str]) -> list[str]:
    """The driver reads every copy. Returns what is wrong by rank, as an empty string where nothing is.

    errors: what `copy_nonce` has returned on each rank.
    """
    checked = list(errors)
    for rank in (rank for rank, error in enumerate(errors) if not error):
        try:
            copy = read(run_dir / f"{PREFIX}{token}-{rank}").decode(errors="replace")
        except FileNotFoundError:
            copy = ""
        if copy != nonce:
            checked[rank] = "wrote a file there that this job does not see"
    with suppress(OSError):
        for path in find(run_dir, f"{PREFIX}{token}*"):
            remove(path)
    return checked
