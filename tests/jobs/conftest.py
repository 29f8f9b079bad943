"""What the tests of the jobs share: the configuration they start from, and an environment that is nobody's own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from cluster.config import RunConfig
from jobs.options import override, read_yaml
from simmatch.config import parse

# Read when ray is imported. A developer's own settings must not decide what the tests see.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
for _name in ("RAY_ADDRESS", "SIMMATCH_DATA"):
    os.environ.pop(_name, None)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def digits_yaml() -> Path:
    """The configuration file of the digits."""
    return ROOT / "jobs" / "configs" / "digits.yaml"


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For processes: this checkout, this interpreter as `python`, a token of their own for Ray, no colours."""
    dropped = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "PYTHONWARNINGS")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # what Ray calls staying on loopback
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


@pytest.fixture
def make_config(digits_yaml: Path):
    """(assignments, as of --set) → the configuration of the digits, changed."""

    def make(*assignments: str) -> RunConfig:
        return parse(RunConfig, override(read_yaml(digits_yaml), list(assignments)))

    return make
