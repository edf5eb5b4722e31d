"""Work spread over processes, its results in order and few of them waiting, however many tasks there are."""

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import Any

AHEAD = 4
"""Tasks a process that are given out before their results are taken: enough to keep it busy, few to hold."""

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
"""Applies a function to tasks and gives the results in the tasks' order, as ``map`` does."""


@contextmanager
def ordered_map(processes: int) -> Iterator[Map]:
    """A map over so many processes; with one, ``map`` itself. Functions, tasks and results are pickled; each process
    imports the caller's main module. Here and there work goes on without Python's cyclic garbage collector: an import
    makes millions of objects and no cycles, and the collector would look through them again and again.
    """
    gc.disable()
    try:
        if processes < 2:
            yield map
        else:
            with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=gc.disable) as pool:
                yield partial(_mapped, pool, processes * AHEAD)
    finally:
        gc.enable()


def _mapped(pool: ProcessPoolExecutor, ahead: int, do: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
    given: deque[Future[Any]] = deque()
    for task in tasks:
        given.append(pool.submit(do, task))
        if len(given) >= ahead:
            yield given.popleft().result()
    while given:
        yield given.popleft().result()
