"""The part of replay.py about reports: very many outcome rows, as a run has them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from replay_clients import KEEPWARM, Client
from replay_costs import bar
from replay_traces import Shape, calls, write

from keepwarm.replayers import run as runs
from keepwarm.traces.journal import OUTCOMES
from keepwarm.traces.sink import ParquetSink
from keepwarm.traces.store import ROWS_PER_BATCH, read_outcome_table, write_batches

NAMES = ("session", "agent", "call")
TOKENS = 8


def renamed(table: pa.Table, number: int) -> pa.Table:
    """A run's rows under other names of sessions, agents and calls."""
    for name in NAMES:
        if name in table.column_names:
            other = pc.binary_join_element_wise(pa.scalar(f"r{number}"), table.column(name), "-")
            table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), other)
    return table


def multiply(run: Path, out: Path, rows: int) -> int:
    """A run of so many rows and bounds, those of another again and again; how many it has."""
    out.mkdir()
    table, bounds = read_outcome_table(str(run / OUTCOMES)), pq.read_table(run / runs.BOUNDS)
    times: int = -(-rows // table.num_rows)
    tables = (renamed(table, number).combine_chunks() for number in range(times))
    write_batches(str(out / OUTCOMES), (batch for each in tables for batch in each.to_batches(ROWS_PER_BATCH)))
    with ParquetSink(str(out / runs.BOUNDS), runs.BOUNDS_SCHEMA, b"keepwarm.bounds") as beside:
        for number in range(times):
            for batch in renamed(bounds, number).combine_chunks().to_batches():
                beside.write(batch)
    shutil.copy(run / runs.ABOUT, out / runs.ABOUT)
    return times * int(table.num_rows)


def report(client: Client, rows: int) -> list[str]:
    """`keepwarm report` on so many rows with the times of eight tokens each."""
    client.server.pace(0, 0.001)
    trace = write(client.machine.scratch / "rows.parquet", calls(Shape(2_000, 40, output=TOKENS)))
    _, small = client.replay(trace, "--sessions", "64")
    run = client.machine.scratch / "many"
    made = multiply(small, run, rows)
    size = sum(file.stat().st_size for file in run.iterdir()) / 1e6
    ran = client.watch([*KEEPWARM, "report", str(run), "--json"], pinned=False)
    shutil.rmtree(run)
    if ran.code:
        raise RuntimeError(f"report: exit {ran.code}: {ran.said[-500:]}")
    print(f"report of {made:,} rows ({size:,.0f} MB): {ran.wall_s:.1f} s, {ran.cpu_s:.1f} s CPU, {ran.rss_mb:,.0f} MB")
    return [
        bar(f"seconds to report {made:,} rows", ran.wall_s, "<=", 15, "s"),
        bar("memory of that", ran.rss_mb, "<=", 2000, "MB"),
    ]
