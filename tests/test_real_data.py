"""The main job on 63 real Claude Code sessions beside the project: import, inspect, simulate, report, reproduce."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import polars as pl
import pytest
from click.testing import CliRunner

from keepwarm.harness.cli import cli

DATA = Path(__file__).parents[2] / "shared" / "data" / "claude-projects"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the real sessions are not here: ../shared/data is absent")

# sessions, calls, sub-agents, cache_read, cache_write_5m, cache_write_1h, uncached
FOLDERS = {
    "-home-dev-tax": (1, 155, 6, 11_817_503, 697_620, 0, 310),
    "-home-dev-agentv": (2, 26, 0, 1_080_183, 0, 78_843, 32),
    "-home-dev-spotter": (8, 898, 8, 76_728_967, 1_165_124, 762_916, 9_147),
    "-home-dev-context-evaluator": (24, 916, 7, 64_581_053, 344_353, 2_289_126, 2_250),
    "-home-dev-imessage": (2, 79, 1, 3_800_479, 8_849, 106_393, 89),
    "-home-dev-entire": (26, 1_686, 6, 139_053_542, 3_371_442, 2_881_819, 55_617),
}
KEYS = ("sessions", "calls", "subagents", "cache_read", "cache_write_5m", "cache_write_1h", "uncached")

Run = Callable[..., dict[str, Any]]


def keepwarm(*arguments: str) -> str:
    """What the command prints on standard output; it has to succeed."""
    done = CliRunner().invoke(cli, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def told(*arguments: str) -> dict[str, Any]:
    """The JSON that the command prints."""
    found: dict[str, Any] = orjson.loads(keepwarm(*arguments, "--json"))
    return found


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this file's traces and runs lie."""
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="session")
def imports(place: Path) -> dict[str, Any]:
    """The blind and the informed import, and what the importer said of each."""
    return {
        breaks: told("import", "claude-code", str(DATA), "-o", str(place / breaks), "--prefix-breaks", breaks)
        for breaks in ("blind", "recorded")
    }


@pytest.fixture(scope="session")
def inspected(imports: dict[str, Any], place: Path) -> dict[str, Any]:
    """``inspect --json`` of the blind import."""
    return told("inspect", str(place / "blind"))


@pytest.fixture(scope="session")
def simulated(imports: dict[str, Any], place: Path) -> Run:
    """Simulates an import under some rules and reports it; each such run once."""
    made: dict[tuple[str, ...], dict[str, Any]] = {}

    def run(breaks: str, *rules: str) -> dict[str, Any]:
        if (breaks, *rules) not in made:
            out = str(place / "-".join((breaks, *(rule.strip("-") for rule in rules))))
            keepwarm("simulate", str(place / breaks), "-o", out, *rules)
            made[breaks, *rules] = {**told("report", out), "run": out}
        return made[breaks, *rules]

    return run


AS_RECORDED = ("--cache-ttl", "as-recorded")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_projects_totals_are_those_that_two_other_programs_agree_on(folder: str, place: Path) -> None:
    """A project folder by itself: sessions, calls, sub-agents and every token count of data/README.md."""
    trace = str(place / folder.strip("-"))
    keepwarm("import", "claude-code", str(DATA / folder), "-o", trace)
    found = told("inspect", trace)
    assert tuple(found[key] for key in KEYS) == FOLDERS[folder]


def test_the_totals_over_all(inspected: dict[str, Any], imports: dict[str, Any]) -> None:
    """Over all projects the totals are the sums of the table's rows, 63 sessions and 3,760 calls."""
    sums = tuple(sum(column) for column in zip(*FOLDERS.values(), strict=True))
    assert tuple(inspected[key] for key in KEYS) == sums
    assert sums[:3] == (63, 3_760, 28)
    assert (imports["blind"]["sessions"], imports["blind"]["calls"]) == (63, 3_760)


def test_the_rates_over_all_and_by_role(inspected: dict[str, Any]) -> None:
    """hit_rate, warm_hit_rate and read_write_ratio as the table's last paragraph gives them, to 0.05."""
    expected = {"": (96.19, 96.70, 25.4), "main": (96.52, 96.92, 27.9), "subagent": (91.58, 93.56, 11.0)}
    for role, (hit, warm, ratio) in expected.items():
        figures = inspected["by_role"][role] if role else inspected
        assert 100 * figures["hit_rate"] == pytest.approx(hit, abs=0.05)
        assert 100 * figures["warm_hit_rate"] == pytest.approx(warm, abs=0.05)
        assert figures["read_write_ratio"] == pytest.approx(ratio, abs=0.05)


def test_placeholder_outputs_are_not_counted_as_output(inspected: dict[str, Any]) -> None:
    """Only messages with a stop reason have a final output: 8 % of these calls, oracle below; the rest is estimated."""
    final = {}
    for file in DATA.rglob("*.jsonl"):
        for line in file.read_bytes().splitlines():
            try:
                message = _message(orjson.loads(line))
            except ValueError:
                continue
            if message and message.get("stop_reason") and message["model"] != "<synthetic>":
                final[message["id"]] = message["usage"]["output_tokens"]
    assert inspected["output"] == sum(final.values())
    assert inspected["output_calls"] == len(final)
    assert inspected["output_est"] > 0


def _message(line: dict[str, Any]) -> dict[str, Any] | None:
    """The API message on a line, its own or a sub-agent's told in a progress line."""
    if line.get("type") == "progress" and line["data"].get("type") == "agent_progress":
        line = line["data"]["message"]
    return line["message"] if line.get("type") == "assistant" else None


def test_the_damaged_lines_are_listed(imports: dict[str, Any]) -> None:
    """Two lines of these files are no JSON; the import names their files and numbers."""
    bad = []
    for file in sorted(DATA.rglob("*.jsonl")):
        for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
            if line and not _is_json(line):
                bad.append([str(file.relative_to(DATA)), number])
    assert imports["blind"]["damaged"] == bad
    assert len(bad) == 2


def _is_json(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except ValueError:
        return False
    return True


def test_informed_sessions_simulate_as_they_were_recorded(simulated: Run) -> None:
    """Informed: warm_hit_rate within 0.1 point over all, 95 % of sessions within 0.5, all within 1.5, 97 % of calls."""
    recorded = simulated("recorded", *AS_RECORDED)["recorded"]
    assert abs(recorded["difference_points"]) <= 0.1
    assert recorded["sessions"]["within_0.5"] >= 0.95
    assert recorded["sessions"]["within_1.5"] == 1.0
    assert recorded["warm_calls_within_32_tokens"] >= 0.97


def test_blind_sessions_simulate_a_little_warmer_than_they_were(simulated: Run) -> None:
    """Blind: 0 to +0.8 points over all, 85 % of sessions within 2, and the report names what explains the rest."""
    recorded = simulated("blind", *AS_RECORDED)["recorded"]
    assert 0 <= recorded["difference_points"] <= 0.8
    assert recorded["sessions"]["within_2"] >= 0.85
    rest = sum(row["points"] for row in recorded["explained"] if not row["cause"].startswith("first call"))
    assert rest == pytest.approx(recorded["difference_points"], abs=0.01)


def test_the_informed_bar_is_what_the_rows_say(simulated: Run) -> None:
    """The comparison that the report prints is the one that its own outcomes give, worked out another way."""
    report = simulated("recorded", *AS_RECORDED)
    rows = pl.read_parquet(f"{report['run']}/outcomes.parquet").filter(pl.col("turn") > 0)
    reads = ("cache_read", "rec_cache_read", "prompt", "rec_prompt")
    sums = rows.group_by("session").agg(pl.col(reads).sum())
    rate = pl.col("cache_read") / pl.col("prompt"), pl.col("rec_cache_read") / pl.col("rec_prompt")
    apart = sums.filter(pl.col("prompt") > 0).select(points=(rate[0] - rate[1]).abs() * 100)["points"]
    recorded = report["recorded"]
    total = rows.select(pl.col(reads).sum())
    assert recorded["difference_points"] == pytest.approx(total.select((rate[0] - rate[1]) * 100).item())
    assert recorded["sessions"]["max"] == pytest.approx(apart.max())
    assert recorded["sessions"]["within_0.5"] == pytest.approx((apart <= 0.5).mean())
    near = (rows["cache_read"] - rows["rec_cache_read"]).abs() <= 32
    assert recorded["warm_calls_within_32_tokens"] == pytest.approx(near.mean())
    assert rows.height == recorded["warm_calls"] == 3_671


@pytest.mark.parametrize(
    "rules",
    [
        ("--rules", "managed", "--cache-ttl", "none"),
        ("--rules", "managed", "--cache-ttl", "1h"),
        ("--rules", "managed", "--cache-ttl", "5m"),
        (*AS_RECORDED, "--no-refresh"),
    ],
    ids=["endless", "one hour for all", "five minutes for all", "no refresh on read"],
)
def test_wrong_cache_rules_fail_the_informed_bar(rules: tuple[str, ...], simulated: Run) -> None:
    """The informed bar of 0.1 point tells the right rules from wrong ones."""
    assert abs(simulated("recorded", *rules)["recorded"]["difference_points"]) > 0.1


def test_an_endless_cache_is_never_below_the_recording(simulated: Run) -> None:
    """Over all, an endless cache of one-token blocks reads at least what the recording read, informed or not."""
    endless = simulated("recorded", "--rules", "managed", "--cache-ttl", "none")
    assert endless["about"]["cache"]["block"] == 1
    assert endless["recorded"]["difference_points"] >= 0
    blind = simulated("blind", *AS_RECORDED)
    assert blind["achievable_hit_rate"]["endless"] >= blind["hit_rate"]


def test_the_published_figures_beside_these_sessions(imports: dict[str, Any], place: Path) -> None:
    """``reproduce``: warm 96.70 %, ratio 25.4, sub-agents 91.58 % and 11.0x, the share inside 85-97 %, the sentence."""
    rows = told("reproduce", str(place / "blind"))["results"]
    by_definition = {(row["claim"][:6], row["definition"].split(" (")[0]): row for row in rows}
    assert _measured(by_definition, "85-97 ", "warm_hit_rate, all calls") == pytest.approx(0.9670, abs=5e-5)
    assert _measured(by_definition, "11.7x ", "read_write_ratio, all calls") == pytest.approx(25.4, abs=0.05)
    assert _measured(by_definition, "91.3 %", "hit_rate, sub-agents") == pytest.approx(0.9158, abs=5e-5)
    assert _measured(by_definition, "11.7x ", "read_write_ratio, sub-agents") == pytest.approx(11.0, abs=0.05)
    assert _measured(by_definition, "85-97 ", "warm calls inside 85-97 %") == pytest.approx(_inside(place))
    said = re.sub(r"\s+", " ", keepwarm("reproduce", str(place / "blind")))
    assert "97.2 % and 11.7x cannot be one measurement" in said


def _inside(place: Path) -> float:
    """The share of warm calls that read 85 to 97 % of their prompt, from the trace's own columns."""
    warm = pl.read_parquet(place / "blind", columns=["turn", "prompt", "cache_read"]).filter(pl.col("turn") > 0)
    share: float = (warm["cache_read"] / warm["prompt"]).is_between(0.85, 0.97).mean()  # type: ignore[assignment]
    return share


def _measured(rows: dict[tuple[str, str], dict[str, Any]], claim: str, definition: str) -> float:
    measured: float = rows[claim, definition]["measured"]
    return measured
