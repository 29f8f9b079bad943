"""Secrets that stand in environment variables: what requests have to carry, and what a webhook is signed with."""

from __future__ import annotations

import os

from simmatch.config import ConfigError

SHORTEST_TOKEN = 16


def token_from(variable: str, key: str) -> str:
    """The secret that an environment variable holds.

    Raises
    ------
    ConfigError
        There is none, or it is too short, or no header can carry it.
    """
    token = os.environ.get(variable, "").strip()
    expected = f"{key}: expected the name of an environment variable that holds a secret"
    if not token:
        raise ConfigError(f"{expected}, got {variable}, which is not set")
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable():
        raise ConfigError(f"{expected} of at least {SHORTEST_TOKEN} printable ASCII characters, got {variable}")
    return token
