"""The OpenAI chat completions dialect: bodies to send and streams to read."""

from typing import Any

from keepwarm.replayers import sse
from keepwarm.replayers.blocks import Block
from keepwarm.replayers.dialect import Dialect
from keepwarm.replayers.sse import fault, part, string

PARAMETERS = b'"parameters":{"type":"object","properties":{"text":{"type":"string"}}}'


def fragment(before: str, block: Block) -> bytes:
    """A block but for its end, with the end of the one of the role ``before``: one message a run of blocks of one
    speaker, its content a string, because that is the shape every server takes, and one for each result. A prompt that
    grew from another has the other's bytes from ``tools`` on up to where they part.
    """
    role = block.role
    if role == "tool":
        return (b"}}," if before else b',"tools":[') + b'{"type":"function","function":{' + offered(block)
    if role == before != "result":
        return b"," + _use(block) if role == "use" else b" " + block.text
    if (before, role) == ("answer", "use"):
        return b'","tool_calls":[' + _use(block)
    opening = b"}}]" if before == "tool" else _END.get(before, b"")
    opening += b',"messages":[' if before in ("", "tool") else b","
    if role == "use":
        return opening + b'{"role":"assistant","content":null,"tool_calls":[' + _use(block)
    if role == "result":
        return opening + b'{"role":"tool","tool_call_id":"' + block.name.encode() + b'","content":"' + block.text
    speaker = b"assistant" if role == "answer" else role.encode()
    return opening + b'{"role":"' + speaker + b'","content":"' + block.text


_END = {"use": b"]}"} | dict.fromkeys(("system", "user", "answer", "result"), b'"}')


def end(before: str) -> bytes:
    """What closes the last block, of that role, and the body."""
    return b"}}]}" if before == "tool" else _END[before] + b"]}" if before else b',"messages":[]}'


def offered(block: Block) -> bytes:
    """A tool as the OpenAI dialects describe it, but for its end."""
    return b'"name":"' + block.name.encode() + b'","description":"' + block.text + b'",' + PARAMETERS


def _use(block: Block) -> bytes:
    arguments = b'"arguments":"{\\"text\\": \\"' + block.text + b'\\"}"'
    return b'{"id":"' + block.name.encode() + b'","type":"function","function":{"name":"a0a0",' + arguments + b"}}"


_SAID = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")


class Reader(sse.Reader):
    """Takes in an answer of the chat completions API, or of the plain one, whose ``text`` stands beside no delta."""

    def take(self, event: dict[str, Any], now_ns: int) -> None:
        """One event. A first one that names the role and says nothing is no token."""
        if event.get("error"):
            self.heard.fault = fault(event)
        self.heard.usage = part(event, "usage") or self.heard.usage
        self.heard.routed(event)
        said = choice(event)
        delta, text = part(said, "delta"), said.get("text")
        if text or any(delta.get(name) for name in _SAID):
            self.heard.token(now_ns, text or delta.get("content"))
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


CHAT = Dialect("/v1/chat/completions", fragment, end, Reader)
