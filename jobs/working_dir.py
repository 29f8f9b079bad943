"""The working directory that goes to a Ray cluster: how much it is, and what is too much."""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cluster.text import count, size
from jobs.ray_job import in_ray_job
from simmatch.config import ConfigError

JOBS_API_BYTES = 100 * 2**20
"""Ray's dashboard takes requests smaller than this, and with them the archives of jobs."""

INIT_BYTES = 512 * 2**20
"""What a driver that joins a cluster may send: the largest message to Ray's control service."""

HEADERS_BYTES, END_BYTES = 30 + 46, 22
"""Of an uncompressed zip archive: two headers of every entry, besides its name in both, and the end."""

NAMED = 3
"""Folders named where it is too much."""

SHARE = 0.9
"""Of a folder's bytes: a folder inside it that holds as much is named in its place."""


@dataclass(frozen=True)
class Upload:
    """What Ray would upload.

    Attributes
    ----------
    size_bytes: of the archive, which Ray does not compress.
    largest: the largest folders and their bytes, those of top-level files together as `.`.
    """

    folder: Path
    files: int
    size_bytes: int
    largest: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        return f"{size(self.size_bytes)} in {count(self.files, 'file')}"


def measure(folder: Path) -> Upload:
    """Look at all files that Ray would upload: Ray's own rules, with .gitignore and .rayignore.

    Raises
    ------
    OSError
        A file cannot be looked at.
    ConfigError
        A file's name is none that an archive can hold.
    """
    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    sizes: Counter[Path] = Counter()
    archive_bytes, files = END_BYTES, 0

    def add(path: Path) -> None:
        nonlocal archive_bytes, files
        name = path.relative_to(folder)
        try:
            name_bytes = len(str(name).encode())
        except UnicodeEncodeError:
            raise ConfigError(f"{folder}: expected names of files in UTF-8, got {str(name)!r}") from None
        if path.is_file():
            num_bytes, files = path.stat().st_size, files + 1
            archive_bytes += num_bytes + HEADERS_BYTES + 2 * name_bytes
            for parent in name.parents:
                sizes[parent] += num_bytes
        elif path.is_dir() and not any(path.iterdir()):
            archive_bytes += HEADERS_BYTES + 2 * (name_bytes + 1)

    folder = folder.absolute()
    # what Ray's upload does, step by step; it has no public name
    excludes = [packaging._get_excludes(folder, ray_constants.get_runtime_env_default_excludes())]
    heed_git = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    packaging._dir_travel(folder, excludes, add, include_gitignore=heed_git, logger=_quiet())
    return Upload(folder, files, archive_bytes, _largest(sizes))


def _quiet() -> logging.Logger:
    """For what Ray says of an error that we raise: the name of a file as it is, which may be no text."""
    logger = logging.Logger(__name__)  # not below the root logger
    logger.addHandler(logging.NullHandler())
    return logger


def _largest(sizes: Counter[Path]) -> tuple[tuple[str, int], ...]:
    inside: dict[Path, list[Path]] = {}
    for path in sizes:
        if path != Path("."):
            inside.setdefault(path.parent, []).append(path)
    tops = inside.get(Path("."), [])
    found = {Path("."): sizes[Path(".")] - sum(sizes[path] for path in tops)}
    for path in tops:
        while heir := next((each for each in inside.get(path, []) if sizes[each] >= SHARE * sizes[path]), None):
            path = heir
        found[path] = sizes[path]
    return tuple((str(path), num) for path, num in sorted(found.items(), key=lambda item: -item[1])[:NAMED] if num)


def check_upload(option: str, upload: Upload, limit_bytes: int) -> None:
    """Refuse what the cluster would refuse after it was packed and sent.

    Raises
    ------
    ConfigError
        It names the largest folders.
    """
    if upload.size_bytes < limit_bytes:
        return
    largest = ", ".join(f"{name} ({size(num_bytes)})" for name, num_bytes in upload.largest)
    raise ConfigError(
        f"{option}: expected a folder of less than {limit_bytes // 2**20} MiB, which is what Ray takes, got {upload} "
        f"below {upload.folder}; largest: {largest}; leave out what the job does not need in .rayignore or .gitignore"
    )


def checkout_for(nodes: list[str]) -> Upload | None:
    """The checkout that this process runs from, for the cluster's other nodes; None where it is not to be sent.

    It is not where there are no other nodes, where Ray brought it here itself, and where it is no checkout but part of
    an image, which all nodes have.

    Raises
    ------
    ConfigError
        It is too large.
    """
    folder = Path(__file__).resolve().parents[1]
    if not nodes or in_ray_job() or not (folder / "pyproject.toml").is_file():
        return None
    upload = measure(folder)
    check_upload("the checkout for the nodes of RAY_ADDRESS", upload, INIT_BYTES)
    return upload
