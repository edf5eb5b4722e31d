"""Workloads are the figures that synthetic sessions are drawn from.

Sources of the ``claude-code`` figures; where two differ, the figure taken lies between them:

- TraceLab (arXiv 2606.30560, 357,161 steps of 43 developers): output of a call p50 214; tokens appended by a call p50
  875; tool time p50 0.3 s, p90 13.6 s, p99 3.6 min; answer time p50 5.7 s, p90 22 s; human wait p50 84 s, p90 20.6 min;
  8.8 calls for one human message.
- 568 public Claude Code sessions (36,333 calls): calls a session p50 42, p90 155; growth p50 576, p75 1,227, p90
  2,771; tool time p50 0.26 s, p90 9.9 s; human wait p50 103 s; answer time p50 5.3 s at about 62 tokens a second;
  sub-agents in 27 % of sessions, p50 10 and p90 24 calls each, mostly one at a time; first prompt p50 36.6k (main) and
  23.7k (sub-agents); tools asked for by one answer: mean 1.17; windows of 200k tokens are compacted near 167k.
- kv-cache-tester's example (Apache-2.0): first main prompt 25.4k, first explore prompt 13.2k, of which 10k are tools;
  four explore agents started within one second find nothing cached.
- The agentic-inference post of NVIDIA Dynamo (March 2026), for ``agent-team``: a lead with explore sub-agents (11.7
  tokens read for one written) and four teammates with short lives and cold starts (5.0).

TTLs are Claude Code's: with a subscription an hour for the main agent and five minutes for sub-agents; with an API key
five minutes for all. ``demo`` is small and made to be watched: its sizes are chosen, not measured.
"""

from __future__ import annotations

from math import exp, log
from random import Random
from statistics import NormalDist
from typing import NamedTuple

HOUR, FIVE_MINUTES = 3600, 300
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


MAIN = Kind(
    model="claude-opus-4-6",
    ttl_s=HOUR,
    lead=17_000,
    rest=Spread(9_000, 16_000, 3_000, 30_000),
    task=Spread(2_500, 14_000, 60, 60_000),
    calls=Spread(33, 130, 2, 400),
    output=Spread(214, 900, 10, 16_000),
    result=Spread(270, 1_800, 12, 25_000),
    flow="interactive",
)
EXPLORE = Kind(
    model="claude-haiku-4-5",
    ttl_s=FIVE_MINUTES,
    lead=10_000,
    rest=Spread(1_800, 2_600, 900, 4_000),
    task=Spread(1_400, 4_000, 200, 12_000),
    calls=Spread(10, 24, 2, 80),
    output=Spread(180, 800, 10, 8_000),
    result=Spread(800, 5_000, 12, 25_000),
)
PLAN = EXPLORE._replace(model="claude-opus-4-6", lead=11_000, task=Spread(3_000, 9_000, 300, 20_000))
GENERAL = PLAN._replace(lead=12_500, rest=Spread(7_000, 10_000, 3_000, 15_000))
TEAMMATES = ("general-purpose",) * 4
CLAUDE_CODE = {"main": MAIN, "explore": EXPLORE, "plan": PLAN, "general-purpose": GENERAL}

SMALL_MAIN = MAIN._replace(
    ttl_s=FIVE_MINUTES,
    lead=6_500,
    rest=Spread(1_500, 1_900, 1_000, 2_500),
    task=Spread(500, 1_500, 80, 3_000),
    output=Spread(150, 400, 20, 900),
    result=Spread(420, 1_400, 30, 3_000),
)
SMALL_EXPLORE = EXPLORE._replace(
    lead=6_000,
    rest=Spread(600, 900, 400, 1_200),
    task=Spread(300, 600, 80, 1_000),
    calls=Spread(7, 10, 5, 10),
    output=Spread(110, 300, 20, 600),
    result=Spread(600, 1_800, 30, 3_000),
)
DEMO = {
    "main": SMALL_MAIN,
    "explore": SMALL_EXPLORE,
    "plan": SMALL_EXPLORE._replace(model="claude-opus-4-6", lead=6_400),
    "general-purpose": SMALL_EXPLORE._replace(model="claude-opus-4-6", lead=7_000),
}
DEMO_SCRIPTS = (
    Script(22, {6: 25, 15: 40}, {3: ("explore",) * 4}),
    Script(16, {7: 18}, {5: ("explore", "plan")}),
    Script(15, {9: 425}, {}),
    Script(24, {10: 12}, {}, compactions=frozenset([18])),
    Script(14, {8: 30}, {4: ("general-purpose",)}),
    Script(11, {5: 22}, {}, completed=False),
)

WORKLOADS: dict[str, Workload] = {
    "claude-code": Workload(
        sessions=20,
        projects=3,
        kinds=CLAUDE_CODE,
        tool_time=Spread(0.3, 12, 0.01, 1800),
        pause=Spread(1200, 4 * HOUR, 30, 24 * HOUR),
        teams=(
            (0.55, ("explore",)),
            (0.18, ("general-purpose",)),
            (0.10, ("plan",)),
            (0.11, ("explore",) * 2),
            (0.03, ("explore",) * 3),
            (0.03, ("explore",) * 4),
        ),
    ),
    "agent-team": Workload(
        sessions=4,
        projects=1,
        kinds={
            "main": MAIN,
            "explore": EXPLORE._replace(calls=Spread(18, 26, 10, 40)),
            "general-purpose": GENERAL._replace(calls=Spread(7, 12, 4, 20), flow="background"),
        },
        tool_time=Spread(0.3, 12, 0.01, 600),
        pause=Spread(1200, 4 * HOUR, 30, 24 * HOUR),
        scripts=(
            Script(30, {6: 95, 20: 240}, {3: ("explore",) * 3, 9: TEAMMATES}),
            Script(42, {5: 60, 25: 400}, {8: TEAMMATES, 18: ("explore",) * 2, 30: TEAMMATES}),
        ),
    ),
    "demo": Workload(
        sessions=6,
        projects=2,
        kinds=DEMO,
        tool_time=Spread(0.3, 6, 0.02, 15),
        pause=Spread(40, 90, 20, 120),
        scripts=DEMO_SCRIPTS,
    ),
}
