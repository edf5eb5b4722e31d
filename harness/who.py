"""Whose a request is, as its headers and body say: the session, agent and parent of the clients that tell."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from keepwarm.harness.bodies import json_object
from keepwarm.replayers.sse import part, string
from keepwarm.traces.identity import Identity
from keepwarm.traces.threads import Who

Headers = Mapping[str, str]
"""Header values by lower-case name."""


_SESSION = re.compile(r"_session_([0-9a-f-]{36})$")
"""How older Claude Code ended its ``user_id``."""


class Client(NamedTuple):
    """What a client calls its session and agents; empty where it does not tell. ``compacts`` where it says that the
    request is for a summary of the conversation; ``above`` is the session that started this one, where each agent has
    a session of its own.
    """

    session: str = ""
    agent: str = ""
    parent: str = ""
    compacts: bool = False
    above: str = ""


def client(headers: Headers, body: dict[str, Any]) -> Client:
    """The client's own ids, which are not for the disk."""
    get = headers.get
    if session := get("x-claude-code-session-id"):
        return Client(session, get("x-claude-code-agent-id", ""), get("x-claude-code-parent-agent-id", ""))
    if session := get("session-id") or get("session_id"):
        compacts = json_object(get("x-codex-turn-metadata")).get("request_kind") == "compaction"
        thread, parent = get("thread-id", session), get("x-codex-parent-thread-id", "")
        return Client(session, "" if thread == session else thread, "" if parent == session else parent, compacts)
    for name in ("x-dynamo", "x"):
        if session := get(f"{name}-session-id"):
            above = get(f"{name}-parent-session-id", "")
            return Client(session, above="" if above == session else above)
    user = string(part(body, "metadata").get("user_id")) or ""
    named = _SESSION.search(user)
    return Client(string(json_object(user).get("session_id")) or (named[1] if named else ""))


def who(told: Client, identity: Identity, *, compacts: bool) -> Who:
    """The same in pseudonyms. An agent whose parent is told to be another sub-agent is in that one's session."""
    compacts = compacts or told.compacts
    if not told.session:
        return Who(compacts=compacts)
    agent = identity.name("agent", told.session, told.agent)
    if told.above:
        above = identity.name("session", told.above), identity.name("agent", told.above, "")
        return Who(above[0], agent, above[1], "subagent", compacts)
    parent = identity.name("agent", told.session, told.parent) if told.agent else None
    role = "subagent" if told.agent else "main"
    return Who(identity.name("session", told.session), agent, parent, role, compacts)


def flow(headers: Headers) -> str | None:
    """Who waits, by the entrypoint that Claude Code and Codex name in their user agent."""
    agent = headers.get("user-agent", "").lower()
    if not agent.startswith(("claude-cli/", "codex_")):
        return None
    return "background" if "sdk" in agent or agent.startswith("codex_exec") else "interactive"
