"""Packages that the library needs for some things only, and that an extra of its installation brings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports inside a function.

    Raises
    ------
    ImportError
        A package is missing; the message names the extra to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ImportError(f"the package {package} is missing: pip install 'simmatch[{name}]'") from error
