"""The OpenAI completions dialect, with the prompt as token ids: bodies to send and streams to read."""

from typing import Any

from keepwarm.replayers import chat
from keepwarm.replayers.blocks import Block
from keepwarm.replayers.dialect import Dialect


def fragment(before: str, block: Block) -> bytes:
    """The token ids of a block, behind those of others."""
    return (b"," if before else b',"prompt":[') + block.text


def end(before: str) -> bytes:
    """What closes the prompt and the body."""
    return b"]}" if before else b',"prompt":[]}'


class Reader(chat.Reader):
    """Takes in an answer of the completions API."""

    def take(self, event: dict[str, Any], now_ns: int) -> None:
        """One event."""
        super().take(event, now_ns)
        if text := chat.choice(event).get("text"):
            self.heard.token(now_ns, text)


COMPLETIONS = Dialect("/v1/completions", fragment, end, Reader, no_tool=None)
