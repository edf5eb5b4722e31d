"""Workloads are the figures that synthetic sessions are drawn from; ``workloads.toml`` has them, and their sources."""

from __future__ import annotations

from math import exp, log
from random import Random
from statistics import NormalDist
from typing import Any, NamedTuple

from keepwarm.traces.shipped import shipped

HOUR = 3600
NORMAL = NormalDist()
NORMAL_P90 = NORMAL.inv_cdf(0.9)


class Spread(NamedTuple):
    """A lognormal by its median and its 90th percentile, cut to what lies between ``least`` and ``most``."""

    p50: float
    p90: float
    least: float
    most: float

    def draw(self, rng: Random) -> float:
        """A value. It hangs on ``random()`` alone, the one method whose sequence Python promises to keep."""
        deviation = NORMAL.inv_cdf(max(rng.random(), 1e-12)) / NORMAL_P90
        return min(max(self.p50 * exp(log(self.p90 / self.p50) * deviation), self.least), self.most)


class Kind(NamedTuple):
    """Agents of one type. Their prompts begin with ``lead`` tokens that a project's sessions share, then ``rest``, the
    session's own, then the ``task``; tokens all. ``flow`` None is that of the agent that started it.
    """

    model: str
    ttl_s: int
    lead: int
    rest: Spread
    task: Spread
    calls: Spread
    output: Spread
    result: Spread
    flow: str | None = None


class Script(NamedTuple):
    """What happens in a session before which turn of its main agent: how many seconds someone thinks, which sub-agents
    run, where the prompt is compacted.
    """

    calls: int
    humans: dict[int, float]
    teams: dict[int, tuple[str, ...]]
    compactions: frozenset[int] = frozenset()
    completed: bool = True


class Workload(NamedTuple):
    """Sessions of one sort: ``scripts`` in turn, or drawn. Times are seconds; ``projects`` work side by side, each with
    one session after another, a ``pause`` between them.
    """

    sessions: int
    projects: int
    kinds: dict[str, Kind]
    tool_time: Spread
    pause: Spread
    scripts: tuple[Script, ...] = ()
    human_time: Spread = Spread(95, 1236, 2, 12 * HOUR)
    human_share: float = 1 / 8.8
    team_share: float = 0.27
    teams: tuple[tuple[float, tuple[str, ...]], ...] = ()
    completed_share: float = 0.85
    compact_at: int = 167_000

    def script(self, number: int, rng: Random) -> Script:
        """What happens in the session of that number."""
        if self.scripts:
            return self.scripts[number % len(self.scripts)]
        calls = round(self.kinds["main"].calls.draw(rng))
        humans = {turn: self.human_time.draw(rng) for turn in range(1, calls) if rng.random() < self.human_share}
        teams = {}
        if rng.random() < self.team_share:
            for _ in range(1 + (rng.random() < 0.45) + (rng.random() < 0.25)):
                turn = 1 + int(rng.random() * (calls - 1))
                teams[turn] = rng.choices([team for _, team in self.teams], [share for share, _ in self.teams])[0]
                humans.pop(turn, None)
        return Script(calls, humans, teams, completed=rng.random() < self.completed_share)


_DATA = shipped("keepwarm.traces", "workloads.toml")


def _kinds(told: dict[str, dict[str, Any]]) -> dict[str, Kind]:
    """All kinds of agents by name; one may be ``like`` another before it."""
    kinds: dict[str, Kind] = {}
    for name, figures in told.items():
        known = kinds[figures["like"]]._asdict() if "like" in figures else {}
        given = {key: Spread(*value) if isinstance(value, list) else value for key, value in figures.items()}
        kinds[name] = Kind(**{key: value for key, value in (known | given).items() if key != "like"})
    return kinds


def _script(told: dict[str, Any]) -> Script:
    humans = {int(turn): float(seconds) for turn, seconds in told["humans"].items()}
    teams = {int(turn): tuple(team) for turn, team in told.get("teams", {}).items()}
    return Script(told["calls"], humans, teams, frozenset(told.get("compactions", ())), told.get("completed", True))


def _workload(told: dict[str, Any]) -> Workload:
    return Workload(
        sessions=told["sessions"],
        projects=told["projects"],
        kinds={name: KINDS[kind] for name, kind in told["kinds"].items()},
        tool_time=Spread(*told["tool_time"]),
        pause=Spread(*told["pause"]),
        scripts=tuple(map(_script, told.get("scripts", ()))),
        teams=tuple((share, tuple(team)) for share, team in told.get("teams", ())),
    )


KINDS = _kinds(_DATA["kind"])
WORKLOADS = {name: _workload(told) for name, told in _DATA["workload"].items()}
