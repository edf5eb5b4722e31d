"""Hints and identity: what tells a server whose a call is and how it may be treated."""

from typing import Any

from keepwarm.traces.model import Call

PRIORITIES = {"interactive": 10, "background": 0}
"""Derived priorities: someone waits for an interactive call."""


def nvext(call: Call, output: int | None, hinting: str) -> dict[str, Any]:
    """Dynamo's field for a call's hints: none, those recorded, or those that its trace lets one derive: priority by
    flow, the output's length, and a warm-up of the next turn where the answer asks for tools.
    """
    hints: dict[str, Any] = {}
    if hinting == "recorded" and call.hints is not None:
        hints = {name: value for name, value in call.hints._asdict().items() if value is not None and name != "ttl_s"}
    elif hinting == "derived":
        hints = {"priority": PRIORITIES[call.flow]} if call.flow in PRIORITIES else {}
        hints |= {"osl": output} if output else {}
        hints |= {"speculative_prefill": True} if call.tools else {}
    return {"agent_hints": hints} if hints else {}


TELL_WORKER = {"extra_fields": ["worker_id"]}
"""The field of ``nvext`` that makes Dynamo tell which worker answered."""


def session_headers(dialect: str, call: Call, copy: int, salt: str) -> dict[str, str]:
    """Whose a call is, in the headers that Claude Code sends with messages, and Dynamo's own with other dialects; under
    names of this run's own.
    """
    session = f"{salt}{call.session}-{copy}"
    agent, inner = f"{session}-{call.agent}", call.role != "main"
    if dialect == "messages":
        return {"x-claude-code-session-id": session} | ({"x-claude-code-agent-id": agent} if inner else {})
    if inner:
        return {"x-dynamo-session-id": agent, "x-dynamo-parent-session-id": session}
    return {"x-dynamo-session-id": session}
