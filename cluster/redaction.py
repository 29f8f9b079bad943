"""What must not be shown or stored: credentials in URIs, and the values of the environment's secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

HIDDEN = "***"
SHORTEST = 6
"""Characters of a secret that is looked for in texts; a shorter one is in too many words."""

_USERINFO = re.compile(r"([A-Za-z][\w+.-]*://)[^/\s]*@")
_SECRET_QUERY = re.compile(
    r"([?&](?:password|passwd|pwd|token|access_token|secret|api_?key|sig|signature|x-amz-[\w-]*)=)[^&\s]+",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN(?!S|IZ)|API_?KEY|ACCESS_KEY|CREDENTIALS|_AUTH$", re.IGNORECASE)
_PLACE_NAME = re.compile(r"(?:PATH|FILE|DIR|URL|URI|MODE)$", re.IGNORECASE)


def redact(text: str) -> str:
    """Hide user names, passwords and tokens of every URI in a text.

    >>> redact("at https://ada:secret@mlflow.example/x?token=1")
    'at https://***@mlflow.example/x?token=***'
    """
    return _SECRET_QUERY.sub(rf"\1{HIDDEN}", _USERINFO.sub(rf"\1{HIDDEN}@", text))


def one_line(error: object) -> str:
    """A fault in one line, as it may be shown and stored."""
    return Redactor(os.environ)(" ".join(str(error).split()))


class Redactor:
    """Hides credentials of URIs, and every secret of an environment, wherever they stand in a text.

    Parameters
    ----------
    environment
        Names and values. A variable is a secret if its name says so, such as `MLFLOW_TRACKING_PASSWORD`.

    >>> Redactor({"MLFLOW_TRACKING_TOKEN": "opensesame"})("refused: opensesame")
    'refused: ***'
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        values = {
            value
            for name, value in environment.items()
            if len(value) >= SHORTEST and _SECRET_NAME.search(name) and not _PLACE_NAME.search(name)
        }
        # longest first: one secret may hold another
        self._secrets = sorted(values | {quote(value, safe="") for value in values}, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        return redact(text)

    def all(self, value: Any) -> Any:
        """The same for every text in nested values; names stay as they are.

        What is neither text, number, mapping nor list becomes text.
        """
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, Mapping):
            return {key: self.all(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.all(inner) for inner in value]
        return self(str(value))
