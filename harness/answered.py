"""What the simulated endpoint answers, in either dialect: streams, whole answers, token accounts, errors."""

from __future__ import annotations

from typing import Any

import orjson

from keepwarm.harness.asked import Asked

Account = dict[str, Any]
"""A token account in outcome columns, as ``keepwarm.replayers.worker.account`` gives it."""


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps({"type": kind, **fields}) + b"\n\n"


class Messages:
    """An answer of the Messages API."""

    def __init__(self, asked: Asked, ident: str, model: str) -> None:
        del asked
        self._message = {"id": f"msg_{ident}", "type": "message", "role": "assistant", "model": model}

    def _told(self, content: list[dict[str, str]], stop: str | None, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._message, "content": content, "stop_reason": stop, "stop_sequence": None, "usage": usage}

    def opening(self, account: Account) -> bytes:
        """A stream's first events."""
        started = _event("message_start", message=self._told([], None, self.usage(account, output=0)))
        return started + _event("content_block_start", index=0, content_block={"type": "text", "text": ""})

    def delta(self, text: bytes) -> bytes:
        """An event with some words, which need no escaping."""
        return (
            b"event: content_block_delta\n"
            b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"' + text + b'"}}\n\n'
        )

    def closing(self, account: Account) -> bytes:
        """A stream's last events."""
        delta = {"stop_reason": "end_turn", "stop_sequence": None}
        final = _event("message_delta", delta=delta, usage=self.usage(account, output=account["output"]))
        return _event("content_block_stop", index=0) + final + _event("message_stop")

    def whole(self, text: bytes, account: Account) -> bytes:
        """An answer that is not streamed."""
        usage = self.usage(account, output=account["output"])
        return orjson.dumps(self._told([{"type": "text", "text": text.decode()}], "end_turn", usage))

    @staticmethod
    def usage(account: Account, *, output: int) -> dict[str, Any]:
        """The account in the API's fields; writes that have neither of its TTLs stand in the sum alone."""
        short, long = account["cache_write_5m"], account["cache_write_1h"]
        return {
            "input_tokens": account["uncached"],
            "cache_creation_input_tokens": short + long + account["cache_write_other"],
            "cache_read_input_tokens": account["cache_read"],
            "cache_creation": {"ephemeral_5m_input_tokens": short, "ephemeral_1h_input_tokens": long},
            "output_tokens": output,
        }

    @staticmethod
    def error(status: int, message: str) -> dict[str, Any]:
        """The API's shape of an error."""
        kind = {404: "not_found_error", 413: "request_too_large"}.get(status, "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": message}}


class Chat:
    """An answer of the chat completions API."""

    def __init__(self, asked: Asked, ident: str, model: str) -> None:
        self._tell_usage = asked.tell_usage
        self._completion = {"id": f"chatcmpl-{ident}", "created": 0, "model": model}
        self._before, self._after = self._chunk({"content": "%"}).split(b"%")

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        chunk = {**self._completion, "object": "chat.completion.chunk", "choices": [choice]}
        return b"data: " + orjson.dumps(chunk) + b"\n\n"

    def opening(self, account: Account) -> bytes:
        """A stream's first event, which names the role."""
        del account
        return self._chunk({"role": "assistant", "content": ""})

    def delta(self, text: bytes) -> bytes:
        """An event with some words, which need no escaping."""
        return self._before + text + self._after

    def closing(self, account: Account) -> bytes:
        """A stream's last events; the account only if it was asked for."""
        end = self._chunk({}, "stop")
        if self._tell_usage:
            chunk = {**self._completion, "object": "chat.completion.chunk", "choices": [], "usage": self.usage(account)}
            end += b"data: " + orjson.dumps(chunk) + b"\n\n"
        return end + b"data: [DONE]\n\n"

    def whole(self, text: bytes, account: Account) -> bytes:
        """An answer that is not streamed."""
        message = {"role": "assistant", "content": text.decode()}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        completion = {"object": "chat.completion", "choices": [choice], "usage": self.usage(account)}
        return orjson.dumps(self._completion | completion)

    @staticmethod
    def usage(account: Account) -> dict[str, Any]:
        """The account in the API's fields, writes under vLLM's name."""
        written = account["cache_write_5m"] + account["cache_write_1h"] + account["cache_write_other"]
        return {
            "prompt_tokens": account["prompt"],
            "completion_tokens": account["output"],
            "total_tokens": account["prompt"] + account["output"],
            "prompt_tokens_details": {"cached_tokens": account["cache_read"], "created_cache_tokens": written},
        }

    @staticmethod
    def error(status: int, message: str) -> dict[str, Any]:
        """The API's shape of an error."""
        return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": status}}
