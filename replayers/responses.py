"""The OpenAI Responses dialect: token accounts and streams to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keepwarm.replayers import sse
from keepwarm.replayers.chat import openai_account
from keepwarm.replayers.sse import fault, part, string


def usage(told: Mapping[str, Any] | None) -> dict[str, Any]:
    """The API's token account in outcome columns."""
    return openai_account(told, "input", "output")


class Reader(sse.Reader):
    """Takes in an answer of the Responses API."""

    def take(self, event: dict[str, Any], now_ns: int) -> None:
        """One event. Only a final one has usage."""
        kind = string(event.get("type")) or ""
        if kind.endswith(".delta"):
            self.heard.token_ns.append(now_ns)
        elif kind in ("response.completed", "response.incomplete", "response.failed"):
            self.take_whole(part(event, "response"))
        elif kind == "error":
            self.heard.fault = fault(event if "error" in event else {"error": event})

    def take_whole(self, body: dict[str, Any]) -> None:
        """The whole of it, which a stream's last event holds too."""
        self.heard.usage = part(body, "usage") or None
        status = string(body.get("status"))
        reason = string(part(body, "incomplete_details").get("reason"))
        self.heard.stop_reason = reason or ("stop" if status == "completed" else status)
        self.heard.finished = status in ("completed", "incomplete")
        if body.get("error"):
            self.heard.fault = fault(body)
