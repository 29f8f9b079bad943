"""Hides what must not be shown or stored: credentials in URIs and headers, and secrets of the environment."""

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
"""Characters of the shortest secret that is hidden; a shorter one occurs in too many words."""

LONGEST_LINE = 2000
"""Characters of the line of an error."""

LARGEST_FILE = 65536
"""Bytes of a file that a variable names as holding a secret."""

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
    """An error in one line, fit to be shown and stored."""
    return shortened(Redactor(os.environ)(str(error)), LONGEST_LINE)


class Redactor:
    """Hides credentials of URIs, and every secret of an environment, wherever they stand in a text.

    The environment is read again for every text, since some secrets, such as Ray's token, are set late. A value that
    was a secret once is hidden from then on.

    Parameters
    ----------
    environment
        Names and values. A variable is a secret if its name says so, as `MLFLOW_TRACKING_PASSWORD` does; it names a
        file that holds one if it is called, for example, `…_TOKEN_FILE`. A password in the URI of any variable is a
        secret too.

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
        """The same for every text in nested values; keys are kept.

        Values of other types than numbers, mappings and lists become text.
        """
        self._look()
        return self._hide_all(value)

    def _look(self) -> None:
        """Read what has changed in the environment."""
        secrets = set(self._secrets)
        for name in list(self._environment):  # another thread may change it meanwhile
            value = self._environment.get(name, "")
            if self._seen.get(name) != value:
                self._seen[name] = value
                secrets |= set(_secrets_of(name, value))
        if len(secrets) > len(self._secrets):
            self._secrets = sorted(secrets, key=len, reverse=True)  # longest first: one secret may hold another

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
    texts = [unquote(match[1]) for match in _PASSWORD.finditer(value)]
    if name == "HOME":
        texts += _content(f"{value}/.ray/auth_token")  # where Ray looks by default
    if _SECRET_NAME.search(name) and not _HARMLESS_NAME.search(name):
        if _PLACE_NAME.search(name) or value.startswith("/"):
            texts += _content(value)
        if not _PLACE_NAME.search(name):
            texts += [value, *(match[1] for match in _FIELD.finditer(value))]
    return {form for text in texts for form in _forms(text) if len(form) >= SHORTEST}


def _content(path: str) -> list[str]:
    """The beginning of a file, if it is a regular file that can be read."""
    try:
        if not Path(path).is_file():
            return []
        with Path(path).open("rb") as file:
            return [file.read(LARGEST_FILE).decode()]
    except (OSError, ValueError):
        return []


def _forms(text: str) -> Iterator[str]:
    """Forms of a secret in a text: as it is, quoted for a URI, escaped in JSON or by `repr`, line by line."""
    text = text.strip()
    yield from (text, " ".join(text.split()), quote(text, safe=""), quote(text), quote_plus(text))
    yield from (json.dumps(text)[1:-1], repr(text)[1:-1])
    lines = text.splitlines()
    if len(lines) > 1:
        yield from (line.strip() for line in lines if len(line) > 16 and not line.startswith("-----"))
