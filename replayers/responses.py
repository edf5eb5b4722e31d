"""The OpenAI Responses dialect: bodies to send and streams to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import orjson

from keepwarm.replayers import sse
from keepwarm.replayers.blocks import Block
from keepwarm.replayers.chat import headers, offered
from keepwarm.replayers.sse import fault, part, string

__all__ = ["KEY_ENV", "LIMIT", "NO_TOOL", "PATH", "Reader", "body", "headers"]

PATH = "/v1/responses"
KEY_ENV = "OPENAI_API_KEY"
LIMIT = "max_output_tokens"
NO_TOOL: Any = "none"


def body(head: Mapping[str, Any], blocks: Sequence[Block]) -> bytes:
    """A request body: the parameters of ``head`` first, then the prompt, an item for each answer, use and result, and
    for each run of a user's words. A prompt that grew from another has the other's bytes from ``tools`` on up to where
    they part.
    """
    out, items = [orjson.dumps(head)[:-1]], []
    for role, run in groupby(blocks, lambda block: block.role):
        if role == "tool":
            tools = b",".join(b'{"type":"function","strict":false,' + offered(block) + b"}" for block in run)
            out.append(b',"tools":[' + tools + b"]")
        elif role == "system":
            out.append(b',"instructions":"' + b" ".join(block.text for block in run) + b'"')
        elif role == "user":
            parts = b",".join(b'{"type":"input_text","text":"' + block.text + b'\\n"}' for block in run)
            items.append(b'{"type":"message","role":"user","content":[' + parts + b"]}")
        else:
            items += map(_item, run)
    return b"".join((*out, b',"input":[', b",".join(items), b"]}"))


def _item(block: Block) -> bytes:
    """An answer, a use or a result."""
    name = block.name.encode()
    if block.role == "use":
        arguments = b'","name":"a0a0","arguments":"{\\"text\\": \\"' + block.text + b'\\"}"}'
        return b'{"type":"function_call","call_id":"' + name + arguments
    if block.role == "result":
        return b'{"type":"function_call_output","call_id":"' + name + b'","output":"' + block.text + b'"}'
    content = b'"content":[{"type":"output_text","text":"' + block.text + b'"}]'
    return b'{"type":"message","role":"assistant",' + content + b"}"


class Reader(sse.Reader):
    """Takes in an answer of the Responses API."""

    def take(self, event: dict[str, Any], now_ns: int) -> None:
        """One event. Only a final one has usage."""
        kind = string(event.get("type")) or ""
        if kind.endswith(".delta"):
            self.heard.token(now_ns, event.get("delta") if kind == "response.output_text.delta" else None)
        elif kind in ("response.completed", "response.incomplete", "response.failed"):
            self._take(part(event, "response"))
        elif kind == "error":
            self.heard.fault = fault(event if "error" in event else {"error": event})

    def take_whole(self, body: dict[str, Any]) -> None:
        """The whole of it."""
        self._take(body)
        for item in body.get("output") or ():
            for content in part({"item": item}, "item").get("content") or ():
                self.heard.says(part({"content": content}, "content").get("text"))

    def _take(self, body: dict[str, Any]) -> None:
        """What a stream's last event holds too."""
        self.heard.usage = part(body, "usage") or None
        status = string(body.get("status"))
        reason = string(part(body, "incomplete_details").get("reason"))
        self.heard.stop_reason = reason or ("stop" if status == "completed" else status)
        self.heard.finished = status in ("completed", "incomplete")
        if body.get("error"):
            self.heard.fault = fault(body)
