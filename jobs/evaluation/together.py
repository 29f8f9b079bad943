"""Small trainings side by side: one thread each, for a small network does not fill two."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

T = TypeVar("T")


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    """torch and BLAS use so many threads, in every thread that is begun within."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(limits=count):
            yield
    finally:
        torch.set_num_threads(before)


def together(tasks: Sequence[Callable[[], T]], workers: int) -> Iterator[tuple[int, T]]:
    """Results as they come, with the place of their task; at most `workers` at a time, begun in the order of the tasks.

    An error of a task is raised here; what has not begun by then does not begin.
    """
    with threads_of(1), ThreadPoolExecutor(workers) as pool:
        places = {pool.submit(task): place for place, task in enumerate(tasks)}
        try:
            for future in as_completed(places):
                yield places[future], future.result()
        finally:
            for future in places:
                future.cancel()
