"""docs/format.md says what the schema says."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest

from keepwarm.traces import schema
from keepwarm.traces.model import After, Attempt, Breakpoint, Hints, PrefixBreak, Segment, ToolUse

DOC = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| .+ \|$", re.MULTILINE)
BEFORE_STRUCTS, _, REST = DOC.partition("### after")
OUTCOME_PART = DOC.partition("## Outcomes")[2].partition("### attempt")[0]
STRUCTS = {
    "after": schema.struct_of(After),
    "segment": schema.struct_of(Segment),
    "breakpoint": schema.struct_of(Breakpoint),
    "tool": schema.struct_of(ToolUse),
    "prefix_break": schema.struct_of(PrefixBreak),
    "hints": schema.struct_of(Hints),
    "attempt": schema.struct_of(Attempt),
}


def said(kind: pa.DataType) -> str:
    """A type as the document writes it."""
    names = [name for name, struct in STRUCTS.items() if kind == struct]
    if names:
        return f"[{names[0]}](#{names[0]})"
    return f"list of {said(kind.value_type)}" if pa.types.is_list(kind) else str(kind)


def rows(fields: list[pa.Field]) -> dict[str, str]:
    """What the document's tables should say of these fields."""
    return {field.name: said(field.type) + "?" * field.nullable for field in fields}


def test_every_column_of_a_trace_is_told() -> None:
    """The tables of the trace's columns hold every column with its type, and no other."""
    assert dict(ROW.findall(BEFORE_STRUCTS)) == rows(list(schema.TRACE))


@pytest.mark.parametrize("name", STRUCTS)
def test_every_field_of_a_struct_is_told(name: str) -> None:
    """A struct's section holds every field with its type, and no other."""
    section = DOC.partition(f"### {name}\n")[2].partition("\n#")[0]
    kind = STRUCTS[name]
    assert dict(ROW.findall(section)) == rows([kind.field(i) for i in range(kind.num_fields)])


def test_every_column_of_an_outcome_is_told() -> None:
    """Outcome columns stand in the table with their type, or in the text where they repeat the trace's."""
    table = dict(ROW.findall(OUTCOME_PART))
    repeated = {*schema.DESCRIPTIVE, *(f"rec_{name}" for name in schema.RECORDED)}
    assert table == rows([field for field in schema.OUTCOMES if field.name not in repeated])
    assert repeated <= set(re.findall(r"`(\w+)`", OUTCOME_PART))
