"""What must not be shown or stored: credentials in URIs and headers, and the values of the environment's secrets."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote

from simmatch.documents import shortened

HIDDEN = "***"
SHORTEST = 6
"""Characters of a secret that is looked for in texts; a shorter one is in too many words."""

LONGEST_LINE = 2000
"""Characters of a fault's line."""

LARGEST_FILE = 65536
"""Bytes of a file that a variable names as the place of a secret."""

_WORDS = "password|passwd|pwd|passphrase|token|secret|key|credentials?|sig|signature|sas|auth"
_NAMES = (
    r"PASSWORD|PASSWD|PASSPHRASE|SECRET|TOKEN(?!S|IZ)|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL|CONNECTION_?STRING"
    r"|(?:^|_)(?:\w*KEY|PASS|SAS|AUTH|PAT|DSN|COOKIE)$"
)
_SECRET_NAME = re.compile(_NAMES, re.IGNORECASE)
_PLACE_NAME = re.compile(r"(?:PATH|FILE)$", re.IGNORECASE)
_HARMLESS_NAME = re.compile(r"(?:DIR|URL|URI|MODE)$", re.IGNORECASE)

_PASSWORD = re.compile(r"://[^/\s:@]*:([^/\s]+)@")
_USERINFO = re.compile(r"(?<![\w+.-])([A-Za-z][\w+.-]*://)[^/\s]*@")
_SECRET_QUERY = re.compile(rf"([?&](?:[\w.-]*(?:{_WORDS})|x-(?:amz|goog)-[\w-]*)=)[^&\s]+", re.IGNORECASE)
_FIELD = re.compile(rf"(?:^|;)\s*[\w ]*(?:{_WORDS})\s*=([^;]+)", re.IGNORECASE)
"""Of a connection string, `AccountName=ada;AccountKey=…`."""
_ACCOUNT = re.compile(r"((?:AccountKey|SharedAccessKey|SharedAccessSignature)=)[^;\s]+", re.IGNORECASE)
_HEADER = re.compile(
    r"(authorization[\"']?\s*[:=]\s*[\"']?(?:[A-Za-z]+\s+)?|\bbearer\s+(?=\S*\d))[\w.~+/=-]{6,}", re.IGNORECASE
)
_PRIVATE_KEY = re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?:(?=-----END)|$)", re.DOTALL)


def redact(text: str) -> str:
    """Hide user names, passwords and tokens of every URI in a text, those in headers, and private keys.

    >>> redact("at https://ada:secret@mlflow.example/x?token=1 with Authorization: Bearer 0123456789")
    'at https://***@mlflow.example/x?token=*** with Authorization: Bearer ***'
    """
    text = _USERINFO.sub(rf"\1{HIDDEN}@", text)
    for pattern in (_SECRET_QUERY, _ACCOUNT, _HEADER, _PRIVATE_KEY):
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return text


def one_line(error: object) -> str:
    """A fault in one line, as it may be shown and stored."""
    return shortened(Redactor(os.environ)(str(error)), LONGEST_LINE)


class Redactor:
    """Hides credentials of URIs, and every secret of an environment, wherever they stand in a text.

    The environment is looked at anew for every text: Ray's token, say, is made after most else. What was a secret once
    stays one.

    Parameters
    ----------
    environment
        Names and values. A variable is a secret if its name says so, such as `MLFLOW_TRACKING_PASSWORD`; the place of
        one if it is called `…_TOKEN_FILE`, say. A password in any variable's URI is a secret too.

    >>> Redactor({"MLFLOW_TRACKING_TOKEN": "opensesame"})("refused: opensesame")
    'refused: ***'
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._seen: dict[str, str] = {}
        self._secrets: list[str] = []
        self._look()

    def __call__(self, text: str) -> str:
        self._look()
        return self._hide(text)

    def all(self, value: Any) -> Any:
        """The same for every text in nested values; names stay as they are.

        What is neither text, number, mapping nor list becomes text.
        """
        self._look()
        return self._hide_all(value)

    def _look(self) -> None:
        """Take in what has changed in the environment."""
        found = set(self._secrets)
        for name in list(self._environment):  # another thread may change it meanwhile
            value = self._environment.get(name, "")
            if self._seen.get(name) != value:
                self._seen[name] = value
                found |= set(_secrets_of(name, value))
        if len(found) > len(self._secrets):
            self._secrets = sorted(found, key=len, reverse=True)  # longest first: one secret may hold another

    def _hide(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        return redact(text)

    def _hide_all(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, Mapping):
            return {key: self._hide_all(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._hide_all(inner) for inner in value]
        return self._hide(str(value))


def _secrets_of(name: str, value: str) -> set[str]:
    """Texts to hide because of one variable."""
    texts = [unquote(found[1]) for found in _PASSWORD.finditer(value)]
    if name == "HOME":
        texts += _content(f"{value}/.ray/auth_token")  # where Ray looks if no variable says otherwise
    if _SECRET_NAME.search(name) and not _HARMLESS_NAME.search(name):
        if _PLACE_NAME.search(name) or value.startswith("/"):
            texts += _content(value)
        if not _PLACE_NAME.search(name):
            texts += [value, *(found[1] for found in _FIELD.finditer(value))]
    return {form for text in texts for form in _forms(text) if len(form) >= SHORTEST}


def _content(path: str) -> list[str]:
    """What a file holds, where it is one that may hold a secret."""
    try:
        if not Path(path).is_file():
            return []
        with Path(path).open("rb") as file:
            return [file.read(LARGEST_FILE).decode()]
    except (OSError, ValueError):
        return []


def _forms(text: str) -> Iterator[str]:
    """How a secret may stand in a text: as it is, quoted for a URI, escaped in JSON or by `repr`, line by line."""
    text = text.strip()
    yield from (text, " ".join(text.split()), quote(text, safe=""), quote(text), quote_plus(text))
    yield from (json.dumps(text)[1:-1], repr(text)[1:-1])
    lines = text.splitlines()
    if len(lines) > 1:
        yield from (line.strip() for line in lines if len(line) > 16 and not line.startswith("-----"))
