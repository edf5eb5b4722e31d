"""Answers of the simulated endpoint in the Responses API."""

from __future__ import annotations

import time
from itertools import count
from typing import Any

import orjson

from keepwarm.harness import answered_chat
from keepwarm.harness.answered import Account, event
from keepwarm.harness.script import Said

Fields = dict[str, Any]
UNSAID: Fields = dict.fromkeys(("error", "instructions", "previous_response_id", "temperature", "top_p"))
UNSAID |= {"metadata": {}, "parallel_tool_calls": True, "store": False, "tool_choice": "auto", "tools": []}
"""What every response of the API has and none of these needs."""


class Responses:
    """An answer of the Responses API: one item, a message or a function call."""

    error = staticmethod(answered_chat.error)

    def __init__(self, said: Said, model: str, *, tell_usage: bool = True, writes: str | None = None) -> None:
        del tell_usage
        self._writes = writes and "cache_write_tokens"
        self._said = said
        self._numbers = count()
        self._item_id = f"{'fc' if said.tool else 'msg'}_{said.ident}"
        self._about = {"id": f"resp_{said.ident}", "object": "response", "created_at": int(time.time()), "model": model}
        self._where: Fields = {"item_id": self._item_id, "output_index": 0}
        if not said.tool:
            self._where["content_index"] = 0
        self._kind = "response.function_call_arguments" if said.tool else "response.output_text"
        more: Fields = {} if said.tool else {"logprobs": []}
        told = event(f"{self._kind}.delta", **self._where, **more, delta="%", sequence_number=0)
        self._before, self._between, self._after = told.replace(b":0}\n", b":%}\n").split(b"%")

    def _event(self, kind: str, **fields: Any) -> bytes:
        return event(kind, **fields, sequence_number=next(self._numbers))

    def _response(self, status: str, account: Account | None = None) -> Fields:
        """The response as it is at some time; whole with an account."""
        told = {
            "status": status,
            "output": [self._item(self._said.text, "completed")] if account else [],
            "usage": self._usage(account) if account else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        }
        return {**self._about, **told, **UNSAID}

    def _item(self, text: str, status: str) -> Fields:
        """The answer's one item."""
        item: Fields = {"id": self._item_id, "status": status}
        if self._said.tool:
            call_id = f"call_{self._said.ident}"
            return {**item, "type": "function_call", "call_id": call_id, "name": self._said.tool, "arguments": text}
        content = [self._part(text)] if status == "completed" else []
        return {**item, "type": "message", "role": "assistant", "content": content}

    @staticmethod
    def _part(text: str) -> Fields:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def opening(self, account: Account) -> bytes:
        """A stream's first events, up to the item's beginning."""
        del account
        begun = [
            self._event(f"response.{kind}", response=self._response("in_progress"))
            for kind in ("created", "in_progress")
        ]
        begun.append(self._event("response.output_item.added", output_index=0, item=self._item("", "in_progress")))
        if not self._said.tool:
            begun.append(self._event("response.content_part.added", **self._where, part=self._part("")))
        return b"".join(begun)

    def delta(self, text: bytes) -> bytes:
        """An event with some of the text, escaped as JSON wants it."""
        return self._before + text + self._between + b"%d" % next(self._numbers) + self._after

    def closing(self, account: Account) -> bytes:
        """A stream's last events, which hold all of it again."""
        text = self._said.text
        if self._said.tool:
            ended = self._event(f"{self._kind}.done", **self._where, name=self._said.tool, arguments=text)
        else:
            ended = self._event(f"{self._kind}.done", **self._where, text=text, logprobs=[])
            ended += self._event("response.content_part.done", **self._where, part=self._part(text))
        ended += self._event("response.output_item.done", output_index=0, item=self._item(text, "completed"))
        return ended + self._event(f"response.{self._status}", response=self._response(self._status, account))

    @property
    def _status(self) -> str:
        return "completed" if self._said.stop in ("end", "tool") else "incomplete"

    def whole(self, account: Account) -> bytes:
        """An answer that is not streamed."""
        return orjson.dumps(self._response(self._status, account))

    def _usage(self, account: Account) -> Fields:
        told = answered_chat.usage(account, "input", "output", self._writes)
        return {**told, "output_tokens_details": {"reasoning_tokens": 0}}
