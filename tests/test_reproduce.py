"""Reproduce: published figures beside what a trace shows under each definition, with verdicts worked out from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from keepwarm.harness.cli import main
from keepwarm.reports.frame import load
from keepwarm.reports.reproduce import contradiction, reproduce
from keepwarm.traces.model import Call
from keepwarm.traces.store import TraceWriter

SECOND = 1_000_000_000
DATA = Path(__file__).parents[2] / "shared" / "data" / "claude-projects"
SENTENCE = (
    "97.2 % and 11.7x cannot be one measurement: of all prompt tokens, 97.2 % read needs at least 34.7x read to "
    "written, and 11.7x means at most 92.1 % read."
)


def trace(path: Path, reads: dict[str, list[int]]) -> str:
    """A session of agents whose calls have 1,000 prompt tokens and read so many of them; all but ``m`` sub-agents."""
    calls = []
    for agent, amounts in reads.items():
        role = {"role": "main"} if agent == "m" else {"role": "subagent", "agent_type": agent.rstrip("0123456789")}
        for turn, read in enumerate(amounts):
            usage = {"prompt": 1000, "cache_read": read, "cache_write_5m": 1000 - read, "uncached": 0}
            told = {"usage_source": "reported", "write_source": "reported", "origin": "synthetic", "keep": 0}
            times = {"start_ns": turn * SECOND, "end_ns": turn * SECOND, "session_start_ns": 0}
            calls.append(Call("s", agent, f"{agent}.{turn}", turn=turn, **role, **usage, **told, **times))
    with TraceWriter(str(path), producer="tests", version="0", tokens="exact") as writer:
        for call in sorted(calls, key=lambda call: (call.start_ns, call.call)):
            writer.add(call)
    return str(path)


def verdicts(path: str) -> dict[str, tuple[Any, str]]:
    """Figure and verdict by claim and definition."""
    rows = reproduce(load(path))["results"]
    return {f"{row['claim']} | {row['definition']}": (row["measured"], row["verdict"]) for row in rows}


def test_the_two_headline_figures_cannot_be_one_measurement() -> None:
    """The sentence is worked out from the figures: h / (1 - h), and R / (1 + R)."""
    figures = {"aggregate_hit_rate": 0.972, "read_tokens": 891_000, "written_tokens": 76_000}
    assert contradiction(figures) == SENTENCE
    halved = contradiction({"aggregate_hit_rate": 0.5, "read_tokens": 3, "written_tokens": 1})
    assert "50.0 % read needs at least 1.0x" in halved
    assert "3.0x means at most 75.0 % read" in halved


def test_each_claim_gets_a_verdict_under_each_definition(tmp_path: Path) -> None:
    """9 warm calls read 920 and one 400: pooled 86.8 % is inside, 9 of 10 calls are; sub-agents read 91.5 %."""
    reads = {"m": [0, *[920] * 9, 400], "explore1": [915], "teammate1": [794]}
    found = verdicts(trace(tmp_path / "t.parquet", reads))
    after = "85-97 % after the first call | "
    assert found[after + "warm_hit_rate, all calls"] == (pytest.approx(0.868), "reproduced")
    assert found[after + "warm calls inside 85-97 % (every: at least 90 %)"] == (0.9, "reproduced")
    ratio = "11.7x read to written, one session of 42 calls | "
    main_agents = pytest.approx(8680 / 2320)
    assert found[ratio + "read_write_ratio, main agents"] == (main_agents, "not reproduced")
    assert found["91.3 % explore sub-agents | hit_rate, agents of type explore"] == (0.915, "reproduced")
    assert found["11.7x explore sub-agents | read_write_ratio, agents of type explore"] == (
        pytest.approx(915 / 85),
        "reproduced",
    )
    assert found["79.4 % teammates' average | hit_rate, agents of type teammate"] == (0.794, "reproduced")
    teammates = "97.2 % over four teammates | hit_rate, sessions with 4 sub-agents or more"
    assert found[teammates] == (None, "cannot be tested here")


def test_four_sub_agents_make_a_team(tmp_path: Path) -> None:
    """With four sub-agents the session's whole hit rate stands for the team's."""
    team = {f"explore{number}": [972] for number in range(4)}
    found = verdicts(trace(tmp_path / "t.parquet", {"m": [972], **team}))
    assert found["97.2 % over four teammates | hit_rate, sessions with 4 sub-agents or more"] == (0.972, "reproduced")
    ratio = found["11.7x read to written, one session of 42 calls | read_write_ratio, all calls"]
    assert ratio == (pytest.approx(972 / 28), "not reproduced")


def test_a_trace_without_cache_reports_tests_nothing(tmp_path: Path) -> None:
    """No reported reads: every verdict is that it cannot be tested here, and the trace is not called valid."""
    call = Call("s", "m", "a", "main", 0, 0, 1, 0, "absent", "absent", "synthetic", prompt=1000)
    with TraceWriter(str(tmp_path / "t.parquet"), producer="tests", version="0", tokens="exact") as writer:
        writer.add(call)
    found = reproduce(load(str(tmp_path / "t.parquet")))
    assert {row["verdict"] for row in found["results"]} == {"cannot be tested here"}
    assert found["valid"] is False


def test_calls_are_those_that_a_figure_is_over(tmp_path: Path) -> None:
    """Three agents of 4, 1 and 1 calls: three are warm, and the median session's warm ones are those three too."""
    rows = reproduce(load(trace(tmp_path / "t.parquet", {"m": [0, 900, 900, 900], "x": [0], "y": [500]})))["results"]
    calls = {row["definition"]: (row["calls"], row["sessions"]) for row in rows}
    assert calls["warm_hit_rate, all calls"] == (3, 1)
    assert calls["warm_hit_rate, median session"] == (3, 1)
    assert calls["warm calls inside 85-97 % (every: at least 90 %)"] == (3, 1)
    assert calls["read_write_ratio, all calls"] == (6, 1)
    assert calls["hit_rate, sub-agents"] == (2, 1)
    assert calls["hit_rate, sessions with 4 sub-agents or more"] == (0, 0)


def test_the_command_takes_the_bundled_trace(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a trace the bundled one is used; the JSON holds every claim and the sentence."""
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", "--json"])
    told = orjson.loads(capsys.readouterr().out)
    assert not stop.value.code
    assert (told["path"], told["contradiction"]) == ("the bundled trace", SENTENCE)
    assert {row["claim"][:6] for row in told["results"]} == {"85-97 ", "11.7x ", "97.2 %", "79.4 %", "5.0x t", "91.3 %"}


def test_the_table_fits_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Claims, figures and verdicts within 100 columns, the sentence below."""
    with pytest.raises(SystemExit):
        main(["reproduce", trace(tmp_path / "t.parquet", {"m": [0, 900]})])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    words = " ".join(out.split())
    assert "warm_hit_rate, all calls 1 90.00 % reproduced (85-97 %)" in words
    assert "read_write_ratio, main agents 2 0.8x not reproduced (10.5x-12.9x)" in words
    assert SENTENCE in words


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="the sample of real sessions is not here")
def test_real_sessions_reproduce_some_figures_and_not_others(tmp_path: Path) -> None:
    """Warm 96.70 % pooled is inside, 13 % of calls are; 25.4x over all is not 11.7x, 11.0x of sub-agents is near it."""
    with pytest.raises(SystemExit) as stop:
        main(["import", "claude-code", str(DATA), "-o", str(tmp_path / "t.parquet")])
    assert not stop.value.code
    found = verdicts(str(tmp_path / "t.parquet"))
    after, ratio = "85-97 % after the first call | ", "11.7x read to written, one session of 42 calls | "
    assert found[after + "warm_hit_rate, all calls"] == (pytest.approx(0.9670, abs=5e-5), "reproduced")
    inside = found[after + "warm calls inside 85-97 % (every: at least 90 %)"]
    assert inside == (pytest.approx(0.13, abs=0.005), "not reproduced")
    assert found[ratio + "read_write_ratio, all calls"] == (pytest.approx(25.4, abs=0.05), "not reproduced")
    assert found[ratio + "read_write_ratio, sub-agents"] == (pytest.approx(11.0, abs=0.05), "reproduced")
    subagents = found["91.3 % explore sub-agents | hit_rate, sub-agents"]
    assert subagents == (pytest.approx(0.9158, abs=5e-5), "reproduced")
