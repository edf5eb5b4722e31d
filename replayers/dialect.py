"""Dialect is an API's way to be asked: how it writes a prompt, where to post it, and who reads its answers."""

from collections.abc import Callable
from typing import Any, NamedTuple

from keepwarm.replayers.blocks import Block
from keepwarm.replayers.sse import Reader


class Dialect(NamedTuple):
    """``fragment`` is a block but for its mark and its end, with the end of the one of the role before, empty for none;
    ``end`` closes the last block, of that role, and the body; ``mark`` stands behind the fragment of a block up to
    which the prompt is to be cached. ``headers`` are what the API wants in every request, given a key that it takes in
    another header than most. ``key_env`` is where its vendor's key is, ``limit`` the name of the output's limit,
    ``no_tool`` the tool_choice that has no tool called, None where there are no tools.
    """

    path: str
    fragment: Callable[[str, Block], bytes]
    end: Callable[[str], bytes]
    reader: type[Reader]
    headers: Callable[[str | None], dict[str, str]] = lambda key: {}
    key_env: str = "OPENAI_API_KEY"
    limit: str = "max_tokens"
    no_tool: Any = "none"
    mark: Callable[[int], bytes] = lambda ttl_s: b""
