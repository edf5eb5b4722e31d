"""Price is what a model's tokens cost, from a dated table kept as data; runs and recordings turn into money (USD)."""

import re
import sys
import tomllib
from functools import reduce
from math import fsum
from operator import add
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from keepwarm.reports.frame import Loaded, collect, first_of
from keepwarm.traces.errors import InputError
from keepwarm.traces.shipped import shipped

WRITES = ("write_5m", "write_1h", "write_other")
COLUMNS = {"uncached": "uncached", "read": "cache_read"} | {kind: f"cache_{kind}" for kind in WRITES}
COLUMNS |= {"output": "output"}
SUFFIX = re.compile(r"(?:[-@](?:\d{8}|\d{6}|\d{4}-\d{2}-\d{2}|latest|preview))*(?:-v\d+(?::\d+)?)?(?:\[1m\])?")
"""What may follow a model's bare id and leave its price as it is: a date, a release channel, a platform's version."""


class Prices(NamedTuple):
    """A price table: its date, where it is from, and by model id the prices (USD per million tokens); and what GPUs are
    hired for: the price of one GPU-hour and their number, None where they are the run's own.
    """

    date: str
    source: str
    models: dict[str, dict[str, Any]]
    gpu_hour_usd: float | None = None
    gpus: int | None = None


def load_prices(path: str | None = None, gpu_hour_price: float | None = None, gpus: int | None = None) -> Prices:
    """The shipped table; with a file of the same form, that file's models over it. InputError tells what is wrong."""
    ours = _prices("prices.toml", shipped("keepwarm.reports", "prices.toml"))
    ours = ours._replace(gpu_hour_usd=gpu_hour_price, gpus=gpus)
    if path is None:
        return ours
    try:
        own = _prices(path, tomllib.loads(Path(path).read_text("utf-8")))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not TOML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable price file: {error}") from error
    source = f"{own.source} ({path}), over {ours.date}"
    return ours._replace(date=own.date, source=source, models=ours.models | own.models)


def _prices(path: str, table: dict[str, Any]) -> Prices:
    models = table.get("models")
    if not isinstance(models, dict) or not isinstance(table.get("date"), str):
        raise InputError(f"{path}: expected a 'date' (text) and a table 'models'")
    parsed = {name.lower(): _checked(path, name, row) for name, row in models.items()}
    return Prices(table["date"], str(table.get("source", "")), parsed)


def _checked(path: str, name: str, row: Any) -> dict[str, Any]:
    """One model's prices with ``write`` spread over the kinds of writes; unknown fields and non-numbers are errors."""
    if not isinstance(row, dict):
        raise InputError(f"{path}: model {name!r}: expected a table of prices")
    prices: dict[str, Any] = {}
    for field, value in row.items():
        if field == "above":
            prices["above"] = _checked(path, f"{name}.above", value)
        elif field not in (*COLUMNS, "write", "prompt"):
            raise InputError(f"{path}: model {name!r}: unknown field {field!r}, expected one of {', '.join(COLUMNS)}")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
            raise InputError(f"{path}: model {name!r}: field {field!r} is {value!r}, expected a number of USD")
        elif field != "write":
            prices[field] = float(value)
    return {**dict.fromkeys(WRITES, float(row["write"])), **prices} if "write" in row else prices


def price_of(prices: Prices, model: str | None) -> dict[str, Any] | None:
    """A model's prices: of the longest listed id that the bare id is, but for a date or the like behind it."""
    if model is None:
        return None
    bare = model.lower()
    fits = [name for name in prices.models if bare.startswith(name) and SUFFIX.fullmatch(bare[len(name) :])]
    return prices.models[max(fits, key=len)] if fits else None


Table = dict[str | None, dict[str, Any]]


def _table(rows: pl.LazyFrame, prices: Prices) -> Table:
    """The prices of each model in some rows, none where it is not listed."""
    models = collect(rows.select("model").unique()).to_series().sort()
    return {model: price_of(prices, model) or {} for model in models}


def _money(tokens: pl.Expr, kind: str, rows: Table) -> pl.Expr:
    """Tokens at their price, by the tier of the call's prompt; no tokens cost nothing, whatever their price."""

    def listed(field: str, tier: str | None = None) -> pl.Expr:
        of_model = ((m, (row.get(tier) or {} if tier else row).get(field)) for m, row in rows.items() if row)
        return first_of(((pl.col("model") == m, price) for m, price in of_model), pl.lit(None, pl.Float64))

    long = (pl.col("prompt") > listed("prompt", "above")).fill_null(False)
    price = pl.when(long).then(listed(kind, "above")).otherwise(listed(kind))
    return pl.when(tokens == 0).then(0.0).otherwise(tokens * price / 1e6)


def token_parts() -> dict[str, pl.Expr]:
    """The tokens of a call by the kind of price they cost; null where they are not known."""
    writes = {kind: pl.col(COLUMNS[kind]).fill_null(0) for kind in WRITES}
    rest = pl.col("prompt") - pl.col("cache_read") - pl.sum_horizontal(writes.values())
    output = pl.coalesce("output", "rec_output", "rec_output_est")
    return {"uncached": pl.coalesce("uncached", rest), "read": pl.col("cache_read"), **writes, "output": output}


def unpriced(rows: pl.LazyFrame, table: Table) -> dict[str, int]:
    """Calls without a known cost by what is missing, most first: ``model`` is not in the table; ``usage`` was not told;
    a column of tokens (``cache_write_other``) has no price in its model's row. A call may count under several.
    """
    if not any(table.values()):  # as where an endpoint is one's own: no need to look at more of very many calls
        return {"model": collect(rows.select(pl.col("cost").null_count())).item()}
    known = pl.col("model").is_in([model for model, row in table.items() if row]).fill_null(False)
    told = ~pl.any_horizontal(tokens.is_null() for tokens in token_parts().values())
    missing = {"model": ~known, "usage": known & ~told}
    for kind, tokens in token_parts().items():
        missing[COLUMNS[kind]] = known & tokens.is_not_null() & _money(tokens, kind, table).is_null()
    found = rows.filter(pl.col("cost").is_null()).select(**{why: calls.sum() for why, calls in missing.items()})
    counts = sorted(collect(found).row(0, named=True).items(), key=lambda item: -item[1])
    return {why: int(calls) for why, calls in counts if calls}


def estimated_output() -> pl.Expr:
    """Whether a call's output count rests on an estimate: it is not known, or is what the estimate asked for."""
    asked = pl.col("rec_output").is_null() & (pl.col("output") == pl.col("rec_output_est"))
    return pl.col("output").is_null() | asked.fill_null(False)


def priced(rows: pl.LazyFrame, table: Table) -> pl.LazyFrame:
    """Rows with ``cost`` and ``cost_estimated`` (the part of it that rests on estimated outputs), USD.

    A call is null where its usage or a price it needs is not known. A call that failed without usage costs nothing:
    only answers are billed.
    """
    money = {kind: _money(tokens, kind, table) for kind, tokens in token_parts().items()}
    outputs, inputs = money.pop("output"), reduce(add, money.values())
    free = pl.col("error").is_not_null() & pl.col("prompt").is_null()
    outputs = pl.when(free).then(0.0).otherwise(outputs)
    return rows.with_columns(
        (pl.when(free).then(0.0).otherwise(inputs) + outputs).alias("cost"),
        pl.when(estimated_output()).then(outputs).otherwise(0.0).alias("cost_estimated"),
    )


def completion(loaded: Loaded) -> str:
    """What ``completed`` means of a session here: a recording knows its task's outcome, a run only its own answers."""
    return "the task's recorded outcome" if loaded.kind == "recording" else "every planned call was answered"


def cost(loaded: Loaded, prices: Prices) -> dict[str, Any]:
    """What a completed task cost: money of all calls of sessions with known outcome over the sessions completed.

    None where none completed, or where any of those calls has no known cost; what is missing is named and counted.
    """
    table = _table(loaded.scan, prices)
    rows = priced(loaded.scan, table)
    calls = collect(rows.select("session_no", "completed", "cost", "cost_estimated"))
    # In the order of the rows, and then exactly: the last digit of a sum of floats is as it was added up.
    sums, nulls = pl.col("cost", "cost_estimated").sum(), pl.col("cost").null_count()
    by_session = calls.group_by("session_no", maintain_order=True)
    sessions = by_session.agg(pl.col("completed").min(), sums, without=nulls)
    known = sessions.filter(pl.col("completed").is_not_null())
    done = known.filter("completed").height
    spent = fsum(known["cost"]) if known.height and not known["without"].sum() else None
    without = int(sessions["without"].sum())
    return {
        "cost_per_completed_task": spent / done if done and spent is not None else None,
        "completed_means": completion(loaded),
        "sessions_known": known.height,
        "sessions_completed": done,
        "sessions_without_cost": sessions.filter(pl.col("without") > 0).height,
        "calls_without_cost": without,
        "unpriced": unpriced(rows, table) if without else {},
        "models_without_price": ["unknown" if model is None else model for model, told in table.items() if not told],
        "money": spent,
        "money_of_priced_calls": fsum(sessions["cost"]) if without < calls.height else None,
        "output_est_share": fsum(known["cost_estimated"]) / spent if spent else None,
        "prices_date": prices.date,
        "prices_source": prices.source,
        **_gpu_cost(loaded, done, prices),
    }


def _gpu_cost(loaded: Loaded, done: int, prices: Prices) -> dict[str, Any]:
    """GPU-hours of the run's wall time, their money, and that per completed task; None where no price is known.

    A simulated run's time is virtual, nobody's GPU was at work: it counts only where the step times of a hardware, or
    measured ones, made it. A hardware's own price is the one that is not given.
    """
    cluster = loaded.told("cluster")
    real = loaded.about.get("mode") != "simulate" or bool({"hardware", "times"} & set(cluster))
    price = cluster.get("gpu_hour_usd") if prices.gpu_hour_usd is None else prices.gpu_hour_usd
    wall = (pl.col("done_ns").max() - pl.col("due_ns").min()) / 3.6e12
    if price is None or loaded.kind != "run" or not real or (hours := collect(loaded.scan.select(wall)).item()) is None:
        return dict.fromkeys(("gpu_hours", "gpu_money", "gpu_cost_per_completed_task"))
    hours *= prices.gpus or cluster.get("gpus") or 1
    task = hours * price / done if done else None
    return {"gpu_hours": hours, "gpu_money": hours * price, "gpu_cost_per_completed_task": task}
