"""``keepwarm replay`` and ``keepwarm doctor`` against the real vLLM and Dynamo: what is sent is what was recorded, and
what is reported is what the server did.

``tests/real/install.sh dynamo vllm`` fetches them; the test of an absent one skips. vLLM's half takes minutes, and
waits for ``make test-real``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import polars as pl
import pytest
from real import started
from real.replays import Run, Trace, is_faithful, keepwarm, recorded, replayed

pytestmark = pytest.mark.slow
DIALECTS = ("messages", "chat", "responses")
Replays = Callable[..., Run]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this file's traces and runs lie."""
    return tmp_path_factory.mktemp("replays")


@pytest.fixture(scope="module")
def five(place: Path) -> Trace:
    """Five recorded sessions."""
    return recorded(place)


@pytest.fixture(scope="module")
def one(place: Path) -> Trace:
    """One short session of an agent without sub-agents."""
    keepwarm("synth", "claude-code", "--sessions", "1", "--seed", "9", "-o", str(place / "one.parquet"))
    return Trace(place / "one.parquet", 0.1)


@pytest.fixture(scope="module")
def vllm() -> Iterator[str]:
    """vLLM's URL."""
    with started.vllm() as engine:
        yield engine.url


@pytest.fixture(scope="module")
def dynamo() -> Iterator[str]:
    """The URL of Dynamo with two workers and a router that knows their caches."""
    with started.dynamo() as engine:
        yield engine.url


@pytest.fixture(scope="module")
def replays(place: Path) -> Replays:
    """Makes a replay, the same one once."""
    made: dict[tuple[Any, ...], Run] = {}

    def run(trace: Trace, url: str, *options: str) -> Run:
        known = (trace, url, *options)
        if known not in made:
            made[known] = replayed(trace, url, place / f"run{len(made)}", *options)
        return made[known]

    return run


@pytest.mark.parametrize("dialect", DIALECTS)
def test_recorded_sessions_on_vllm(dialect: str, five: Trace, vllm: str, replays: Replays) -> None:
    """Beside being faithful, 99 % of grown prompts read the whole blocks of 32 of the one before, and no more."""
    run = replays(five, vllm, "--dialect", dialect)
    is_faithful(run)
    rule, grown = run.report["reconciliation"]["as_block_rule"], run.grown
    assert (rule["block"], rule["calls"]) == (32, grown.height) and grown.height >= 50
    held = pl.min_horizontal("left", pl.col("prompt") - 1) // 32 * 32
    share = grown.select((pl.col("cache_read") == held).mean()).item()
    assert rule["share"] == share >= 0.99


def test_where_a_cache_starts_on_vllm(one: Trace, vllm: str, place: Path) -> None:
    """A reset cache knows nothing; then the same session is known, but not under another salt of the cache, and no more
    after a reset. An agent's first call tells.
    """
    known = []
    for number, start in enumerate(("reset", "warm", "cache-salt", "reset")):
        run = replayed(one, vllm, place / f"start{number}", "--dialect=chat", f"--start={start}")
        first = run.outcomes.row(0, named=True)
        whole = (first["prompt"] - 1) // 32 * 32
        known.append({0: "cold", whole: "warm"}.get(first["cache_read"], first["cache_read"]))
        told = run.report["about"]["cache"]
        assert (told["state_at_start"], told["how"]) == ("warm" if start == "warm" else "cold", start)
    assert known == ["cold", "warm", "cold", "cold"]


def test_live_answers_on_vllm(one: Trace, vllm: str, replays: Replays) -> None:
    """An answer that vLLM gave is found again, all but its last token: more is read than with recorded answers."""
    live = replays(one, vllm, "--dialect", "chat", "--assistant", "live")
    kept = (pl.col("left") + pl.col("output").shift(1).over("agent") - 1) // 32 * 32
    found = live.outcomes.with_columns(kept=kept).join(live.grown.select("call"), on="call")
    assert found.height >= 5 and found["cache_read"].to_list() == found["kept"].to_list()
    beside = live.report["reconciliation"]
    assert beside["as_block_rule"] == {"block": 32, "calls": found.height, "share": 1.0}
    assert [row["residual"] for row in beside["rows"]] == [0, 0, 0, 0]
    assert live.report["cache_read"] > replays(one, vllm, "--dialect", "chat").report["cache_read"]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_recorded_sessions_on_dynamo(dialect: str, five: Trace, dynamo: str, replays: Replays) -> None:
    """Beside being faithful, each grown prompt reads whole blocks of 16: of the one before, if the same worker answers;
    else fewer, of an older one or of another agent's. Which worker it was is told in chat alone.
    """
    run = replays(five, dynamo, "--dialect", dialect)
    is_faithful(run)
    grown, before = run.grown, pl.col("worker").shift(1).over("agent")
    assert (grown["cache_read"] % 16 == 0).all() and (grown["cache_read"] <= grown["left"] // 16 * 16).all()
    assert (grown["cache_read"] == grown["left"] // 16 * 16).mean() > 0.5
    same = run.outcomes.filter(before == pl.col("worker")).join(grown.select("call"), on="call")
    rule = run.report["reconciliation"]["as_block_rule"]
    if dialect == "chat":
        assert run.outcomes["worker"].n_unique() == 2
        assert (same["cache_read"] == same["left"] // 16 * 16).all()
        assert (rule["calls"], rule["share"]) == (same.height, 1.0) and same.height > grown.height / 2
    else:
        assert run.outcomes["worker"].null_count() == run.outcomes.height
        assert (rule["calls"], rule["share"]) == (0, None)


def test_two_routers_of_dynamo_in_one_report(five: Trace, dynamo: str, replays: Replays) -> None:
    """The router that knows the caches makes more of them than one that takes turns, of which the simulator knows how
    much it makes; one report has both beside each other, as text and as JSON.
    """
    routed = replays(five, dynamo, "--dialect", "chat")
    with started.dynamo(router_mode="round-robin") as engine:
        turns = replayed(five, engine.url, routed.path.with_name("round-robin"), "--dialect", "chat")
    is_faithful(turns)
    rates = turns.report["reconciliation"]["hit_rate"]
    assert rates["router"] is None and abs(rates["predicted"] - rates["client"]) <= 0.03
    assert routed.report["reconciliation"]["hit_rate"]["router"] == pytest.approx(routed.report["hit_rate"], abs=0.05)
    assert routed.report["hit_rate"] > turns.report["hit_rate"]
    both = (str(turns.path), str(routed.path))
    for told, run in zip(orjson.loads(keepwarm("report", *both, "--json")), (turns, routed), strict=True):
        assert [told[name] for name in ("path", "about", "reconciliation")] == [
            run.report[name] for name in ("path", "about", "reconciliation")
        ]
    beside = keepwarm("report", *both).split("Side by side")[1]
    away = 100 * (routed.report["hit_rate"] - turns.report["hit_rate"])
    rates_told = " ".join(f"{100 * run.report['hit_rate']:.2f} %" for run in (turns, routed))
    assert f"hit_rate {rates_told} {away:+.3f} points" in [" ".join(line.split()) for line in beside.splitlines()]


def test_hints_reach_dynamo(five: Trace, dynamo: str, replays: Replays) -> None:
    """Derived hints make Dynamo compute prompts before they are asked for, which its router counts and its frontend
    does not; the report has them beside a run without hints.
    """
    off = replays(five, dynamo, "--dialect", "chat", "--hints", "off")
    derived = replays(five, dynamo, "--dialect", "chat", "--hints", "derived")
    for run in (off, derived):
        is_faithful(run)
    assert off.counted("router_prompt_tokens") == off.counted("prompt_tokens")
    assert derived.counted("router_prompt_tokens") > derived.counted("prompt_tokens")
    beside = keepwarm("report", str(off.path), str(derived.path)).split("Side by side")[1]
    assert ["hints", "off", "derived"] in [line.split() for line in beside.splitlines()]


EVERYWHERE = {"answers": True, "error": None, "why": None, "streams": True, "usage": True, "cached": "reported"}


def examined(url: str) -> dict[str, Any]:
    """What the doctor says of an endpoint, as JSON; its table names what it is."""
    report: dict[str, Any] = orjson.loads(keepwarm("doctor", url, "--keep-alive-wait=8", "--json"))
    assert {name: row | EVERYWHERE for name, row in report["dialects"].items()} == report["dialects"]
    assert list(report["dialects"]) == [*DIALECTS, "completions"]
    assert {row["exact_output"] for row in report["dialects"].values()} == {True}
    assert [row["tools"] for row in report["dialects"].values()] == [True, True, True, False]
    for dialect in DIALECTS:
        assert report["dialects"][dialect]["calibration"]["off"] <= 0.01
    return report


def written(report: dict[str, Any]) -> list[str]:
    """How each dialect tells written tokens."""
    return [row["written"] for row in report["dialects"].values()]


def test_the_doctor_knows_vllm(vllm: str) -> None:
    """Its version, context and block; salts and resets work; longer prompts are refused; connections are kept."""
    report = examined(vllm)
    assert (report["server"], report["version"], report["context"]) == ("vllm", "0.32.0", 65_536)
    cache = {"block": 32, "salt": True, "reset": "POST /reset_prefix_cache"}
    assert report["cache"] | cache == report["cache"]
    assert written(report) == ["reported"] * 3 + ["inferred"]
    assert (report["overflow"]["outcome"], report["overflow"]["status"]) == ("refused", 400)
    assert report["keep_alive"]["closed_s"] is None
    assert report["timings"] == {"field": None, "clock": None, "ahead_s": None, "flag": "--enable-per-request-metrics"}


def test_the_doctor_knows_dynamo(dynamo: str) -> None:
    """Its version, context and block; a salt does nothing, nor can the cache be reset; zeros of written tokens are
    known for what they are; a longer prompt is an error within status 200; first tokens are late on reused connections.
    """
    report = examined(dynamo)
    assert (report["server"], report["version"], report["context"]) == ("dynamo", "1.6.1", 65_536)
    assert report["cache"] | {"block": 16, "salt": False, "reset": None} == report["cache"]
    assert written(report) == ["inferred"] * 4
    assert (report["overflow"]["outcome"], report["overflow"]["status"]) == ("refused", 200)
    assert report["keep_alive"]["closed_s"] is None
    late = report["delayed_ack"]
    assert late["found"] and late["reused_ms"] - late["new_ms"] > 20
    assert (report["timings"]["field"], report["timings"]["clock"]) == ("nvext.timing", "server")
    assert (report["counters"]["kind"], report["counters"]["workers"]) == ("dynamo", 2)
    told = [" ".join(line.split()) for line in keepwarm("doctor", dynamo, "--keep-alive-wait=0.1").splitlines()]
    assert {"server dynamo 1.6.1", "cache block 16, from 16 tokens on, asked in messages"} < set(told)
    assert "chat yes yes yes reported inferred yes yes yes" in told
