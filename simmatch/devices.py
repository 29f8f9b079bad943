"""Which devices this process can use."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch

from simmatch.config import ConfigError


def check_device(device: torch.device | str | int, *, touch: bool = True) -> torch.device:
    """The device, if torch can use it in this process.

    touch: make a tensor there. Without it a GPU is only looked for, and gets no context of this process.

    Raises
    ------
    ConfigError
        There is no such device, or this torch cannot use it; the message says why.
    RuntimeError
        The device exists and fails: it is broken, or another process has it for itself.

    >>> check_device("cpu")
    device(type='cpu')
    >>> check_device("gpu")
    Traceback (most recent call last):
    simmatch.config.ConfigError: device: expected cpu, cuda or cuda:N, got 'gpu'
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device: expected cpu, cuda or cuda:N, got {device!r}") from None
    failure: Exception | None = None
    if touch:
        try:
            torch.empty(0, device=found)
            return found
        except (RuntimeError, AssertionError, ImportError) as error:  # which of them depends on the device
            failure = error
    reason = _reason(found)
    if reason is not None:
        message = f"device: expected one that torch can use here, got {str(device)!r}: {reason}"
        raise ConfigError(message) from failure
    if failure is not None:
        raise failure
    return found


def _reason(device: torch.device) -> str | None:
    """Why torch cannot use a device here; None where it should be able to."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"this build of torch, {torch.__version__}, finds no {device.type} device"
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return f"this build of torch, {torch.__version__}, has no CUDA"
    count = torch.cuda.device_count()
    if count == 0:
        return "torch sees no CUDA device, for want of a driver or because CUDA_VISIBLE_DEVICES hides it"
    if device.index is not None and device.index not in range(count):
        return "torch sees cuda:0 only" if count == 1 else f"torch sees cuda:0 to cuda:{count - 1} only"
    return None


def arithmetic(device: torch.device) -> str:
    """What the last bits of a result depend on, beside the number of threads: type of processor, and versions.

    >>> arithmetic(torch.device("cpu")).endswith(f"torch {torch.__version__}, numba {version('numba')}")
    True
    """
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{cpu_model()}, {capability}, torch {torch.__version__}, numba {version('numba')}"


def cpu_model() -> str:
    """Name of this machine's processor.

    >>> len(cpu_model()) > 0
    True
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields: dict[str, str] = {}
    for line in lines:  # of the first processor
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    numbers = [fields[key] for key in ("cpu family", "model", "stepping") if key in fields]
    return f"{fields['model name']} {'.'.join(numbers)}".strip()
