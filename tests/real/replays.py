"""Replays against real engines by the product's own command line, and what its reports say of them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import polars as pl
from real.recording import KEEPWARM

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared/data/claude-projects"
SESSIONS = (
    "-home-dev-agentv/f6b7329a",
    "-home-dev-spotter/491e126e",  # with a sub-agent
    "-home-dev-spotter/d6e0bada",
    "-home-dev-context-evaluator/c72bdaa1",
    "-home-dev-entire/2b945d54",
)
"""Short ones: 61 calls. A fifth of their tokens is the least that holds a real agent's roles within 1 % of the plan."""


class Trace(NamedTuple):
    """A trace, and the share of its tokens that is sent."""

    path: Path
    scale: float


def keepwarm(*arguments: str, code: int = 0) -> str:
    """What the command prints on standard output."""
    done = subprocess.run([*KEEPWARM, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stdout


def recorded(place: Path) -> Trace:
    """Five sessions of a real agent, or the bundled trace where those are not here."""
    if not DATA.is_dir():
        return Trace(ROOT / "harness/demo.parquet", 0.25)
    for name in SESSIONS:
        project, session = name.split("/")
        (file,) = (DATA / project).glob(session + "*.jsonl")
        (place / "projects" / project).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place / "projects" / project)
    keepwarm("import", "claude-code", str(place / "projects"), "-o", str(place / "recorded.parquet"))
    return Trace(place / "recorded.parquet", 0.25)


class Run(NamedTuple):
    """A replay's directory, and what is reported of it."""

    path: Path
    report: dict[str, Any]

    @property
    def outcomes(self) -> pl.DataFrame:
        """Its calls, in their agents' order; ``left`` is the prompt that an agent's call before left, in tokens."""
        rows = pl.read_parquet(self.path / "outcomes.parquet").sort("agent", "turn")
        return rows.with_columns(left=pl.col("prompt").shift(1).over("agent"))

    @property
    def grown(self) -> pl.DataFrame:
        """Outcomes of calls whose prompts hold the whole of the one before."""
        before = pl.col("planned_prompt").shift(1).over("agent")
        return self.outcomes.filter(pl.col("planned_keep") >= before)

    def check(self, name: str) -> float:
        """The figure of one of the report's checks."""
        (value,) = (check["value"] for check in self.report["checks"] if check["check"] == name)
        return float(value)

    def counted(self, figure: str) -> float:
        """By how much one of the server's counters grew."""
        counters = orjson.loads((self.path / "run.json").read_bytes())["counters"]
        grown: float = counters["after"]["counters"][figure] - counters["before"]["counters"][figure]
        return grown


def replayed(trace: Trace, url: str, out: Path, *options: str) -> Run:
    """A replay without gaps, and its report."""
    scale = f"--scale-tokens={trace.scale}"
    keepwarm("replay", str(trace.path), "--endpoint", url, "--gap-cap=0", scale, "-o", str(out), *options)
    return Run(out, orjson.loads(keepwarm("report", str(out), "--json")))


def is_faithful(run: Run) -> None:
    """All was sent as planned, and clients were told what the server counted. A busy machine may send late."""
    report, beside, rows = run.report, run.report["reconciliation"], run.outcomes
    assert [told for told in report["because"] if not told.startswith("schedule_lag")] == []
    assert run.check("coverage") == 1.0
    assert run.check("token_fidelity.p95") <= 0.01
    assert rows["output"].to_list() == rows["planned_output"].to_list()
    rates = beside["hit_rate"]
    assert abs(rates["client"] - rates["server"]) <= 0.001
    assert {row["figure"]: row["residual"] for row in beside["rows"]} == dict.fromkeys(
        ("requests", "prompt_tokens", "cached_tokens", "output_tokens"), 0
    )
    sums = (rows.height, *(rows[name].sum() for name in ("prompt", "cache_read", "output")))
    assert tuple(row["client"] for row in beside["rows"]) == sums
