"""A server with a tokenizer and chat templates of its own: prompts become one string, whose tokens it counts and keeps.

It is small on purpose and shares nothing with what it tests: bodies are read as JSON, tokens are cut by one expression.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import takewhile
from typing import Any, NamedTuple

import httpx
import orjson

TOKEN = re.compile(r"<\|[^|]*\|>|\n| ?[a-z]+|\d| ?[^\sa-z0-9]", re.IGNORECASE)
PATHS = {"messages": "messages", "completions": "chat", "responses": "responses"}
Answered = tuple[int, Any]


class Part(NamedTuple):
    """A text, a use with its id and arguments, or a result with its id."""

    kind: str
    text: str
    ident: str = ""


Turn = tuple[str, list[Part]]


def turns(dialect: str, body: Mapping[str, Any]) -> list[Turn]:
    """Who says what, the system first; what one role says in a row is one turn, but for tools' results in chat."""
    found: list[Turn] = []
    for role, part in {"messages": _messages, "chat": _chat, "responses": _responses}[dialect](body):
        if found and found[-1][0] == role and role != "tool":
            found[-1][1].append(part)
        else:
            found.append((role, [part]))
    return found


def _messages(body: Mapping[str, Any]) -> Iterator[tuple[str, Part]]:
    for block in body.get("system", ()):
        yield "system", Part("text", block["text"])
    for message in body["messages"]:
        for block in message["content"]:
            yield message["role"], _block(block)


def _chat(body: Mapping[str, Any]) -> Iterator[tuple[str, Part]]:
    for message in body["messages"]:
        if message["role"] == "tool":
            yield "tool", Part("result", message["content"], message["tool_call_id"])
        elif message["content"]:
            yield message["role"], Part("text", message["content"])
        for use in message.get("tool_calls", ()):
            yield "assistant", Part("use", use["function"]["arguments"], use["id"])


def _responses(body: Mapping[str, Any]) -> Iterator[tuple[str, Part]]:
    if body.get("instructions"):
        yield "system", Part("text", body["instructions"])
    for item in body["input"]:
        yield from _item(item)


def _block(block: Mapping[str, Any]) -> Part:
    if block["type"] == "text":
        return Part("text", block["text"])
    if block["type"] == "tool_use":
        return Part("use", orjson.dumps(block["input"]).decode(), block["id"])
    return Part("result", block["content"], block["tool_use_id"])


def _item(item: Mapping[str, Any]) -> list[tuple[str, Part]]:
    if item["type"] == "message":
        return [(item["role"], Part("text", part["text"])) for part in item["content"]]
    if item["type"] == "function_call":
        return [("assistant", Part("use", item["arguments"], item["call_id"]))]
    return [("tool", Part("result", item["output"], item["call_id"]))]


def plain(found: list[Turn], tools: str, part: Callable[[Part], str] = lambda part: part.text, join: str = "") -> str:
    """Each turn between marks, its parts joined with nothing; tools in a turn of their own."""
    said = [("tools", tools)] if tools else []
    said += [(role, join.join(map(part, parts))) for role, parts in found]
    return "".join(f"<|{role}|>{text}<|end|>" for role, text in said) + "<|assistant|>"


def merged(found: list[Turn], tools: str) -> str:
    """Results are a user's, all that follow one another in one turn, each in a frame."""
    out: list[Turn] = []
    for role, parts in found:
        framed = [Part("text", f"<r>\n{p.text}\n</r>") if p.kind == "result" else p for p in parts]
        if role == "tool" and out and out[-1][0] == "user":
            out[-1][1].extend(framed)
        else:
            out.append(("user" if role == "tool" else role, framed))
    return plain(out, tools)


def one_head(found: list[Turn], tools: str) -> str:
    """Tools stand in the system's turn, with words about them; there is a system's turn in any case."""
    system = [parts for role, parts in found if role == "system"]
    said = "".join(part.text for parts in system for part in parts) or "you are kind"
    if tools:
        said += f"\n# tools\nyou may call these:\n{tools}\nuse them well"
    return plain([("system", [Part("text", said)]), *(turn for turn in found if turn[0] != "system")], "")


def trimmed(found: list[Turn], tools: str) -> str:
    """What is said is trimmed, its parts are joined by line ends."""
    cut = [(role, [part._replace(text=part.text.strip()) for part in parts]) for role, parts in found]
    return plain(cut, tools, join="\n")


def with_ids(found: list[Turn], tools: str) -> str:
    """Uses and results are told with their ids, which are tokens."""
    return plain(found, tools, part=lambda p: f"[{p.ident}]\n{p.text}" if p.ident else p.text)


SHAPES = {"plain": plain, "merged": merged, "one_head": one_head, "trimmed": trimmed, "with_ids": with_ids}


class Templated:
    """The server. ``weight`` are the tokens of a word, ``refuses`` gives a status and an error's text for a body that
    it does not take, ``usage`` changes the account that it tells, ``first`` are statuses before it answers at all.
    ``asked`` are the bodies that it saw, ``headers`` what came with them.
    """

    def __init__(
        self,
        shape: str = "plain",
        *,
        weight: Callable[[str], int] = lambda word: 1,
        refuses: Callable[[dict[str, Any]], tuple[int, str] | None] = lambda body: None,
        usage: Callable[[dict[str, Any]], dict[str, Any]] = lambda usage: usage,
        first: tuple[int, ...] = (),
        keeps: bool = True,
    ) -> None:
        self.shape, self.weight, self.refuses, self.usage = SHAPES[shape], weight, refuses, usage
        self.first = list(first)
        self.keeps = keeps
        self.kept: list[list[str]] = []
        self.asked: list[bytes] = []
        self.headers: list[dict[str, str]] = []

    def tokens(self, dialect: str, body: Mapping[str, Any]) -> list[str]:
        """A prompt's tokens."""
        tools = orjson.dumps(body["tools"]).decode() if body.get("tools") else ""
        text = self.shape(turns(dialect, body), tools)
        found = TOKEN.findall(text)
        assert "".join(found) == text
        return [token for token in found for _ in range(self.weight(token.strip()))]

    def answer(self, method: str, path: str, headers: Mapping[str, str], data: bytes) -> Answered:
        """Status and body."""
        name = path.rstrip("/").rsplit("/", 1)[-1]
        if name == "models":
            return 200, {"data": [{"id": "m"}]}
        if method != "POST" or name not in PATHS:
            return 404, {}
        self.asked.append(data)
        self.headers.append(dict(headers))
        if self.first:
            return self.first.pop(0), {"error": {"type": "busy", "message": "busy"}}
        body = orjson.loads(data)
        if refused := self.refuses(body):
            return refused[0], {"error": {"type": "invalid_request_error", "message": refused[1]}}
        dialect = PATHS[name]
        prompt = self.tokens(dialect, body)
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or body["max_output_tokens"]
        return 200, spoken(dialect, self.usage(self._usage(dialect, prompt, body, limit)), limit)

    def _usage(self, dialect: str, prompt: list[str], body: Mapping[str, Any], output: int) -> dict[str, Any]:
        salted = [str(body.get("cache_salt") or ""), *prompt]
        read = max((_common(salted, other) - 1 for other in self.kept), default=0)
        read = max(read, 0)
        self.kept += [salted] if self.keeps else []
        if dialect == "messages":
            told = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": read}
            return {"input_tokens": len(prompt) - read, "output_tokens": output, **told}
        names = ("prompt", "completion") if dialect == "chat" else ("input", "output")
        details = {f"{names[0]}_tokens_details": {"cached_tokens": read}}
        return {f"{names[0]}_tokens": len(prompt), f"{names[1]}_tokens": output, **details}

    def handler(self, request: httpx.Request) -> httpx.Response:
        """For a transport in memory."""
        status, body = self.answer(request.method, request.url.path, dict(request.headers), request.content)
        return httpx.Response(status, json=body)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As an application."""
        data, more = b"", True
        while more:
            message = await receive()
            data, more = data + message.get("body", b""), message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        status, body = self.answer(scope["method"], scope["path"], headers, data)
        kind, out = b"application/json", orjson.dumps(body)
        if status == 200 and data and orjson.loads(data).get("stream"):
            kind, out = b"text/event-stream", b"".join(b"data: " + event + b"\n\n" for event in streamed(body))
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": out})


def _common(one: list[str], other: list[str]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def spoken(dialect: str, usage: Mapping[str, Any], output: int) -> dict[str, Any]:
    """A whole answer of so many words."""
    text = " ".join(["yes"] * output)
    if dialect == "messages":
        return {
            "type": "message",
            "content": [{"type": "text", "text": text}],
            "stop_reason": "end_turn",
            "usage": usage,
        }
    if dialect == "chat":
        return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": usage}
    return {"status": "completed", "output": [{"content": [{"text": text}]}], "usage": usage}


def streamed(body: Mapping[str, Any]) -> list[bytes]:
    """The same answer as events."""
    events: list[dict[str, Any]]
    if "choices" in body:
        choice = body["choices"][0]
        events = [{"choices": [{"delta": choice["message"]}]}, {**body, "choices": [{"finish_reason": "stop"}]}]
        return [*map(orjson.dumps, events), b"[DONE]"]
    if "status" in body:
        text = body["output"][0]["content"][0]["text"]
        events = [
            {"type": "response.output_text.delta", "delta": text},
            {"type": "response.completed", "response": body},
        ]
        return list(map(orjson.dumps, events))
    delta = {"type": "text_delta", "text": body["content"][0]["text"]}
    events = [
        {"type": "message_start", "message": {"usage": {"input_tokens": 1}}},
        {"type": "content_block_delta", "delta": delta},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": body["usage"]},
        {"type": "message_stop"},
    ]
    return list(map(orjson.dumps, events))
