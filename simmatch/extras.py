"""Optional packages, which the extras of the installation install."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Context for imports of optional packages inside a function.

    Raises
    ------
    ImportError
        A package is missing; the message names the extra that installs it.

    >>> with extra("eval"):
    ...     import no_such_package
    Traceback (most recent call last):
    ImportError: the package no_such_package is missing: pip install 'simmatch[eval]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ImportError(f"the package {package} is missing: pip install 'simmatch[{name}]'") from error
