"""The OpenAI Responses dialect: bodies to send and streams to read."""

from typing import Any

from keepwarm.replayers import sse
from keepwarm.replayers.blocks import Block
from keepwarm.replayers.chat import offered
from keepwarm.replayers.dialect import Dialect
from keepwarm.replayers.sse import fault, part, string


def fragment(before: str, block: Block) -> bytes:
    """A block but for its end, with the end of the one of the role ``before``: an item for each answer, use and result,
    and for each run of a user's words. A prompt that grew from another has the other's bytes from ``tools`` on up to
    where they part.
    """
    role = block.role
    if role == "tool":
        return (b"}," if before else b',"tools":[') + b'{"type":"function","strict":false,' + offered(block)
    if role == "system":
        opening = b" " if before == "system" else (b"}]" if before else b"") + b',"instructions":"'
        return opening + block.text
    if role == before == "user":
        return b"," + _item(block)
    opening = _END.get(before, b"")
    opening += b',"input":[' if before in ("", "tool", "system") else b","
    if role == "user":
        opening += b'{"type":"message","role":"user","content":['
    return opening + _item(block)


_END = {"tool": b"}]", "system": b'"', "user": b"]}"} | dict.fromkeys(("answer", "use", "result"), b"}")


def end(before: str) -> bytes:
    """What closes the last block, of that role, and the body."""
    opened = b"" if before in ("", "tool", "system") else b"]"
    return _END.get(before, b"") + (opened or b',"input":[]') + b"}"


def _item(block: Block) -> bytes:
    """An answer, a use, a result or a piece of what a user says, but for its end."""
    name = block.name.encode()
    if block.role == "user":
        return b'{"type":"input_text","text":"' + block.text + b'\\n"}'
    if block.role == "use":
        arguments = b'","name":"a0a0","arguments":"{\\"text\\": \\"' + block.text + b'\\"}"'
        return b'{"type":"function_call","call_id":"' + name + arguments
    if block.role == "result":
        return b'{"type":"function_call_output","call_id":"' + name + b'","output":"' + block.text + b'"'
    content = b'"content":[{"type":"output_text","text":"' + block.text + b'"}]'
    return b'{"type":"message","role":"assistant",' + content


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
            self.heard.fault = fault(event)

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


RESPONSES = Dialect("/v1/responses", fragment, end, Reader, limit="max_output_tokens")
