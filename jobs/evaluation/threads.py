"""Small trainings in threads: one torch thread each, because a small network does not keep two busy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

T = TypeVar("T")


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """torch and BLAS use `count` threads, in this thread and in those that it starts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(limits=count):
            yield
    finally:
        torch.set_num_threads(before)


def run_in_threads(tasks: Sequence[Callable[[], T]], workers: int) -> Iterator[tuple[int, T]]:
    """(index of the task, its result) as tasks end; at most `workers` run at a time, started in order.

    An error of a task is raised here; tasks that have not started by then do not start.
    """
    with limited_threads(1), ThreadPoolExecutor(workers) as pool:
        indices = {pool.submit(task): index for index, task in enumerate(tasks)}
        try:
            for future in as_completed(indices):
                yield indices[future], future.result()
        finally:
            for future in indices:
                future.cancel()
