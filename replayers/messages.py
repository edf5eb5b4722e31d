"""The Anthropic Messages dialect: bodies to send, token accounts and streams to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from keepwarm.replayers import sse
from keepwarm.replayers.endpoint import Piece, Request
from keepwarm.replayers.sse import count, fault, part, string
from keepwarm.replayers.text import PromptText, roles
from keepwarm.traces.model import Breakpoint

PATH = "/v1/messages"
KEY_ENV = "ANTHROPIC_API_KEY"
HOUR_S = 3600
MARKS = 4
"""How many cache_control marks the API takes."""


def headers(key: str | None) -> dict[str, str]:
    """What the API wants in every request; ``key`` None for an endpoint that asks for none."""
    return {"anthropic-version": "2023-06-01"} | ({"x-api-key": key} if key else {})


def body(
    request: Request, *, text: PromptText, model: str, stream: bool = True, extra: Mapping[str, Any] | None = None
) -> bytes:
    """A request body: parameters (and ``extra`` ones) first, then the prompt, one text block a piece.

    A prompt that grew from another has the other's bytes from ``system`` on up to where they part, but for
    cache_control marks, which move from call to call and stand behind their block's text.
    """
    prompt = [piece for piece in request.prompt if piece.tokens]
    marks = _marked(prompt, request.call.breakpoints)
    head = {"model": model, "max_tokens": request.output or 1, "stream": stream, **(extra or {})}
    out = [orjson.dumps(head)[:-1]]
    before = None
    for index, (piece, role) in enumerate(zip(prompt, roles(prompt), strict=True)):
        out.append(b"," if role == before else _turn(before, role))
        out += (b'{"type":"text","text":"', text.fragment(piece), b'"', marks.get(index, b""), b"}")
        before = role
    out.append(b"]}]}" if before else b',"messages":[]}')
    return b"".join(out)


def _turn(before: str | None, role: str) -> bytes:
    """What stands between the last block of one role and the first of the next."""
    if role == "system":
        return b',"system":['
    closing = {None: b',"messages":[', "system": b'],"messages":['}.get(before, b"]},")
    return closing + b'{"role":"' + role.encode() + b'","content":['


def _marked(prompt: Sequence[Piece], breakpoints: Sequence[Breakpoint]) -> dict[int, bytes]:
    """The cache_control of each marked block: that which holds the breakpoint's last token, or else the last one."""
    marks: dict[int, int] = {}
    index, end = 0, prompt[0].tokens if prompt else 0
    for mark in sorted(breakpoints):
        while end < mark.at and index + 1 < len(prompt):
            index += 1
            end += prompt[index].tokens
        if mark.at > 0 and prompt:
            marks[index] = max(mark.ttl_s, marks.get(index, 0))
    hour, usual = b',"cache_control":{"type":"ephemeral","ttl":"1h"}', b',"cache_control":{"type":"ephemeral"}'
    return {index: hour if ttl_s == HOUR_S else usual for index, ttl_s in list(marks.items())[-MARKS:]}


def usage(told: Mapping[str, Any] | None) -> dict[str, Any]:
    """The API's token account in outcome columns. ``input_tokens`` are those after the last mark; what was not reported
    is None, and stands in the sum ``prompt`` as nothing.
    """
    rest = count(told.get("input_tokens")) if told else None
    if told is None or rest is None:
        return {"usage_source": "absent", "write_source": "absent"}
    read, written = count(told.get("cache_read_input_tokens")), count(told.get("cache_creation_input_tokens"))
    split = part(told, "cache_creation")
    short, long = count(split.get("ephemeral_5m_input_tokens")), count(split.get("ephemeral_1h_input_tokens"))
    known = (short or 0) + (long or 0)
    if written is None and (short is not None or long is not None):
        written = known
    elif written is not None and written < known:
        short = long = None
        known = 0
    return {
        "prompt": rest + (read or 0) + (written or 0),
        "uncached": None if read is None else rest,
        "cache_read": read,
        "cache_write_5m": short,
        "cache_write_1h": long,
        "cache_write_other": None if written is None else written - known,
        "write_ttl_s": HOUR_S if long else 300 if short else None,
        "output": count(told.get("output_tokens")),
        "reasoning": count(part(told, "output_tokens_details").get("thinking_tokens")),
        "usage_source": "reported",
        "write_source": "reported" if written is not None else "inferred" if read is not None else "absent",
    }


class Reader(sse.Reader):
    """Takes in an answer of the Messages API."""

    def __init__(self) -> None:
        super().__init__()
        self._started: dict[str, Any] = {}

    def take(self, event: dict[str, Any], now_ns: int) -> None:
        """One event. ``message_start`` holds an estimate, which is no usage unless the final event comes."""
        kind = event.get("type")
        if kind == "content_block_delta":
            if part(event, "delta").get("type") != "signature_delta":
                self.heard.token_ns.append(now_ns)
        elif kind == "message_start":
            self._started = part(part(event, "message"), "usage")
        elif kind == "message_delta":
            final = {name: value for name, value in part(event, "usage").items() if value is not None}
            self.heard.usage = {**self._started, **final} if final else None
            self.heard.stop_reason = string(part(event, "delta").get("stop_reason"))
        elif kind == "message_stop":
            self.heard.finished = True
        elif kind == "error":
            self.heard.fault = fault(event)

    def take_whole(self, body: dict[str, Any]) -> None:
        """The whole of it."""
        self.heard.usage = part(body, "usage") or None
        self.heard.stop_reason = string(body.get("stop_reason"))
        self.heard.finished = body.get("type") == "message"
