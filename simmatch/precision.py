"""The arithmetic of a layer is the one written, in the format of its weights, whatever a process or a caller sets."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def exact_float32() -> None:
    """Products and convolutions of this process in full float32 from now on; for whoever owns the process.

    torch's default for convolutions on CUDA is TF32, which keeps 10 bits of the fraction. Set by the older of torch's
    two interfaces: where convolutions alone are set by the newer one, whatever saves and restores cuDNN's flags raises,
    `torch.export` among others (torch 2.11 to 2.14).
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def eager_full_precision(method: FunctionT) -> FunctionT:
    """Let neither torch.compile nor torch.autocast change a method of a layer, or anything that it calls.

    The dynamics run in buffers of their own until columns have converged: a compiler speeds up nothing there, and fails
    on writes through views. The network around the layer is compiled. Products in another format than that of the
    weights bound nothing, and lose what weights learn.
    """

    @wraps(method)
    def wrapped(layer: Any, *arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            # not before: it takes seconds to import
            uncompiled = torch.compiler.disable(wrapped)  # type: ignore[no-untyped-call]
            return uncompiled(layer, *arguments, **options)
        device = layer.lateral.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return method(layer, *arguments, **options)
        return method(layer, *arguments, **options)

    return cast(FunctionT, wrapped)
