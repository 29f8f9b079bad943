"""What `simmatch` tells Python's log: today, what it waits for (`simmatch.remote.retry`)."""

from __future__ import annotations

import logging
from collections.abc import Callable

LOG = logging.getLogger("simmatch")


class LogMessages(logging.Handler):
    """Hands on the messages of a log."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(record.getMessage())
