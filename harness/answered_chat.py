"""Answers of the simulated endpoint in the chat completions API and the completions API."""

from __future__ import annotations

import time
from typing import Any

import orjson

from keepwarm.harness.answered import Account, written
from keepwarm.harness.script import Said

Fields = dict[str, Any]


def usage(account: Account, prompt: str, output: str, writes: str | None) -> Fields:
    """An account in the fields of the OpenAI dialects; ``writes`` is what tokens newly cached are called, None where
    they are not told.
    """
    details = {"cached_tokens": account["cache_read"]}
    if writes:
        details[writes] = written(account)
    return {
        f"{prompt}_tokens": account["prompt"],
        f"{output}_tokens": account["output"],
        "total_tokens": account["prompt"] + account["output"],
        f"{prompt}_tokens_details": details,
    }


def error(status: int, message: str) -> Fields:
    """The OpenAI dialects' shape of an error."""
    kind = {404: "not_found_error", 500: "server_error"}.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


class Chat:
    """An answer of the chat completions API."""

    STOPS = {"end": "stop", "limit": "length", "tool": "tool_calls", "window": "length"}
    IDENT, WHOLE, CHUNK = "chatcmpl", "chat.completion", "chat.completion.chunk"
    error = staticmethod(error)

    def __init__(self, said: Said, model: str, *, tell_usage: bool = True, writes: str | None = None) -> None:
        self._said = said
        self._tell_usage = tell_usage
        self._writes = writes
        self._about = {"id": f"{self.IDENT}-{said.ident}", "created": int(time.time()), "model": model}
        self._before, _, self._after = self._event(self._part("%")).rpartition(b"%")

    def _event(self, part: Fields, finish: str | None = None) -> bytes:
        choice = {"index": 0, **part, "logprobs": None, "finish_reason": finish}
        return b"data: " + orjson.dumps({**self._about, "object": self.CHUNK, "choices": [choice]}) + b"\n\n"

    def _part(self, text: str) -> Fields:
        """What a chunk with some of the text holds."""
        if not self._said.tool:
            return {"delta": {"content": text}}
        return {"delta": {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}}

    def _call(self, arguments: str) -> Fields:
        function = {"name": self._said.tool, "arguments": arguments}
        return {"id": f"call_{self._said.ident}", "type": "function", "function": function}

    def opening(self, account: Account) -> bytes:
        """A stream's first events: they name the role, and the tool if one is asked for."""
        del account
        if not self._said.tool:
            return self._event({"delta": {"role": "assistant", "content": ""}})
        begun = {"role": "assistant", "content": None, "tool_calls": [{"index": 0, **self._call("")}]}
        return self._event({"delta": begun})

    def delta(self, text: bytes) -> bytes:
        """An event with some of the text, escaped as JSON wants it."""
        return self._before + text + self._after

    def _end(self) -> Fields:
        return {"delta": {}}

    def closing(self, account: Account) -> bytes:
        """A stream's last events; the account only if it was asked for."""
        end = self._event(self._end(), self.STOPS[self._said.stop])
        if self._tell_usage:
            chunk = {**self._about, "object": self.CHUNK, "choices": [], "usage": self._usage(account)}
            end += b"data: " + orjson.dumps(chunk) + b"\n\n"
        return end + b"data: [DONE]\n\n"

    def _usage(self, account: Account) -> Fields:
        return usage(account, "prompt", "completion", self._writes)

    def _message(self) -> Fields:
        """What a choice of an answer that is not streamed holds."""
        if not self._said.tool:
            return {"message": {"role": "assistant", "content": self._said.text}}
        return {"message": {"role": "assistant", "content": None, "tool_calls": [self._call(self._said.text)]}}

    def whole(self, account: Account) -> bytes:
        """An answer that is not streamed."""
        finish = self.STOPS[self._said.stop]
        choice = {"index": 0, **self._message(), "logprobs": None, "finish_reason": finish}
        return orjson.dumps({**self._about, "object": self.WHOLE, "choices": [choice], "usage": self._usage(account)})


class Completions(Chat):
    """An answer of the completions API, which knows no roles and no tools."""

    IDENT, WHOLE, CHUNK = "cmpl", "text_completion", "text_completion"

    def _part(self, text: str) -> Fields:
        return {"text": text}

    def _end(self) -> Fields:
        return {"text": ""}

    def _message(self) -> Fields:
        return {"text": self._said.text}

    def opening(self, account: Account) -> bytes:
        """There are no events before the text."""
        del account
        return b""
