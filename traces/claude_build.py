"""The second pass of an import: sessions built out of their streams and packed for the trace, some at a time.

This is what worker processes do, so it takes and gives plain values.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

from keepwarm.traces.claude_files import LeadKey, StreamKey, stream_key
from keepwarm.traces.claude_prompts import AgentPrompt
from keepwarm.traces.columns import Packed, pack
from keepwarm.traces.identity import Identity
from keepwarm.traces.model import Call
from keepwarm.traces.sessions import SessionBuilder
from keepwarm.traces.steps import Step, Stream


class Waiting(NamedTuple):
    """A session to be built: its pseudonym, its start since the trace's, and its streams, pickled."""

    session: str
    start_ns: int
    streams: Sequence[bytes]


def build_sessions(
    sessions: Sequence[Waiting],
    *,
    salt: bytes,
    leads: Mapping[LeadKey, int],
    tellers: Mapping[str, StreamKey],
    informed: bool,
    flow: str | None,
) -> tuple[Packed | None, Counter[str]]:
    """Build some sessions that follow one another in trace order; None for a pack without a call, and what was noticed.
    ``tellers`` names the stream that tells a message, where several hold it.
    """
    calls: list[Call] = []
    noticed: Counter[str] = Counter()

    def owns(stream: Stream, step: Step) -> bool:
        teller = tellers.get(step.id)
        return teller is None or teller == stream_key(stream)

    prompts = partial(AgentPrompt, Identity(salt), leads, informed, noticed)
    for session, start_ns, pickled in sessions:
        builder = SessionBuilder(session, owns, prompts, flow, "transcript", noticed)
        built = builder.build(list(map(pickle.loads, pickled)), start_ns)
        noticed["sessions"] += bool(built)
        calls += built
    noticed["new_tokens"] = sum(segment.tokens for call in calls for segment in call.append)
    return pack(calls) if calls else None, noticed
