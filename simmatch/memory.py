"""Out of memory, told in one line: what was running, what was asked for, and which key to lower how far.

The memory of an activity is what stood before it began, what it keeps as it proceeds, and what it uses at a time. Only
the last is proportional to a key such as a batch size. On a GPU the allocator's message has the numbers; on a CPU it
does not, and the key is halved.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from simmatch.control_groups import ROOT, limits, memory_limit

MARGIN = 1.25
"""Memory used at a time, over what was allocated when an allocation failed: another one might have followed."""

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}

TEXTS = ("out of memory", "allocate memory", "status_alloc_failed")
"""Parts of the lower-case text of a RuntimeError: of CUDA, of torch's allocator on a CPU, of CUDA's libraries."""


def machine_bytes(root: Path = ROOT) -> int:
    """Memory of this machine in bytes, or what the control groups of this process allow of it.

    root: where `proc` and `sys` are mounted.

    >>> machine_bytes() > 2**20
    True
    """
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min([physical, *limits("memory", memory_limit, root)]))


class OutOfMemory(MemoryError):
    """Memory did not suffice; the message says for what, and which key to lower.

    Attributes
    ----------
    elsewhere: whether other processes hold the memory that was lacking, so that the same may succeed later.

    >>> OutOfMemory("layer 0, learning: out of memory").elsewhere
    False
    """

    def __init__(self, message: str, *, elsewhere: bool = False) -> None:
        self.elsewhere = elsewhere
        super().__init__(message)


@dataclass(frozen=True)
class Lever:
    """A key of the configuration to which the memory used at a time is proportional, and its value.

    >>> Lever("encode_batch", 500).lowered(0.3)
    150
    >>> Lever("encode_batch", 500).lowered(0.9)
    250
    """

    key: str
    now: int

    def lowered(self, ratio: float) -> int:
        """A value for which this part of the memory suffices: at most half, in two digits; 0 if there is none."""
        value = min(self.now // 2, int(self.now * max(ratio, 0.0)))
        scale = int(10 ** max(len(str(value)) - 2, 0))
        return value // scale * scale


@dataclass(frozen=True)
class Shortage:
    """What an allocator says, in bytes; None where it does not.

    Attributes
    ----------
    device: "GPU" or "".
    asked: of the allocation that failed.
    free, total: of the device.
    held: by tensors of this process.
    spare: reserved by torch's allocator, and not in use.
    elsewhere: held by other processes.

    >>> Shortage.of(MemoryError()).asked is None
    True
    >>> Shortage.of(KeyError("lr")) is None
    True
    """

    device: str
    asked: int | None = None
    free: int | None = None
    total: int | None = None
    held: int | None = None
    spare: int = 0
    elsewhere: int = 0

    @classmethod
    def of(cls, error: BaseException) -> Shortage | None:
        """From an error or one that it was raised from; None where memory was not the cause."""
        text = str(error)
        lack = isinstance(error, RuntimeError) and any(part in text.lower() for part in TEXTS)
        if not lack and not isinstance(error, torch.OutOfMemoryError | MemoryError):
            return None if error.__cause__ is None else cls.of(error.__cause__)
        gpu = isinstance(error, torch.OutOfMemoryError) or "cuda" in text.lower()
        # in a container torch may not know which process is its own, and says of none that it is "this process"
        others = re.findall(r"Process \d+ has (\S+ \w+) memory", text) if "this process has" in text else []
        return cls(
            device="GPU" if gpu else "",
            asked=_bytes(text, r"(?:[Tt]ried to allocate|[Uu]nable to allocate) (\S+ \w+)"),
            free=_bytes(text, r"(\S+ \w+) is free"),
            total=_bytes(text, r"total capacity of (\S+ \w+)"),
            held=_bytes(text, r"(\S+ \w+) is allocated by PyTorch"),
            spare=_bytes(text, r"(\S+ \w+) is reserved by PyTorch but unallocated") or 0,
            elsewhere=sum(_bytes(other, "(.+)") or 0 for other in others),
        )

    @property
    def taken(self) -> bool:
        """Whether other processes hold what is lacking."""
        return self.elsewhere >= max(1, (self.asked or 0) - (self.free or 0))

    def __str__(self) -> str:
        asked = "" if self.asked is None else f"asked for {_size(self.asked)}"
        known = self.free is not None and self.total is not None
        free = f"{_size(self.free or 0)} of {_size(self.total or 0)} free" if known else ""
        elsewhere = f"{_size(self.elsewhere)} held by other processes" if self.taken else ""
        numbers = ", ".join(filter(None, (asked, free, elsewhere)))
        return " ".join(filter(None, ("out of", self.device, "memory"))) + (f" ({numbers})" if numbers else "")


class MemoryWatch:
    """Raises `OutOfMemory` in place of an allocator's error, with what was running; other errors pass.

    Parameters
    ----------
    device: that of all tensors.

    >>> with MemoryWatch(torch.device("cpu")) as memory:
    ...     memory.begin("layer 1", Lever("encode_batch", 500))
    ...     raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4194304 bytes.")
    Traceback (most recent call last):
    simmatch.memory.OutOfMemory: layer 1: out of memory (asked for 4 MiB): set encode_batch to at most 250 (now 500)
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._what, self._levers, self._else = "", tuple[Lever, ...](), ""
        self._before = self._kept = 0
        self._part = 0.0

    def begin(self, what: str, *levers: Lever, otherwise: str = "") -> None:
        """Note what runs from now on.

        Parameters
        ----------
        levers: the first that can be lowered enough is named.
        otherwise: what else helps; named after a lever too.
        """
        self._what, self._levers, self._else = what, levers, otherwise
        self._before, self._kept, self._part = self._held(), 0, 0.0

    def proceed(self, part: float) -> None:
        """Note that this part of the activity is done, 0 < part ≤ 1, and what it keeps of that."""
        self._kept, self._part = max(0, self._held() - self._before), part

    def __enter__(self) -> MemoryWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, OutOfMemory):
            return
        shortage = Shortage.of(error)
        if shortage is not None:
            message = f"{self._what}: {shortage}{self._advice(shortage)}"
            raise OutOfMemory(message, elsewhere=shortage.taken) from error

    def _held(self) -> int:
        """Bytes of this process's tensors on a GPU."""
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0

    def _advice(self, shortage: Shortage) -> str:
        ratio, kept = 1.0, 0
        if shortage.held is not None and shortage.free is not None:
            kept = int(self._kept / self._part) if self._part else 0
            room = shortage.held + shortage.spare + shortage.free - self._before - kept
            needed = shortage.held - self._before - self._kept + (shortage.asked or 0)
            ratio = room / (MARGIN * max(needed, 1))
        for lever in self._levers:
            value = lever.lowered(ratio)
            if value >= 1:
                advice = f"set {lever.key} to at most {value} (now {lever.now})"
                return f": {advice}, or {self._else}" if self._else else f": {advice}"
        keeps = f"; its result takes about {_size(kept)} in all" if kept else ""
        return f"{keeps}: {self._else or 'use a device with more memory'}"


def _bytes(text: str, pattern: str) -> int | None:
    """A size in a text, as in "2.10 GiB", in bytes."""
    match = re.search(pattern, text)
    if match is None:
        return None
    number, unit = match[1].split()
    try:
        return int(float(number) * UNITS[unit])
    except (ValueError, KeyError):
        return None


def _size(num_bytes: int) -> str:
    """Bytes as torch's allocator writes them."""
    unit = max((unit for unit in UNITS.items() if unit[1] <= num_bytes), key=lambda unit: unit[1], default=("bytes", 1))
    return f"{num_bytes / unit[1]:.3g} {unit[0]}"
