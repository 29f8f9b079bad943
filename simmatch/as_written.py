"""What a layer does is what its methods say, whatever surrounds the call: a compiler or another format of products."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def as_written(method: FunctionT) -> FunctionT:
    """Let torch.compile and torch.autocast leave a method of a layer as it is, with all that it calls.

    The dynamics run in buffers of their own until columns have converged: nothing that a compiler speeds up, and writes
    through views that it fails on. What is around the layer is compiled. Products in another format than that of the
    weights bound nothing, and lose what weights learn.
    """

    @wraps(method)
    def unaltered(layer: Any, *arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            # not before: it takes seconds to import
            untouched = torch.compiler.disable(unaltered)  # type: ignore[no-untyped-call]
            return untouched(layer, *arguments, **options)
        device = layer.lateral.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return method(layer, *arguments, **options)
        return method(layer, *arguments, **options)

    return cast(FunctionT, unaltered)
