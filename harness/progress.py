"""A progress bar on stderr for whatever takes more than a moment; nothing where stderr is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[int, int | None], None]]:
    """Shows a bar while the block runs; the block gets a function to tell (done, total) to."""
    if not sys.stderr.isatty():
        yield lambda done, of=None: None
        return
    from rich.console import Console  # a terminal only: the import costs more than a short command takes
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, of=None: bar.update(task, completed=done, total=of if of is not None else total)
