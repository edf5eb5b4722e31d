"""Workloads are the figures that synthetic sessions are drawn from; ``workloads.toml`` has them, and their sources."""

from collections.abc import Mapping, Sequence
from math import exp, log
from random import Random
from statistics import NormalDist
from types import MappingProxyType
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
    run, where the prompt is compacted. Turns are written as TOML has its keys.
    """

    calls: int
    humans: Mapping[str, float] = MappingProxyType({})
    teams: Mapping[str, Sequence[str]] = MappingProxyType({})
    compactions: Sequence[int] = ()
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
    scripts: Sequence[Script] = ()
    human_time: Spread = Spread(95, 1236, 2, 12 * HOUR)
    human_share: float = 1 / 8.8
    team_share: float = 0.27
    teams: Sequence[tuple[float, Sequence[str]]] = ()
    completed_share: float = 0.85
    compact_at: int = 167_000

    def script(self, number: int, rng: Random) -> Script:
        """What happens in the session of that number."""
        if self.scripts:
            return self.scripts[number % len(self.scripts)]
        calls = round(self.kinds["main"].calls.draw(rng))
        humans = {str(turn): self.human_time.draw(rng) for turn in range(1, calls) if rng.random() < self.human_share}
        teams = {}
        if rng.random() < self.team_share:
            for _ in range(1 + (rng.random() < 0.45) + (rng.random() < 0.25)):
                turn = str(1 + int(rng.random() * (calls - 1)))
                teams[turn] = rng.choices([team for _, team in self.teams], [share for share, _ in self.teams])[0]
                humans.pop(turn, None)
        return Script(calls, humans, teams, completed=rng.random() < self.completed_share)


def _figures(told: dict[str, Any]) -> dict[str, Any]:
    """Figures as the file has them, four numbers as a spread."""
    numbers = {name: value for name, value in told.items() if isinstance(value, list) and type(value[0]) is not list}
    return told | {name: Spread(*value) for name, value in numbers.items()}


def _workload(told: dict[str, Any]) -> Workload:
    kinds = {name: KINDS[kind] for name, kind in told["kinds"].items()}
    scripts = [Script(**script) for script in told.pop("scripts", ())]
    return Workload(**_figures(told) | {"kinds": kinds, "scripts": scripts})


_DATA = shipped("keepwarm.traces", "workloads.toml")
COMMON = _figures(_DATA["common"])
KINDS: dict[str, Kind] = {}
for _name, _told in _DATA["kind"].items():
    _like = KINDS[_told.pop("like")]._asdict() if "like" in _told else {}
    KINDS[_name] = Kind(**_like | _figures(_told))
WORKLOADS = {name: _workload(told) for name, told in _DATA["workload"].items()}
