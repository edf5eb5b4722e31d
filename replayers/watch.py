"""Watch samples the client itself while it replays: its CPU, and how late its event loop is."""

import asyncio
from time import monotonic, process_time
from typing import Any

TICK_S = 0.05


class Watch:
    """Samples while its block runs, in the running loop. ``told`` is what it found, in seconds. Looks that a held-up
    loop missed count as late as they would have been.
    """

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}
        self._lags: list[float] = []

    def __enter__(self) -> None:
        self._begun = monotonic(), process_time()
        self._task = asyncio.create_task(self._run())

    def __exit__(self, *_: object) -> None:
        self._task.cancel()
        (wall, cpu), lags = self._begun, sorted(self._lags)
        self.told = {
            "wall_s": monotonic() - wall,
            "cpu_s": process_time() - cpu,
            "loop_lag_p99_s": lags[int(len(lags) * 0.99)] if lags else None,
            "loop_lag_max_s": lags[-1] if lags else None,
        }

    async def _run(self) -> None:
        while True:
            due = monotonic() + TICK_S
            await asyncio.sleep(TICK_S)
            late = max(monotonic() - due, 0.0)
            self._lags += [late - missed * TICK_S for missed in range(1 + int(late / TICK_S))]
