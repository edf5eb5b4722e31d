"""The OpenAI Responses dialect: token accounts and streams to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from keepwarm.replayers.chat import openai_account
from keepwarm.replayers.sse import Heard, fault, part, string


def usage(told: Mapping[str, Any] | None) -> dict[str, Any]:
    """The API's token account in outcome columns."""
    return openai_account(told, "input", "output")


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
