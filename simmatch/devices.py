"""Which devices this process can use."""

from __future__ import annotations

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
