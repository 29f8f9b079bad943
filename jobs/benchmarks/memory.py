"""How much memory a piece of work needs at its peak, beyond what lives before it begins."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def peak_allocated_bytes(action: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator held at once during `action()`, less what it held before.

    Every allocation and release counts, temporaries inside a kernel too (an unfolded patch matrix, say), which
    operators seen from Python would not show.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would report its own start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        action()
    recorded = profiler.profiler
    assert recorded is not None, "the profiler has just run"
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.device_type().name == "CPU":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def peak_resident_bytes(action: Callable[[], object]) -> int | None:
    """Growth of the process' resident memory to its highest during `action()`; None where Linux does not tell.

    Coarser than `peak_allocated_bytes` (freed blocks may stay resident), but nothing escapes it: buffers of the
    convolution library, say, which do not come from torch's allocator.
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else blocks freed earlier, still resident, serve it unnoticed
        before = _status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the highest begins anew, see proc(5)
        action()
        return max(0, _status_bytes("VmHWM") - before)
    except OSError:
        return None


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
