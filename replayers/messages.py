"""The Anthropic Messages dialect: bodies to send and streams to read."""

from typing import Any

from keepwarm.replayers import sse
from keepwarm.replayers.blocks import Block
from keepwarm.replayers.dialect import Dialect
from keepwarm.replayers.sse import fault, part, string

HOUR_S = 3600


def headers(key: str | None) -> dict[str, str]:
    """What the API wants in every request; ``key`` None for an endpoint that asks for none."""
    return {"anthropic-version": "2023-06-01"} | ({"x-api-key": key} if key else {})


_PLACES = {"tool": "tools", "system": "system", "answer": "assistant", "use": "assistant"}
_PLACES |= {"user": "user", "result": "user"}
_LISTS = ("tools", "system")


def fragment(before: str, block: Block) -> bytes:
    """A content block but for its mark and its end, with the end of the one of the role ``before``.

    A prompt that grew from another has the other's bytes from ``tools`` on up to where they part, but for cache_control
    marks, which move from call to call and stand behind their block's text.
    """
    last, place = _PLACES.get(before), _PLACES[block.role]
    if last == place:
        return b"}," + _content(block)
    closing = b"" if last is None else b"}]" if last in _LISTS else b"}]},"
    if place in _LISTS:
        return closing + b',"' + place.encode() + b'":[' + _content(block)
    opening = b',"messages":[' if last is None or last in _LISTS else b""
    return closing + opening + b'{"role":"' + place.encode() + b'","content":[' + _content(block)


def end(before: str) -> bytes:
    """What closes the last block, of that role, and the body."""
    return b"}]}" if _PLACES.get(before) in _LISTS else b"}]}]}" if before else b',"messages":[]}'


def mark(ttl_s: int) -> bytes:
    """What has the prompt up to a block cached."""
    hour = b',"ttl":"1h"' if ttl_s == HOUR_S else b""
    return b',"cache_control":{"type":"ephemeral"' + hour + b"}"


def _content(block: Block) -> bytes:
    """A block but for its mark and its end."""
    name = block.name.encode()
    if block.role == "tool":
        schema = b'","input_schema":{"type":"object","properties":{"text":{"type":"string"}}}'
        return b'{"name":"' + name + b'","description":"' + block.text + schema
    if block.role == "use":
        return b'{"type":"tool_use","id":"' + name + b'","name":"a0a0","input":{"text":"' + block.text + b'"}'
    if block.role == "result":
        return b'{"type":"tool_result","tool_use_id":"' + name + b'","content":"' + block.text + b'"'
    return b'{"type":"text","text":"' + block.text + b'\\n"'  # servers join blocks with nothing between them


class Reader(sse.Reader):
    """Takes in an answer of the Messages API."""

    _started: dict[str, Any] = {}

    def take(self, event: dict[str, Any], now_ns: int) -> None:
        """One event. ``message_start`` holds an estimate, which is no usage unless the final event comes."""
        kind = event.get("type")
        if kind == "content_block_delta":
            delta = part(event, "delta")
            if delta.get("type") != "signature_delta":
                self.heard.token(now_ns, delta.get("text"))
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
        for block in body.get("content") or ():
            self.heard.says(part({"block": block}, "block").get("text"))


MESSAGES = Dialect(
    "/v1/messages", fragment, end, Reader, headers, "ANTHROPIC_API_KEY", no_tool={"type": "none"}, mark=mark
)
