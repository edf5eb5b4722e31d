"""An answer of the simulated endpoint in the Messages API: streams, whole answers, token accounts, errors."""

from __future__ import annotations

from typing import Any

import orjson

from keepwarm.harness.script import Said

Account = dict[str, Any]
"""A token account in outcome columns."""


def event(kind: str, **fields: Any) -> bytes:
    """A server-sent event that names its kind twice, as those of two dialects do."""
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps({"type": kind, **fields}) + b"\n\n"


def written(account: Account) -> int:
    """All tokens newly cached."""
    return sum(account[f"cache_write_{ttl}"] or 0 for ttl in ("5m", "1h", "other"))


class Messages:
    """An answer of the Messages API."""

    STOPS = {"end": "end_turn", "limit": "max_tokens", "tool": "tool_use", "window": "model_context_window_exceeded"}

    def __init__(self, said: Said, model: str, *, tell_usage: bool = True, writes: str | None = None) -> None:
        del tell_usage, writes
        self._said = said
        self._message = {"id": f"msg_{said.ident}", "type": "message", "role": "assistant", "model": model}
        kind, field = ("input_json_delta", "partial_json") if said.tool else ("text_delta", "text")
        told = event("content_block_delta", index=0, delta={"type": kind, field: "%"})
        self._before, self._after = told.split(b"%")

    def _told(self, content: list[dict[str, Any]], stop: str | None, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._message, "content": content, "stop_reason": stop, "stop_sequence": None, "usage": usage}

    def _block(self, text: str) -> dict[str, Any]:
        tool = self._said.tool
        if tool:
            return {"type": "tool_use", "id": f"toolu_{self._said.ident}", "name": tool, "input": orjson.loads(text)}
        return {"type": "text", "text": text}

    def opening(self, account: Account) -> bytes:
        """A stream's first events, which tell the account of the prompt."""
        started = event("message_start", message=self._told([], None, self.usage(account, output=0)))
        block = self._block("{}" if self._said.tool else "")
        return started + event("content_block_start", index=0, content_block=block)

    def delta(self, text: bytes) -> bytes:
        """An event with some of the text, escaped as JSON wants it."""
        return self._before + text + self._after

    def closing(self, account: Account) -> bytes:
        """A stream's last events."""
        delta = {"stop_reason": self.STOPS[self._said.stop], "stop_sequence": None}
        final = event("message_delta", delta=delta, usage=self.usage(account, output=account["output"]))
        return event("content_block_stop", index=0) + final + event("message_stop")

    def whole(self, account: Account) -> bytes:
        """An answer that is not streamed."""
        usage = self.usage(account, output=account["output"])
        return orjson.dumps(self._told([self._block(self._said.text)], self.STOPS[self._said.stop], usage))

    @staticmethod
    def usage(account: Account, *, output: int) -> dict[str, Any]:
        """The account in the API's fields; writes that have neither of its TTLs stand in the sum alone."""
        short, long = account["cache_write_5m"] or 0, account["cache_write_1h"] or 0
        return {
            "input_tokens": account["uncached"],
            "cache_creation_input_tokens": written(account),
            "cache_read_input_tokens": account["cache_read"],
            "cache_creation": {"ephemeral_5m_input_tokens": short, "ephemeral_1h_input_tokens": long},
            "output_tokens": output,
        }

    @staticmethod
    def error(status: int, message: str) -> dict[str, Any]:
        """The API's shape of an error."""
        kinds = {404: "not_found_error", 413: "request_too_large", 500: "api_error"}
        return {"type": "error", "error": {"type": kinds.get(status, "invalid_request_error"), "message": message}}
