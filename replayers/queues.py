"""In which order an engine's waiting calls are taken: a queue maps a job to what it is sorted by, before arrival."""

from collections.abc import Callable

from keepwarm.replayers.job import Job


def by_priority(job: Job) -> tuple[int, ...]:
    """The highest strict priority first, then the highest priority."""
    hints = job.hints
    return (0, 0) if hints is None else (-(hints.strict_priority or 0), -(hints.priority or 0))


def by_flow(job: Job) -> tuple[int, ...]:
    """Calls that someone waits for first, each flow by priority."""
    return (job.flow == "background", *by_priority(job))


QUEUES: dict[str, Callable[[Job], tuple[int, ...]]] = {"fcfs": lambda job: (), "priority": by_priority, "flow": by_flow}
