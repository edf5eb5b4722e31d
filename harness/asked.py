"""What a request to the simulated endpoint asks for, read from a body of either dialect."""

from __future__ import annotations

from typing import Any, NamedTuple

import orjson

from keepwarm.traces.model import Breakpoint

HOUR_S = 3600
USUAL_S = 300
UNSEEN = frozenset(("cache_control", "id", "tool_use_id", "tool_call_id", "signature"))
"""Fields of a content block that no model sees."""


class Refused(Exception):
    """A request that cannot be answered: the HTTP status and what to tell."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Asked(NamedTuple):
    """``text`` is the prompt's words, each with one space behind it, the first of a role naming the role before a NUL,
    so that roles are part of what is cached and no tokens. ``role`` is the last one's. ``output`` is None where the
    client set no limit; ``tell_usage`` says whether a stream ends with the token account.
    """

    model: str | None
    text: bytes
    role: str
    marks: tuple[Breakpoint, ...]
    output: int | None
    stream: bool
    tell_usage: bool = True


_SPACES = bytes.maketrans(b"\t\n\v\f\r", b"     ")


class _Prompt:
    def __init__(self) -> None:
        self.said: list[bytes] = []
        self.tokens = 0
        self.role = ""
        self.marks: list[Breakpoint] = []

    def add(self, role: str, content: Any) -> None:
        """A string, a content block, a list of them, or nothing."""
        for block in content if isinstance(content, list) else [content]:
            words = _text(block).encode().translate(_SPACES)
            while b"  " in words:  # far faster than split and join, for each pass halves every run of spaces
                words = words.replace(b"  ", b" ")
            if words := words.strip(b" "):
                self.said += (words, b" ") if role == self.role else (role.encode(), b"\0", words, b" ")
                self.tokens += words.count(b" ") + 1
                self.role = role
            if isinstance(block, dict):
                self.mark(block.get("cache_control"))

    def mark(self, control: Any) -> None:
        """A cache_control mark on what was added last."""
        if isinstance(control, dict):
            self.marks.append(Breakpoint(self.tokens, HOUR_S if control.get("ttl") == "1h" else USUAL_S))

    def text(self) -> bytes:
        return b"".join(self.said)


def _text(block: Any) -> str:
    """What of a content block the model sees. List or string, key order and marks make no difference."""
    if block is None or isinstance(block, str):
        return block or ""
    if not isinstance(block, dict):
        raise Refused(400, "content: expected a string or a list of content blocks")
    if block.get("type") == "text" and isinstance(block.get("text"), str):
        return str(block["text"])
    if block.get("type") == "tool_result":
        inner = block.get("content")
        return " ".join(map(_text, inner if isinstance(inner, list) else [inner]))
    seen = {name: value for name, value in block.items() if name not in UNSEEN}
    return orjson.dumps(seen, option=orjson.OPT_SORT_KEYS).decode()


def _list(body: dict[str, Any], name: str) -> list[Any]:
    value = body.get(name) or []
    if not isinstance(value, list):
        raise Refused(400, f"{name}: expected a list")
    return value


def _messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    messages = _list(body, "messages")
    if not messages:
        raise Refused(400, "messages: at least one message is required")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refused(400, f"messages.{index}: expected an object with a role and content")
    return messages


def _output(body: dict[str, Any], *names: str) -> int | None:
    for name in names:
        value = body.get(name)
        if value is not None:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise Refused(400, f"{name}: expected an integer of at least 1")
            return value
    return None


def _model(body: dict[str, Any]) -> str | None:
    model = body.get("model")
    return model if isinstance(model, str) else None


def messages(body: dict[str, Any]) -> Asked:
    """What a body of the Messages API asks; tools come first, then system, then messages."""
    prompt = _Prompt()
    prompt.add("tools", _list(body, "tools"))
    prompt.add("system", body.get("system"))
    for message in _messages(body):
        prompt.add(message["role"], message.get("content"))
    prompt.mark(body.get("cache_control"))
    output = _output(body, "max_tokens")
    return Asked(_model(body), prompt.text(), prompt.role, tuple(prompt.marks), output, body.get("stream") is True)


def chat(body: dict[str, Any]) -> Asked:
    """What a body of the chat completions API asks. It has no marks: all of the prompt is marked, for the usual TTL."""
    prompt = _Prompt()
    prompt.add("tools", _list(body, "tools"))
    for message in _messages(body):
        prompt.add(message["role"], message.get("content"))
        prompt.add(message["role"], _list(message, "tool_calls"))
    prompt.mark({})
    options = body.get("stream_options")
    tell = isinstance(options, dict) and options.get("include_usage") is True
    output = _output(body, "max_completion_tokens", "max_tokens")
    stream = body.get("stream") is True
    return Asked(_model(body), prompt.text(), prompt.role, tuple(prompt.marks), output, stream, tell)
