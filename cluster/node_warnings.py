"""What `simmatch` says on a rank, as messages to the controller: nobody reads a rank's own output."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import simmatch
from cluster.log_messages import LOG, LogMessages
from cluster.messages import NodeWarning
from cluster.redaction import Redactor

OURS = (Path(simmatch.__file__).parent, Path(__file__).parent)
"""Folders whose code issues warnings for the reader of a run; a warning elsewhere is for that library's authors."""


@contextmanager
def node_warnings(send: Callable[[NodeWarning], None]) -> Iterator[None]:
    """Send what is said within: warnings issued by our own code, and what is waited for (`simmatch.remote.retry`).

    The secrets of this node are hidden; they may differ from the driver's.
    """
    hide = Redactor(os.environ)

    def tell(text: str) -> None:
        send(NodeWarning(hide(f"{socket.gethostname()}: {text}")))

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if any(Path(filename).is_relative_to(folder) for folder in OURS):
            tell(str(message))
        else:
            usual(message, category, filename, lineno, file, line)

    handler, usual = LogMessages(tell), warnings.showwarning
    LOG.addHandler(handler)
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = usual
        LOG.removeHandler(handler)
