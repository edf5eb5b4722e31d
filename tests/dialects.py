"""What a client asks and an API answers, written once and put into words in each of the three dialects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

PATHS = {"messages": "/v1/messages", "chat": "/v1/chat/completions", "responses": "/v1/responses"}
DIALECTS = tuple(PATHS)


class Use(NamedTuple):
    """A tool use in an answer, or in the history that a client sends."""

    id: str
    name: str
    given: dict[str, Any] = {}


class Result(NamedTuple):
    """A tool's result that a client sends."""

    use: str
    text: str
    is_error: bool | None = None


class Turn(NamedTuple):
    """A message: its role, and its texts, tool uses and results."""

    role: str
    said: tuple[str | Use | Result, ...]


class Tokens(NamedTuple):
    """An account, None where the API is to tell nothing."""

    prompt: int
    output: int
    read: int | None = None
    write: int | None = None
    reasoning: int | None = None


def user(*said: str | Result) -> Turn:
    """A message of the client's."""
    return Turn("user", said)


def assistant(*said: str | Use) -> Turn:
    """A message of the model's."""
    return Turn("assistant", said)


def request(
    dialect: str,
    turns: Sequence[Turn],
    *,
    system: str | None = None,
    tools: Sequence[str] = (),
    stream: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """A request's body."""
    head: dict[str, Any] = {"model": "claude-opus-4-8", "stream": stream}
    if dialect == "messages":
        offered = [{"name": name, "description": f"does {name}", "input_schema": {"type": "object"}} for name in tools]
        body = {"messages": [{"role": t.role, "content": [_block(one) for one in t.said]} for t in turns]}
        return head | {"tools": offered, "system": system or []} | body | more
    if dialect == "chat":
        offered = [{"type": "function", "function": {"name": name, "description": f"does {name}"}} for name in tools]
        messages = [{"role": "system", "content": system}] if system else []
        return head | {"tools": offered, "messages": messages + [m for t in turns for m in _chat(t)]} | more
    offered = [{"type": "function", "name": name, "description": f"does {name}"} for name in tools]
    items = [_item(t.role, one) for t in turns for one in t.said]
    return head | {"tools": offered, "instructions": system or "", "input": items} | more


def _block(one: str | Use | Result) -> dict[str, Any]:
    if isinstance(one, str):
        return {"type": "text", "text": one}
    if isinstance(one, Use):
        return {"type": "tool_use", "id": one.id, "name": one.name, "input": one.given}
    told = {"type": "tool_result", "tool_use_id": one.use, "content": one.text}
    return told if one.is_error is None else told | {"is_error": one.is_error}


def _chat(turn: Turn) -> list[dict[str, Any]]:
    results = [one for one in turn.said if isinstance(one, Result)]
    uses = [_function(one) for one in turn.said if isinstance(one, Use)]
    texts = [one for one in turn.said if isinstance(one, str)]
    messages = [{"role": "tool", "tool_call_id": one.use, "content": one.text} for one in results]
    if uses:
        return [*messages, {"role": turn.role, "content": "".join(texts) or None, "tool_calls": uses}]
    return messages + [{"role": turn.role, "content": one} for one in texts]


def _function(one: Use) -> dict[str, Any]:
    return {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": json.dumps(one.given)}}


def _item(role: str, one: str | Use | Result) -> dict[str, Any]:
    if isinstance(one, Use):
        return {"type": "function_call", "call_id": one.id, "name": one.name, "arguments": json.dumps(one.given)}
    if isinstance(one, Result):
        return {"type": "function_call_output", "call_id": one.use, "output": one.text}
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": one}]}


def usage(dialect: str, told: Tokens) -> dict[str, Any]:
    """An account as the dialect's API tells it."""
    if dialect == "messages":
        rest = told.prompt - (told.read or 0) - (told.write or 0)
        parts = {"cache_read_input_tokens": told.read, "cache_creation_input_tokens": told.write}
        wire: dict[str, Any] = {"input_tokens": rest, "output_tokens": told.output, **_told(parts)}
        if told.write is not None:
            wire["cache_creation"] = {"ephemeral_5m_input_tokens": told.write, "ephemeral_1h_input_tokens": 0}
        if told.reasoning is not None:
            wire["output_tokens_details"] = {"thinking_tokens": told.reasoning}
        return wire
    asked, given = ("prompt", "completion") if dialect == "chat" else ("input", "output")
    parts = _told({"cached_tokens": told.read, "cache_write_tokens": told.write})
    wire = {f"{asked}_tokens": told.prompt, f"{given}_tokens": told.output}
    wire |= {f"{asked}_tokens_details": parts} if parts else {}
    return wire | _told({f"{given}_tokens_details": told.reasoning and {"reasoning_tokens": told.reasoning}})


def _told(parts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parts.items() if value is not None}


class Said(NamedTuple):
    """An answer: what it says, its account, why it stopped (the dialect's own word if None), its id."""

    said: tuple[str | Use, ...] = ("Done.",)
    tokens: Tokens | None = Tokens(100, 10, 0, 0)
    stop: str | None = None
    id: str | None = None


def whole(dialect: str, answer: Said) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    account = {} if answer.tokens is None else {"usage": usage(dialect, answer.tokens)}
    uses = any(isinstance(one, Use) for one in answer.said)
    if dialect == "messages":
        stop = answer.stop or ("tool_use" if uses else "end_turn")
        told = {"type": "message", "role": "assistant", "content": [_block(one) for one in answer.said]}
        return {"id": answer.id, "stop_reason": stop, **told, **account}
    if dialect == "chat":
        message = _chat(assistant(*answer.said))[0]
        choice = {"index": 0, "message": message, "finish_reason": answer.stop or ("tool_calls" if uses else "stop")}
        return {"id": answer.id, "choices": [choice], **account}
    items = [_item("assistant", one) for one in answer.said]
    ended = {"status": "incomplete", "incomplete_details": {"reason": answer.stop}} if answer.stop else {}
    return {"id": answer.id, "object": "response", "status": "completed", "output": items, **ended, **account}


def events(dialect: str, answer: Said) -> list[bytes]:
    """The events of an answer that is streamed; the first that carries output is the third."""
    full = whole(dialect, answer)
    told = {"messages": _message_events, "chat": _chat_events, "responses": _response_events}[dialect](answer, full)
    sent = [f"event: {one.get('type', 'chunk')}\ndata: {json.dumps(one)}\n\n".encode() for one in told]
    return [*sent, b"data: [DONE]\n\n"] if dialect == "chat" else sent


def _message_events(answer: Said, full: dict[str, Any]) -> list[dict[str, Any]]:
    placeholder = {"usage": full["usage"] | {"output_tokens": 1}} if "usage" in full else {}
    made: list[dict[str, Any]] = [{"type": "message_start", "message": full | {"content": []} | placeholder}]
    for at, block in enumerate(full["content"]):
        name, kind = ("text", "text_delta") if block["type"] == "text" else ("input", "input_json_delta")
        delta = {"text": block[name]} if name == "text" else {"partial_json": json.dumps(block[name])}
        empty = block | {name: "" if name == "text" else {}}
        made.append({"type": "content_block_start", "index": at, "content_block": empty})
        made.append({"type": "content_block_delta", "index": at, "delta": {"type": kind, **delta}})
        made.append({"type": "content_block_stop", "index": at})
    final = {"usage": {"output_tokens": full["usage"]["output_tokens"]}} if "usage" in full else {}
    made.append({"type": "message_delta", "delta": {"stop_reason": full["stop_reason"]}, **final})
    return [*made, {"type": "message_stop"}]


def _chat_events(answer: Said, full: dict[str, Any]) -> list[dict[str, Any]]:
    def chunk(delta: dict[str, Any], stop: str | None = None) -> dict[str, Any]:
        return {"id": answer.id, "choices": [{"index": 0, "delta": delta, "finish_reason": stop}]}

    choice = full["choices"][0]
    made = [chunk({"role": "assistant", "content": ""}), chunk({})]
    made += [chunk({"content": choice["message"]["content"]})] if choice["message"].get("content") else []
    for at, call in enumerate(choice["message"].get("tool_calls", ())):
        arguments = call["function"]["arguments"]
        made.append(chunk({"tool_calls": [call | {"index": at, "function": call["function"] | {"arguments": ""}}]}))
        made.append(chunk({"tool_calls": [{"index": at, "function": {"arguments": arguments}}]}))
    made.append(chunk({}, choice["finish_reason"]))
    return [*made, *([{"id": answer.id, "choices": [], "usage": full["usage"]}] if "usage" in full else ())]


def _response_events(answer: Said, full: dict[str, Any]) -> list[dict[str, Any]]:
    begun = {"id": answer.id, "status": "in_progress", "output": []}
    made: list[dict[str, Any]] = [{"type": "response.created", "response": begun}]
    for at, item in enumerate(full["output"]):
        made.append({"type": "response.output_item.added", "output_index": at, "item": {"type": item["type"]}})
        kind = "function_call_arguments" if item["type"] == "function_call" else "output_text"
        text = item["arguments"] if kind == "function_call_arguments" else item["content"][0]["text"]
        made.append({"type": f"response.{kind}.delta", "output_index": at, "delta": text})
        made.append({"type": "response.output_item.done", "output_index": at, "item": item})
    ended = "response.incomplete" if answer.stop else "response.completed"
    return [*made, {"type": ended, "response": full}]
