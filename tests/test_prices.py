"""Prices: a dated table, matched by bare model id; what is not known stays unknown and is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from keepwarm.harness.cli import main
from keepwarm.reports.frame import load
from keepwarm.reports.prices import cost, load_prices, price_of
from keepwarm.traces.errors import InputError
from keepwarm.traces.model import Call, Outcome, Segment
from keepwarm.traces.store import write_outcomes

SECOND = 1_000_000_000
OPUS = "claude-opus-4-6"


def outcome(session: str, model: str | None = OPUS, **fields: Any) -> Outcome:
    """A call of 100,000 prompt tokens: 90,000 read, 8,000 written for five minutes, 2,000 uncached, 500 answered."""
    told = {"usage_source": "reported", "write_source": "reported", "origin": "synthetic", "model": model}
    recorded = {name: fields.pop(f"rec_{name}", None) for name in ("output", "output_est")}
    call = Call(session, "m", f"{session}-{fields.pop('turn', 0)}", "main", 0, 0, SECOND, 0, **told, **recorded)
    usage = {"prompt": 100_000, "cache_read": 90_000, "cache_write_5m": 8_000, "uncached": 2_000, "output": 500}
    times = {"due_ns": 0, "sent_ns": 0, "done_ns": 1800 * SECOND, "write_source": "reported", "status": 200}
    return Outcome(
        call._replace(append=(Segment(1, 100_000, "user"),)), **{**times, "completed": True, **usage, **fields}
    )


def costs(tmp_path: Path, *outcomes: Outcome, prices: str | None = None, **gpu: Any) -> dict[str, Any]:
    """What the run of these outcomes cost."""
    tmp_path.mkdir(exist_ok=True)
    write_outcomes(str(tmp_path / "outcomes.parquet"), outcomes)
    (tmp_path / "run.json").write_bytes(orjson.dumps({"planned_calls": len(outcomes)}))
    return cost(load(str(tmp_path)), load_prices(prices, **gpu))


def test_a_call_costs_its_parts_at_their_prices(tmp_path: Path) -> None:
    """90k read at 0.5, 8k written at 6.25, 2k uncached at 5 and 500 out at 25 USD a million make 0.1175 USD."""
    assert costs(tmp_path, outcome("a"))["cost_per_completed_task"] == pytest.approx(0.1175)


def test_writes_are_billed_by_their_lifetime(tmp_path: Path) -> None:
    """The same 8,000 tokens written for an hour cost 10 USD a million instead of 6.25."""
    hour = outcome("a", cache_write_5m=0, cache_write_1h=8_000)
    assert costs(tmp_path, hour)["money"] == pytest.approx(0.1175 + 0.03)


def test_the_money_of_failed_sessions_is_borne_by_the_completed_ones(tmp_path: Path) -> None:
    """Two sessions of known outcome cost 0.235 together, one completed; the third's outcome is unknown and left out."""
    found = costs(tmp_path, outcome("a"), outcome("b", completed=False), outcome("c", completed=None))
    assert found["cost_per_completed_task"] == pytest.approx(0.235)
    assert (found["sessions_known"], found["sessions_completed"]) == (2, 1)
    assert found["money_of_priced_calls"] == pytest.approx(3 * 0.1175)


def test_a_session_completed_only_if_all_its_rows_say_so(tmp_path: Path) -> None:
    """One row of a session that was not completed is enough."""
    found = costs(tmp_path, outcome("a"), outcome("b", turn=1), outcome("b", turn=2, completed=False))
    assert (found["sessions_known"], found["sessions_completed"]) == (2, 1)


def test_no_completed_session_has_no_cost(tmp_path: Path) -> None:
    """Nothing completed: the figure is unknown, not infinite and not zero."""
    assert costs(tmp_path, outcome("a", completed=False))["cost_per_completed_task"] is None


def test_a_model_without_price_is_named_and_its_sessions_have_no_cost(tmp_path: Path) -> None:
    """One unpriced call leaves the figure unknown; the other session's money is still told."""
    found = costs(tmp_path, outcome("a"), outcome("b", model="some-model"))
    assert found["cost_per_completed_task"] is None
    assert found["models_without_price"] == ["some-model"]
    assert (found["sessions_without_cost"], found["calls_without_cost"]) == (1, 1)
    assert found["money_of_priced_calls"] == pytest.approx(0.1175)


def test_a_missing_write_price_is_not_zero(tmp_path: Path) -> None:
    """Composer's fast tier lists no write price: a call that wrote has no cost, one that did not write has one."""
    assert costs(tmp_path / "a", outcome("a", model="composer-2-fast"))["money"] is None
    free = outcome("a", model="composer-2-fast", cache_write_5m=None, uncached=10_000)
    expected = (90_000 * 0.35 + 10_000 * 1.5 + 500 * 7.5) / 1e6
    assert costs(tmp_path / "b", free)["money"] == pytest.approx(expected)


def test_what_leaves_a_cost_unknown_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Writes of no known lifetime on Claude, an unlisted model, an untold read: each reason with its calls."""
    calls = [outcome("a", turn=turn, cache_write_5m=None, cache_write_other=8_000) for turn in range(3)]
    calls += [outcome("b", model="some-model"), outcome("c", cache_read=None, uncached=None), outcome("d")]
    found = costs(tmp_path, *calls)
    assert found["unpriced"] == {"cache_write_other": 3, "model": 1, "usage": 1}
    assert found["calls_without_cost"] == 5
    assert costs(tmp_path / "b", outcome("d"))["unpriced"] == {}
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    words = " ".join(capsys.readouterr().out.split())
    why = "cache_write_other in 3, the model in 1, tokens that were not told in 1"
    assert f"5 calls have no known cost: no price for {why}" in words


def test_a_simulated_run_has_no_gpu_hours(tmp_path: Path) -> None:
    """Its time is virtual: nobody's GPU was at work so long."""
    costs(tmp_path, outcome("a"))
    (tmp_path / "run.json").write_bytes(orjson.dumps({"planned_calls": 1, "mode": "simulate"}))
    assert cost(load(str(tmp_path)), load_prices(None, 2.0, 4))["gpu_hours"] is None


def test_a_vendor_without_write_fee_bills_writes_as_uncached(tmp_path: Path) -> None:
    """For GPT-5.4 mini written and uncached tokens cost the same."""
    expected = (90_000 * 0.075 + 10_000 * 0.75 + 500 * 4.5) / 1e6
    assert costs(tmp_path, outcome("a", model="gpt-5.4-mini"))["money"] == pytest.approx(expected)


def test_an_unreported_read_leaves_the_cost_unknown(tmp_path: Path) -> None:
    """Where the endpoint does not say what it read, the prompt cannot be priced."""
    assert costs(tmp_path, outcome("a", cache_read=None, uncached=None))["money"] is None


def test_a_failed_call_without_usage_costs_nothing(tmp_path: Path) -> None:
    """Only answers are billed: a refused call leaves its session's cost known."""
    silent = dict.fromkeys(("prompt", "cache_read", "cache_write_5m", "uncached", "output", "done_ns"))
    failed = outcome("a", turn=1, error="overloaded", status=529, **silent)
    assert costs(tmp_path, outcome("a"), failed)["money"] == pytest.approx(0.1175)


def test_estimated_outputs_are_counted_as_such(tmp_path: Path) -> None:
    """1,000 estimated tokens of answer are 0.025 of 0.130 USD, also where they only echo what was asked for."""
    missing = outcome("a", output=None, rec_output_est=1_000)
    assert costs(tmp_path / "a", missing)["output_est_share"] == pytest.approx(0.025 / 0.130)
    echoed = outcome("a", output=1_000, rec_output_est=1_000)
    assert costs(tmp_path / "b", echoed)["output_est_share"] == pytest.approx(0.025 / 0.130)
    known = outcome("a", output=1_000, rec_output=1_000, rec_output_est=900)
    assert costs(tmp_path / "c", known)["output_est_share"] == 0.0


def test_a_long_prompt_is_billed_at_its_own_prices(tmp_path: Path) -> None:
    """Haiku 5.5 over 100,000 tokens costs five times as much, for the whole call; at 100,000 it does not."""
    short = costs(tmp_path / "a", outcome("a", model="claude-haiku-5-5"))["money"]
    assert short == pytest.approx((90_000 * 0.01 + 8_000 * 0.125 + 2_000 * 0.1 + 500 * 0.5) / 1e6)
    longer = outcome("a", model="claude-haiku-5-5", prompt=100_001, uncached=2_001)
    expected = 5 * (90_000 * 0.01 + 8_000 * 0.125 + 2_001 * 0.1 + 500 * 0.5) / 1e6
    assert costs(tmp_path / "b", longer)["money"] == pytest.approx(expected)


def test_gpu_hours_stand_beside_the_api_price(tmp_path: Path) -> None:
    """Half an hour on 4 GPUs at 2 USD is 4 USD for two completed tasks; without a price it is unknown."""
    found = costs(tmp_path, outcome("a"), outcome("b"), gpu_hour_price=2.0, gpus=4)
    assert (found["gpu_hours"], found["gpu_money"], found["gpu_cost_per_completed_task"]) == (2.0, 4.0, 2.0)
    assert costs(tmp_path, outcome("a"))["gpu_cost_per_completed_task"] is None


@pytest.mark.parametrize(
    ("price", "why"),
    [
        ("nan", "'nan': expected a number"),
        ("inf", "'inf': expected a number"),
        ("-1", "-1.0 is not in the range x>=0."),
        ("2,50", "'2,50' is not a valid float range."),
    ],
)
def test_a_gpu_hour_price_is_a_number_of_usd(price: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is no finite amount is refused in one line, whatever the run."""
    with pytest.raises(SystemExit) as stop:
        main(["report", "none", "--gpu-hour-price", price])
    said = capsys.readouterr()
    assert (stop.value.code, said.out) == (2, "")
    assert said.err == f"keepwarm: Invalid value for '--gpu-hour-price': {why} (see keepwarm report --help)\n"


@pytest.mark.parametrize(
    ("model", "listed"),
    [
        ("claude-opus-4-5-20251101", "claude-opus-4-5"),
        ("claude-opus-5-5-20261001", "claude-opus-5-5"),
        ("claude-opus-5", "claude-opus-5"),
        ("claude-haiku-4-5@20251001", "claude-haiku-4-5"),
        ("gpt-5.4-2026-03-05", "gpt-5.4"),
        ("gpt-5.4-mini", "gpt-5.4-mini"),
        ("MiniMax-M2.5", "minimax-m2.5"),
        ("gemini-3.1-pro-preview", "gemini-3.1-pro"),
        ("gpt-5.4-pro", None),
        ("claude-opus-4", None),
        ("claude-opus-4-55", None),
        (None, None),
    ],
)
def test_a_model_matches_its_id_and_a_date_behind_it(model: str | None, listed: str | None) -> None:
    """The longest listed id wins; a different model that only begins alike has no price."""
    prices = load_prices()
    assert price_of(prices, model) == (prices.models[listed] if listed else None)


def test_the_shipped_table_is_dated_and_whole() -> None:
    """Every model has the three prices all have, reads cost less than uncached tokens, writes no less."""
    prices = load_prices()
    assert prices.date.startswith("2026-")
    for name, row in prices.models.items():
        for tier in (row, row.get("above") or row):
            assert tier["read"] < tier["uncached"] < tier["output"], name
            assert all(tier[kind] >= tier["uncached"] for kind in ("write_5m", "write_1h") if kind in tier), name
    for name in (model for model in prices.models if model.startswith("claude-")):
        row = prices.models[name]
        assert (row["write_5m"], row["write_1h"]) == (1.25 * row["uncached"], 2 * row["uncached"]), name


def test_a_users_table_goes_over_the_shipped_one(tmp_path: Path) -> None:
    """A listed model gets the user's price, another is added, and the rest stay."""
    own = tmp_path / "own.toml"
    own.write_text(
        'date = "2026-11-21"\nsource = "us"\n[models]\n'
        f"{OPUS} = {{ uncached = 1, read = 1, write = 1, output = 1 }}\n"
        '"our-model" = { uncached = 2, read = 2, write = 2, output = 2 }\n'
    )
    assert costs(tmp_path / "a", outcome("a"), prices=str(own))["money"] == pytest.approx(0.1005)
    assert costs(tmp_path / "b", outcome("a", model="our-model"), prices=str(own))["money"] == pytest.approx(0.201)
    assert price_of(load_prices(str(own)), "claude-opus-4-7") == price_of(load_prices(), "claude-opus-4-7")


def test_the_longest_listed_id_wins(tmp_path: Path) -> None:
    """A dated id that is listed itself has its own price, whatever the undated one costs."""
    own = tmp_path / "own.toml"
    row = "{ uncached = 9, read = 9, write = 9, output = 9 }"
    own.write_text(f'date = "2026-11-21"\n[models]\n{OPUS}-20260205 = {row}\n')
    prices = load_prices(str(own))
    assert (price_of(prices, f"{OPUS}-20260205") or {})["uncached"] == 9
    assert (price_of(prices, f"{OPUS}-20260206") or {})["uncached"] == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("date = ", "not TOML"),
        ('date = "2026"\n', "expected a 'date' (text) and a table 'models'"),
        ('date = "2026"\n[models]\nm = { uncached = "1" }', "model 'm': field 'uncached' is '1', expected a number"),
        ('date = "2026"\n[models]\nm = { writes = 1 }', "model 'm': unknown field 'writes'"),
        ('date = "2026"\n[models]\nm = { write = -1 }', "model 'm': field 'write' is -1"),
        ('date = "2026"\n[models]\nm = { read = nan }', "model 'm': field 'read' is nan, expected a number of USD"),
        ('date = "2026"\n[models]\nm = { read = inf }', "model 'm': field 'read' is inf, expected a number of USD"),
        (f'date = "2026"\n[models]\nm = {{ read = 1{"0" * 400} }}', "expected a number of USD"),
    ],
)
def test_a_bad_price_file_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    """The line names the file, the model and the field."""
    bad = tmp_path / "bad.toml"
    bad.write_text(text)
    with pytest.raises(InputError) as told:
        load_prices(str(bad))
    assert said in str(told.value)
    assert str(told.value).startswith(str(bad))
    assert "\n" not in str(told.value)
