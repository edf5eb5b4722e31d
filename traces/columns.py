"""Rows to Arrow columns and back: named tuples on one side, the schemas' lists of structs on the other."""

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from operator import attrgetter
from typing import Any, NamedTuple, get_args, get_type_hints

import orjson
import pyarrow as pa

from keepwarm.traces import schema
from keepwarm.traces.model import Call, Outcome

MADE_OF = {
    name: kind for name, hint in get_type_hints(Call).items() for kind in get_args(hint) if hasattr(kind, "_fields")
}
"""What the columns hold that are structs, or lists of them."""

Order = tuple[int, str, int, str]

MEASURED_NAMES = {field.name for field in schema.MEASURED}


class Packed(NamedTuple):
    """Calls that follow one another in trace order, ready to be written: their columns, their content for the digest,
    and the places in trace order of the first and the last of them.
    """

    batch: pa.RecordBatch
    content: bytes
    first: Order
    last: Order


def order_of(call: Call) -> Order:
    """A call's place in trace order."""
    return call.session_start_ns or 0, call.session, call.start_ns, call.call


FIRST_FIELDS = Call._fields.index("completed") + 1
ADDED_DEFAULTS = tuple(Call._field_defaults[name] for name in Call._fields[FIRST_FIELDS:])


def content(call: Call) -> bytes:
    """A call for the digest. Columns that version 1 did not have at first count only where they hold something: the
    digest of a trace without them stays what it was.
    """
    return orjson.dumps(call[:FIRST_FIELDS] if call[FIRST_FIELDS:] == ADDED_DEFAULTS else call, default=tuple)


def pack(calls: Sequence[Call]) -> Packed:
    """Pack calls, at least one. ValueError where one does not follow the one before it in trace order."""
    for one, other in pairwise(calls):
        if order_of(one) >= order_of(other):
            raise ValueError(f"call {other.call} does not follow {one.call} in trace order")
    columns = list(map(pa.array, zip(*calls, strict=True), schema.TRACE.types))
    batch = pa.RecordBatch.from_arrays(columns, schema=schema.TRACE)
    return Packed(batch, b"".join(map(content, calls)), order_of(calls[0]), order_of(calls[-1]))


def _place(name: str) -> str:
    """Where an outcome has a column's value."""
    planned = {"planned_prompt": "call.prompt_tokens", "planned_keep": "call.keep"}
    return planned.get(name) or (name if name in MEASURED_NAMES else "call." + name.removeprefix("rec_"))


outcome_row = attrgetter(*map(_place, schema.OUTCOMES.names))
"""An outcome's values in the order of its schema."""


def outcomes_to_batch(outcomes: Sequence[Outcome]) -> pa.RecordBatch:
    """Outcomes, at least one, as one record batch of the outcome schema."""
    return rows_to_batch(schema.OUTCOMES.names, list(map(outcome_row, outcomes)))


def rows_to_batch(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> pa.RecordBatch:
    """Rows of outcomes, at least one, whose values are those of the named columns; columns not named are null."""
    told, nothing = dict(zip(names, zip(*rows, strict=True), strict=True)), (None,) * len(rows)
    arrays = [pa.array(told.get(field.name, nothing), field.type) for field in schema.OUTCOMES]
    return pa.RecordBatch.from_arrays(arrays, schema=schema.OUTCOMES)


def _read_column(name: str, column: pa.Array) -> list[Any]:
    make = MADE_OF.get(name)
    if make is None:
        values: list[Any] = column.to_pylist()
        return values
    if not pa.types.is_list(column.type):
        return [None if row is None else make(**row) for row in column.to_pylist()]
    rows = map(make, *(values.to_pylist() for values in column.flatten().flatten()))
    return [tuple(islice(rows, length or 0)) for length in column.value_lengths().to_pylist()]


def batch_to_calls(batch: pa.RecordBatch) -> Iterator[Call]:
    """The calls of a record batch that has every column of the trace schema, in its order."""
    return map(Call, *(_read_column(name, batch.column(name)) for name in Call._fields))
