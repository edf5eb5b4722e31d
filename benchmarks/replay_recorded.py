"""`keepwarm replay` with sessions begun when they were recorded to, which the command cannot be told yet.

    python benchmarks/replay_recorded.py TRACE URL RUN

Does what the command does, and nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path

from keepwarm.harness.planned import Planned
from keepwarm.harness.replaying import asked_endpoint, replay_to
from keepwarm.replayers import run as runs
from keepwarm.replayers.http import reach


def main(trace: str, url: str, run: str) -> None:
    """Replay it."""
    planned = Planned(trace, speed=1.0, gap_cap=None, at_once=None)
    asking = asked_endpoint(reach(url, "messages"))
    runs.open_run(Path(run), mode="replay", force=False)
    print(replay_to(Path(run), planned, asking).words())


if __name__ == "__main__":
    main(*sys.argv[1:])
