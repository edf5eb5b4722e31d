"""A recording and the transcripts of the same sessions as one trace: the calls and prompts as the recorder saw them,
the tools' times as the client logged them. On the wire a tool's result is only seen with the next request.
"""

from keepwarm.traces.errors import InputError
from keepwarm.traces.model import After, Call, ToolUse
from keepwarm.traces.store import TraceWriter, read_calls, read_meta


def join_traces(recording: str, transcript: str, out: str, *, version: str) -> tuple[int, int]:
    """Write the recording's calls with the transcript's tool times; how many calls there are, and in both.

    InputError where they have no call in common: identities agree only under the same salt.
    """
    logged = {call.call: call for call in read_calls(transcript)}
    both = 0
    notes = {**read_meta(recording).notes, "joined": True}
    with TraceWriter(out, producer="record", version=version, tokens="reported", notes=notes) as writer:
        for call in read_calls(recording):
            log = logged.get(call.call)
            both += log is not None
            writer.add(call if log is None else _joined(call, log))
        if not both:
            raise InputError(f"{recording}: has no call of these transcripts: make both with the same --salt-file")
    return writer.calls, both


def _joined(call: Call, log: Call) -> Call:
    tools = call.tools
    if [tool.name for tool in tools] == [tool.name for tool in log.tools]:
        tools = tuple(_timed(call, log, *pair) for pair in zip(tools, log.tools, strict=True))
    return call._replace(
        tools=tools,
        after=_edges(call, log),
        agent_type=call.agent_type or log.agent_type,
        miss_reason=call.miss_reason or log.miss_reason,
    )


def _timed(call: Call, log: Call, tool: ToolUse, told: ToolUse) -> ToolUse:
    """A tool use with the time it took by the client's log, told from the answer's end on either clock."""
    if told.start_ns is None or told.duration_ns is None:
        return tool
    start_ns = max(call.end_ns + told.start_ns - log.end_ns, call.start_ns)
    error = tool.is_error if told.is_error is None else told.is_error
    return tool._replace(start_ns=start_ns, duration_ns=told.duration_ns, is_error=error)


def _edges(call: Call, log: Call) -> tuple[After, ...]:
    """The edges with the tools' own times; the one that was satisfied last has the wait that was observed."""
    told = {edge.call: edge.gap_ns for edge in log.after}
    seen = call.gap_ns, call.gap_kind
    last = next((at for at, edge in enumerate(call.after) if (edge.gap_ns, edge.kind) == seen), None)
    return tuple(
        edge if at == last else edge._replace(gap_ns=min(told.get(edge.call, edge.gap_ns), edge.gap_ns))
        for at, edge in enumerate(call.after)
    )
