"""Control of arithmetic: full float32 and the same bits in every run, whatever the settings of process and caller."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar, cast

import torch

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def exact_float32() -> None:
    """Compute matrix products and convolutions in full float32 from now on, in the whole process.

    On CUDA torch computes convolutions in TF32 by default, with 10 bits of the fraction. Only programs call this
    function; the library never changes settings of its process by itself. It uses the older of torch's two interfaces:
    after convolutions are set through the newer one, code that saves and restores the flags of cuDNN raises an error,
    `torch.export` among others (torch 2.11 to 2.14).

    >>> exact_float32()
    >>> torch.backends.cudnn.allow_tf32
    False
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


class _Repeatable:
    """Settings of cuDNN while some thread needs them; they are those of the whole process, so threads are counted."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, (False, False)

    def __enter__(self) -> None:
        cudnn = torch.backends.cudnn
        with self._lock:
            if self._inside == 0:
                self._before = cudnn.deterministic, cudnn.benchmark
                cudnn.deterministic, cudnn.benchmark = True, False
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        cudnn = torch.backends.cudnn
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                cudnn.deterministic, cudnn.benchmark = self._before


_REPEATABLE = _Repeatable()


def repeatable_convolutions(device: torch.device) -> AbstractContextManager[None]:
    """Convolutions on a GPU that give the same bits in every run on GPUs of one type.

    Some of cuDNN's weight gradients add up in the order in which threads finish; they are left out. Nor is an algorithm
    selected by timing, which may end differently in every run. Several threads may be inside at the same time.

    >>> with repeatable_convolutions(torch.device("cuda")):
    ...     torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    (True, False)
    """
    return _REPEATABLE if device.type == "cuda" else nullcontext()


def eager_full_precision(method: FunctionT) -> FunctionT:
    """Decorator that disables torch.compile and torch.autocast for a method of a layer and everything that it calls.

    The dynamics run in their own buffers until the columns have converged: a compiler would not make them faster, and
    fails on writes through views. The network around a layer can still be compiled. Products in a shorter format than
    that of the weights would invalidate the bound of λmax(M), and lose small changes of the weights.

    >>> class Doubling(torch.nn.Module):
    ...     lateral = torch.eye(2)
    ...     @eager_full_precision
    ...     def forward(self, x):
    ...         return self.lateral @ x + x
    >>> with torch.autocast("cpu", dtype=torch.bfloat16):
    ...     Doubling()(torch.ones(2, 1)).dtype
    torch.float32
    """

    @wraps(method)
    def wrapped(layer: Any, *arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            # imported here because the import takes seconds
            uncompiled = torch.compiler.disable(wrapped)  # type: ignore[no-untyped-call]
            return uncompiled(layer, *arguments, **options)
        device = layer.lateral.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return method(layer, *arguments, **options)
        return method(layer, *arguments, **options)

    return cast(FunctionT, wrapped)
