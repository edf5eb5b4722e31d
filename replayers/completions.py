"""The OpenAI completions dialect, with the prompt as token ids: how a body is written."""

from keepwarm.replayers.blocks import Block
from keepwarm.replayers.chat import Reader
from keepwarm.replayers.dialect import Dialect


def fragment(before: str, block: Block) -> bytes:
    """The token ids of a block, behind those of others."""
    return (b"," if before else b',"prompt":[') + block.text


def end(before: str) -> bytes:
    """What closes the prompt and the body."""
    return b"]}" if before else b',"prompt":[]}'


COMPLETIONS = Dialect("/v1/completions", fragment, end, Reader, no_tool=None)
