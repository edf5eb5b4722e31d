"""The OpenAI Responses dialect: token accounts and streams to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from keepwarm.replayers.sse import Heard, count, fault, part, string


def usage(told: Mapping[str, Any] | None) -> dict[str, Any]:
    """The API's token account in outcome columns. ``input_tokens`` are all of the prompt; the unreported is None."""
    prompt = count(told.get("input_tokens")) if told else None
    if told is None or prompt is None:
        return {"usage_source": "absent", "write_source": "absent"}
    details = part(told, "input_tokens_details")
    read, written = count(details.get("cached_tokens")), count(details.get("cache_write_tokens"))
    return {
        "prompt": prompt,
        "uncached": None if read is None else max(prompt - read - (written or 0), 0),
        "cache_read": read,
        "cache_write_other": written,
        "output": count(told.get("output_tokens")),
        "reasoning": count(part(told, "output_tokens_details").get("reasoning_tokens")),
        "usage_source": "reported",
        "write_source": "reported" if written is not None else "inferred" if read is not None else "absent",
    }


class Reader:
    """Takes in an answer: the events of a stream as they come, or the whole of it."""

    def __init__(self) -> None:
        self.heard = Heard()

    def event(self, data: bytes, now_ns: int) -> None:
        """One event's data."""
        event = orjson.loads(data) if data != b"[DONE]" else None
        if isinstance(event, dict):
            self.take(event, now_ns)

    def take(self, event: dict[str, Any], now_ns: int) -> None:
        """One event. Only a final one has usage."""
        kind = string(event.get("type")) or ""
        if kind.endswith(".delta"):
            self.heard.token_ns.append(now_ns)
        elif kind in ("response.completed", "response.incomplete", "response.failed"):
            self._end(part(event, "response"))
        elif kind == "error":
            self.heard.fault = fault(event if "error" in event else {"error": event})

    def whole(self, data: bytes) -> None:
        """The body of an answer that was not streamed."""
        response = orjson.loads(data)
        if isinstance(response, dict):
            self._end(response)

    def _end(self, response: dict[str, Any]) -> None:
        self.heard.usage = part(response, "usage") or None
        status = string(response.get("status"))
        reason = string(part(response, "incomplete_details").get("reason"))
        self.heard.stop_reason = reason or ("stop" if status == "completed" else status)
        self.heard.finished = status in ("completed", "incomplete")
        if response.get("error"):
            self.heard.fault = fault(response)
