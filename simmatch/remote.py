"""Files in object stores and behind other URIs: how they are reached, and how often they are asked for again.

fsspec knows the protocols; s3fs is the extra `simmatch[s3]`. Credentials and endpoints come from the environment
(`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, … or the provider's own files), never from a URI.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from simmatch.extras import extra

CONNECT_S, ANSWER_S, ATTEMPTS = 5, 30, 3
"""Of one request to an object store: longest waits for a connection and for an answer, and number of attempts."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
"""Between attempts."""

LOG = logging.getLogger(__name__)
"""Told of whatever is waited for; without a handler, Python writes it to the standard error output."""

T = TypeVar("T")


class StorageError(OSError):
    """A remote file system failed; the message names the path.

    >>> raise StorageError("s3://bucket/a.jpg: no answer")
    Traceback (most recent call last):
    simmatch.remote.StorageError: s3://bucket/a.jpg: no answer
    """


def is_remote(place: str) -> bool:
    """Whether a place is a URI, and not the name of a file of this machine.

    >>> is_remote("s3://bucket/photos"), is_remote("data/photos")
    (True, False)
    """
    return "://" in place and place.partition("://")[0] not in ("file", "local")


def file_system(uri: str) -> tuple[Any, str, dict[str, Any]]:
    """fsspec's file system of a URI, the path in it, and the options it was made with.

    Raises
    ------
    ValueError
        An unknown protocol, one whose package is not installed, or a URI that holds credentials.
    ImportError
        fsspec is not installed; it is part of the extras `images` and `cluster`.

    >>> file_system("memory://photos")[1]
    '/photos'
    """
    with extra("images"):
        from fsspec.core import url_to_fs

    protocol, _, rest = uri.partition("://")
    if "@" in rest.partition("/")[0] or "?" in rest:
        raise ValueError(f"a URI without credentials or options, got one of protocol {protocol} that holds some")
    options: dict[str, Any] = {"use_listings_cache": False}  # others write there as well
    if protocol in ("s3", "s3a"):
        retries = {"max_attempts": ATTEMPTS - 1}
        options["config_kwargs"] = {"connect_timeout": CONNECT_S, "read_timeout": ANSWER_S, "retries": retries}
    try:
        system, path = url_to_fs(uri, **options)  # imports what the protocol needs
    except ImportError as error:
        hint = "pip install -e '.[s3]' in the checkout" if protocol in ("s3", "s3a") else str(error)
        raise ValueError(f"a URI whose protocol is installed, got {uri!r}: {hint}") from None
    except ValueError:
        raise ValueError(f"a folder or a URI such as s3://bucket/prefix, got {uri!r}") from None
    return system, path, options


def retry(
    call: Callable[[], T],
    limit_s: float,
    failing: Callable[[OSError], None] | None = None,
    errors: type[OSError] = StorageError,
) -> T:
    """The result of a call, which is repeated for about `limit_s` while a remote file system fails.

    Before the first wait the log is told what fails and how long it is asked again.

    failing: called with every failure before the next attempt, and tells it instead of the log.
    errors: OSError where failures of a disk are to be repeated as well.

    Raises
    ------
    OSError
        Of the last attempt.

    >>> retry(lambda: "there", limit_s=60.0)
    'there'
    """
    deadline, pause_s, told = time.monotonic() + limit_s, FIRST_PAUSE_S, False
    while True:
        try:
            return call()
        except errors as error:
            if time.monotonic() + pause_s > deadline:
                raise
            if failing is not None:
                failing(error)
            elif not told:
                LOG.warning("%s; asked again for %g s", " ".join(str(error).split()), limit_s)
                told = True
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
