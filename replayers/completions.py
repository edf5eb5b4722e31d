"""The OpenAI completions dialect, with the prompt as token ids: bodies to send and streams to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from keepwarm.replayers import chat
from keepwarm.replayers.blocks import Block
from keepwarm.replayers.chat import headers

__all__ = ["KEY_ENV", "LIMIT", "NO_TOOL", "PATH", "Reader", "body", "headers"]

PATH = "/v1/completions"
KEY_ENV = "OPENAI_API_KEY"
LIMIT = "max_tokens"
NO_TOOL: Any = None


def body(head: Mapping[str, Any], blocks: Sequence[Block]) -> bytes:
    """A request body: the parameters of ``head`` first, then the prompt, the token ids of all blocks in a row."""
    ids = b",".join(block.text for block in blocks)
    return b"".join((orjson.dumps(head)[:-1], b',"prompt":[', ids, b"]}"))


class Reader(chat.Reader):
    """Takes in an answer of the completions API."""

    def take(self, event: dict[str, Any], now_ns: int) -> None:
        """One event."""
        super().take(event, now_ns)
        if text := chat.choice(event).get("text"):
            self.heard.token(now_ns, text)
