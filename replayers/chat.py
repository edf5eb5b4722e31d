"""The OpenAI chat completions dialect: bodies to send and streams to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import orjson

from keepwarm.replayers import sse
from keepwarm.replayers.blocks import Block
from keepwarm.replayers.sse import fault, part, string

PATH = "/v1/chat/completions"
KEY_ENV = "OPENAI_API_KEY"
LIMIT = "max_tokens"
NO_TOOL: Any = "none"
PARAMETERS = b'"parameters":{"type":"object","properties":{"text":{"type":"string"}}}'


def headers(key: str | None) -> dict[str, str]:
    """What the API wants in every request; ``key`` None for an endpoint that asks for none."""
    return {"authorization": f"Bearer {key}"} if key else {}


def body(head: Mapping[str, Any], blocks: Sequence[Block]) -> bytes:
    """A request body: the parameters of ``head`` first, then the prompt, one message a run of blocks of one role, its
    content a string, because that is the shape every server takes. A prompt that grew from another has the other's
    bytes from ``tools`` on up to where they part.
    """
    out = [orjson.dumps(head)[:-1]]
    messages = []
    for place, run in groupby(blocks, _place):
        if place == "tool":
            tools = b",".join(b'{"type":"function","function":{' + offered(block) + b"}}" for block in run)
            out.append(b',"tools":[' + tools + b"]")
        else:
            messages.append(_message(place, list(run)))
    return b"".join((*out, b',"messages":[', b",".join(messages), b"]}"))


def offered(block: Block) -> bytes:
    """A tool as the OpenAI dialects describe it."""
    return b'"name":"' + block.name.encode() + b'","description":"' + block.text + b'",' + PARAMETERS


_SPEAKERS = {"use": "assistant", "answer": "assistant"}


def _place(block: Block) -> str:
    """What makes a message: results have one each."""
    return (
        block.name
        if block.role == "result"
        else {"use": "assistant", "answer": "assistant"}.get(block.role, block.role)
    )


def _message(place: str, blocks: Sequence[Block]) -> bytes:
    text = b'"' + b" ".join(block.text for block in blocks if block.role != "use") + b'"'
    if blocks[0].role == "result":
        return b'{"role":"tool","tool_call_id":"' + place.encode() + b'","content":' + text + b"}"
    uses = [block for block in blocks if block.role == "use"]
    out = b'{"role":"' + place.encode() + b'","content":' + (text if len(uses) < len(blocks) else b"null")
    if uses:
        out += b',"tool_calls":[' + b",".join(map(_use, uses)) + b"]"
    return out + b"}"


def _use(block: Block) -> bytes:
    arguments = b'"arguments":"{\\"text\\": \\"' + block.text + b'\\"}"'
    return b'{"id":"' + block.name.encode() + b'","type":"function","function":{"name":"a0a0",' + arguments + b"}}"


_SAID = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")


class Reader(sse.Reader):
    """Takes in an answer of the chat completions API."""

    def take(self, event: dict[str, Any], now_ns: int) -> None:
        """One event. A first one that names the role and says nothing is no token."""
        if event.get("error"):
            self.heard.fault = fault(event)
        self.heard.usage = part(event, "usage") or self.heard.usage
        self.heard.routed(event)
        said = choice(event)
        delta = part(said, "delta")
        if any(delta.get(name) for name in _SAID):
            self.heard.token(now_ns, delta.get("content"))
        self.heard.stop_reason = string(said.get("finish_reason")) or self.heard.stop_reason

    def take_whole(self, body: dict[str, Any]) -> None:
        """The whole of it."""
        said = choice(body)
        self.heard.usage = part(body, "usage") or None
        self.heard.routed(body)
        self.heard.stop_reason = string(said.get("finish_reason"))
        self.heard.finished = bool(said)
        self.heard.says(part(said, "message").get("content"))


def choice(event: dict[str, Any]) -> dict[str, Any]:
    """What an event or a body says of its only choice."""
    choices = event.get("choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
