"""Calibration is the step-time model of a worker, fitted to a measured run.

While a worker is busy its steps add up to the time that passes: their number x ``fixed_s``, the prompt tokens they
compute x ``prefill_s``, the tokens they generate x ``decode_s`` and the KV tokens read for those x ``kv_s``. Two kinds
of stretches are known well enough to count all four: a call's decoding, one step a token, and the first token of a
call that found its worker idle, where ``call_s`` comes on top.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from keepwarm.reports.about import read_about
from keepwarm.reports.frame import Loaded, time_scale
from keepwarm.traces.errors import InputError
from keepwarm.traces.journal import OUTCOMES
from keepwarm.traces.shipped import shipped
from keepwarm.traces.store import read_outcome_table

_DATA = shipped("keepwarm.reports", "step_times.toml")
PARTS = _DATA["parts"]
"""Of the model, those that others come before where they cannot be told apart last."""
COLUMNS = ["worker", "sent_ns", "first_token_ns", "last_token_ns", "done_ns", "prompt", "cache_read", "output", "error"]
FORMAT, LEAST, EVERY, ROUNDS = 1, 20, 5, 5
HUBER, COLLINEAR, RIDGE, TINY, FLOOR = 1.5, 1e6, 1e-12, 1e-30, 1e-3
Parts = dict[str, float | None]
Told = Callable[[int, int | None], None]


def calls_of(path: str) -> pl.DataFrame:
    """A run's answered calls whose times and tokens are known, in the order sent; in its endpoint's seconds."""
    where = Path(path) / OUTCOMES
    if not where.is_file():
        raise InputError(f"{path}: not a run: it has no {OUTCOMES}")
    rows = pl.DataFrame(read_outcome_table(str(where), COLUMNS))
    about = read_about(str(where.with_name("run.json")))
    answered = rows.filter(pl.col("error").is_null() & pl.col("sent_ns").is_not_null())
    for name, why in _DATA["needs"].items():
        if not answered[name].count():
            raise InputError(f"{path}: {why}")
    scale = time_scale(Loaded("run", path, path, rows.lazy(), about, None, rows.lazy())) / 1e9
    calls = answered.select(
        pl.col("worker").fill_null(""),
        sent=pl.col("sent_ns") * scale,
        first=pl.col("first_token_ns") * scale,
        last=pl.coalesce("last_token_ns", "done_ns") * scale,
        computed=pl.col("prompt") - pl.col("cache_read"),
        prompt="prompt",
        output="output",
    ).drop_nulls()
    calls = calls.filter((pl.col("computed") > 0) & (pl.col("output") > 0)).sort("sent", "first", "last")
    if calls.height < LEAST:
        raise InputError(f"{path}: {calls.height} calls with times and token counts, expected at least {LEAST}")
    if not (calls["first"] > calls["sent"]).any():
        raise InputError(f"{path}: its calls took no time: it was simulated without service times")
    return calls.with_row_index("call")


def stretches(calls: pl.DataFrame, prefill_s: float, batched: int) -> pl.DataFrame:
    """What is known to have happened in each stretch, a column a part of the model, and how long it ``took``. Prompt
    tokens are computed at most ``batched`` a step, ``prefill_s`` each if that is right.
    """
    return pl.concat([_of_worker(own, prefill_s, batched) for own in calls.partition_by("worker", maintain_order=True)])


def _of_worker(calls: pl.DataFrame, prefill_s: float, batched: int) -> pl.DataFrame:
    begun, ended, done = _computed(calls, prefill_s)
    computing, busy = _running(begun, ended, done), _running(begun, ended, ended - begun)
    # Answers come evenly by a clock that stands still while prompts are computed.
    first, last = (calls[name] - _upto(busy, calls[name]) for name in ("first", "last"))
    tokens = calls["output"] - 1
    generated = _running(first, last, tokens)
    read = _running(first, last, tokens * (calls["prompt"] + calls["output"] / 2))
    decoding = calls.select(
        "call",
        kind=pl.lit("itl"),
        took=pl.col("last") - pl.col("first"),
        fixed_s=tokens.cast(pl.Float64),
        prefill_s=_upto(computing, calls["last"]) - _upto(computing, calls["first"]),
        decode_s=_upto(generated, last) - _upto(generated, first),
        kv_s=_upto(read, last) - _upto(read, first),
    )
    idle = pl.col("last").cum_max().shift(1, fill_value=-1.0) < pl.col("sent")
    alone = idle & (pl.col("sent").shift(-1, fill_value=math.inf) > pl.col("first"))
    firsts = calls.filter(alone).select(
        "call",
        kind=pl.lit("ttft"),
        took=pl.col("first") - pl.col("sent"),
        fixed_s=(pl.col("computed") / batched).ceil(),
        prefill_s=pl.col("computed").cast(pl.Float64),
        call_s=1.0,
    )
    both = pl.concat([decoding, firsts], how="diagonal").fill_null(0.0)
    return both.filter((pl.col("took") > 0) & (pl.col("fixed_s") > 0))


def _computed(calls: pl.DataFrame, prefill_s: float) -> tuple[pl.Series, pl.Series, pl.Series]:
    """When each prompt was computed, from, to, and its tokens: one after the other, each done by its first token."""
    order = calls.sort("first", descending=True)
    begun, ended, edge = [], [], math.inf
    for sent, first, computed in order.select("sent", "first", "computed").iter_rows():
        ended.append(min(first, edge))
        edge = max(ended[-1] - computed * prefill_s, min(sent, ended[-1]))
        begun.append(edge)
    return pl.Series(begun), pl.Series(ended), order["computed"]


def _running(start: pl.Series, end: pl.Series, amount: pl.Series) -> pl.DataFrame:
    """The running total of amounts that are each done evenly from start to end: the total at times, the rate then."""
    spans = pl.DataFrame({"start": start, "end": end, "amount": amount.cast(pl.Float64)})
    spans = spans.filter(pl.col("end") > pl.col("start"))
    rate = pl.col("amount") / (pl.col("end") - pl.col("start"))
    nothing = pl.DataFrame({"at": [-math.inf], "rate": [0.0]})
    edges = pl.concat([nothing, spans.select(at="start", rate=rate), spans.select(at="end", rate=-rate)])
    edges = edges.sort("at").with_columns(pl.col("rate").cum_sum())
    gone = pl.when(pl.col("at").shift(1).is_finite()).then(pl.col("at").diff()).otherwise(0.0)
    return edges.with_columns(total=(gone * pl.col("rate").shift(1)).fill_null(0.0).cum_sum())


def _upto(running: pl.DataFrame, at: pl.Series) -> pl.Series:
    before = running[running["at"].search_sorted(at, side="right") - 1]
    since = pl.when(before["at"].is_finite()).then(at - before["at"]).otherwise(0.0)
    return before["total"] + before["rate"] * pl.select(since).to_series()


def fit(rows: pl.DataFrame) -> Parts:
    """The parts of the model that explain the stretches best, none below 0; None where they do not tell.

    A stretch weighs as the sum of so many steps' times scatters; one that is far off (the machine paused) weighs less.
    """
    parts = [name for name in PARTS if rows[name].max()]
    while True:
        values, errors = _robust(rows, parts)
        weak = [name for name in parts if values[name] <= 2 * errors[name]]
        if not weak or len(parts) == 1:
            return {name: values.get(name) for name in PARTS}
        parts.remove(min(reversed(weak), key=lambda name: values[name] / errors[name]))


def _robust(rows: pl.DataFrame, parts: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Least squares again and again, each time with less weight on what the last one left far off; and standard errors,
    endless where one part moves with the others.
    """
    steps = pl.col("fixed_s").sqrt()
    weight, trust = 1.0 / steps, pl.lit(1.0)
    columns = [*parts, "took"]
    products = [(a, b) for a in columns for b in columns]
    values: dict[str, float] = {}
    for _ in range(ROUNDS):
        each = weight.pow(2) * trust
        sums = rows.select(**{f"{a} {b}": (pl.col(a) * pl.col(b) * each).sum() for a, b in products}).row(0)
        values, inverse = _least(parts, [list(sums[i : i + len(columns)]) for i in range(0, len(sums), len(columns))])
        told = pl.sum_horizontal(pl.col(name) * values[name] for name in parts)
        weight = steps / pl.max_horizontal(told, pl.col("took") * FLOOR)
        off = (weight * (pl.col("took") - told)).abs()
        spread = rows.select(off.median()).item() * 1.4826
        trust = (HUBER * spread / off.clip(TINY)).clip(TINY, 1.0)
    return values, {name: spread * each for name, each in zip(parts, inverse, strict=True)}


def _least(parts: list[str], sums: list[list[float]]) -> tuple[dict[str, float], list[float]]:
    """The values that leave least, from the sums of products (the last row and column are of what is explained); and
    the root of the inverse's diagonal.
    """
    scale = [row[i] ** 0.5 for i, row in enumerate(sums)]
    unit = [[each / (scale[i] * scale[j]) for j, each in enumerate(row)] for i, row in enumerate(sums[:-1])]
    inverse = _inverse([[each + RIDGE * (i == j) for j, each in enumerate(row[:-1])] for i, row in enumerate(unit)])
    best = [sum(each * row[-1] for each, row in zip(inner, unit, strict=True)) for inner in inverse]
    spread = [row[i] for i, row in enumerate(inverse)]
    errors = [each**0.5 / scale[i] if 0 < each < COLLINEAR else math.inf for i, each in enumerate(spread)]
    return {name: best[i] * scale[-1] / scale[i] for i, name in enumerate(parts)}, errors


def _inverse(matrix: list[list[float]]) -> list[list[float]]:
    """The inverse of a small positive definite matrix, by elimination."""
    rows = [[*row, *(float(i == j) for j in range(len(matrix)))] for i, row in enumerate(matrix)]
    for i, pivot in enumerate(rows):
        pivot[:] = [each / pivot[i] for each in pivot]
        for other in rows:
            if other is not pivot:
                other[:] = [a - other[i] * b for a, b in zip(other, pivot, strict=True)]
    return [row[len(matrix) :] for row in rows]


def calibrate(path: str, batched: int, told: Told = lambda done, total: None) -> dict[str, Any]:
    """A run's fitted step times as a file of times has them, and under ``fitted`` what they rest on: every fifth call
    is left out of the fit, to say how far off it is. ``told`` hears how much of the work is done.
    """
    calls = calls_of(path)
    long = calls.filter(pl.col("computed") >= pl.col("computed").median())
    prefill_s = long.select(((pl.col("first") - pl.col("sent")) / pl.col("computed")).quantile(0.1)).item()
    for done in range(ROUNDS):
        told(done, ROUNDS)
        rows = stretches(calls, prefill_s, batched)
        parts = fit(rows.filter(pl.col("call") % EVERY > 0))
        prefill_s = parts["prefill_s"] or prefill_s
    used, held = rows.filter(pl.col("call") % EVERY > 0), rows.filter(pl.col("call") % EVERY == 0)
    expected = pl.sum_horizontal(pl.col(name) * (value or 0.0) for name, value in parts.items())
    held = held.with_columns(off=(expected / pl.col("took") - 1).abs())
    fitted = {
        "run": path,
        "calls": calls.height,
        "workers": calls["worker"].n_unique(),
        "batched": batched,
        **{kind: _errors(used, held, kind) for kind in ("itl", "ttft")},
        "not_identified": {name: PARTS[name]["missing"] for name, value in parts.items() if value is None},
    }
    return {"format": FORMAT, **parts, "fitted": fitted}


def _errors(used: pl.DataFrame, held: pl.DataFrame, kind: str) -> dict[str, Any]:
    """How many stretches of a kind were used, how many held out, and the relative error of these."""
    off = held.filter(pl.col("kind") == kind)["off"]
    return {
        "used": used.filter(pl.col("kind") == kind).height,
        "held_out": off.len(),
        "error_p50": off.median(),
        "error_p90": off.quantile(0.9, "linear"),
    }
