"""The files that this process holds open."""

from __future__ import annotations

import os
from pathlib import Path


def open_files(*places: str | Path) -> list[str]:
    """Targets of the descriptors that are one of the places or lie below one.

    Others come and go by themselves: garbage collection may close what an earlier test has left behind.
    """
    targets = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            targets.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        except FileNotFoundError:  # the one that listed, or one that was closed since
            continue
    return sorted(str(each) for each in targets if any(each.is_relative_to(place) for place in places))
