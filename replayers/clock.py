"""RunClock tells the ns since a run's anchor, on the monotonic clock."""

from time import monotonic_ns


class RunClock:
    """Anchored when it is made, and again by ``start`` when all is ready and the run begins."""

    def __init__(self) -> None:
        self._anchor = monotonic_ns()

    def start(self, in_ns: int = 0) -> None:
        """Make now, or so many ns from now, the run's zero."""
        self._anchor = monotonic_ns() + in_ns

    def skip(self, ns: int) -> None:
        """Let so much time be over."""
        self._anchor -= ns

    def __call__(self) -> int:
        """The ns since the anchor; it never runs back but at ``start``."""
        return monotonic_ns() - self._anchor
