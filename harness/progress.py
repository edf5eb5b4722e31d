"""A progress bar on stderr for whatever takes more than a moment; nothing where stderr is not a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Told = Callable[[int, int | None], None]
"""Takes how much is done, and of how much where that was not known before."""


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Told]:
    """Shows a bar while the block runs; the block gets a function to tell how far it is."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console  # a terminal only: the import costs more than a short command takes
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, of: bar.update(task, completed=done, total=total if of is None else of)
