"""The token that Ray would use, and whether a cluster accepts it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from simmatch.config import ConfigError

KEPT = "~/.ray/auth_token"
"""The last place where Ray looks for a token."""


def token_here(*, kept: bool = True) -> str | None:
    """The token that Ray would use; None where there is none.

    kept: look in `KEPT` as well.

    Raises
    ------
    ConfigError
        `RAY_AUTH_TOKEN_PATH` is not a file with a token; Ray would end the process.
    """
    token, path = (os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if token:
        return token.strip()
    try:
        text = Path(path or KEPT).expanduser().read_text().strip() if path or kept else ""
    except (OSError, ValueError) as error:
        text, why = "", getattr(error, "strerror", None) or str(error)
    else:
        why = "nothing in it"
    if path and not text:
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH: expected a file with a token, got {path}: {why}")
    return text or None


def check_token(cluster: str, accepts: Callable[[str], bool]) -> None:
    """Refuse to go on without the token of a cluster that asks for one.

    accepts: whether the cluster accepts a token.

    Raises
    ------
    ConfigError
        There is none here, or a wrong one.
    """
    token = token_here()
    if token is None:
        expected = f"expected the token of the cluster at {cluster}, which asks for it"
        raise ConfigError(f"RAY_AUTH_TOKEN: {expected}, got none")
    if not accepts(token):
        variable = next((name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)), KEPT)
        raise ConfigError(f"{variable}: expected the token of the cluster at {cluster}, got one that it rejects")
