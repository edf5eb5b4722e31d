"""Identity: keyed hashes of what reaches a model, and pseudonyms for every name that could tell who or where.

One salt an output; without it neither hashes nor pseudonyms can be computed again or compared.
"""

import re
import secrets
from contextlib import suppress
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson

from keepwarm.traces.errors import InputError
from keepwarm.traces.model import NAMES

SALT_BYTES = 32

_MODEL = re.compile(r"[a-zA-Z][\w.\-]{0,63}")
_MODEL_AFFIXES = re.compile(r"^([a-z]{2,6}\.)?(anthropic|amazon|meta|openai|mistral)\.|-v\d+(:\d+)?$|\[\w+\]$")


class Identity:
    """Hashes and pseudonyms under one salt."""

    def __init__(self, salt: bytes) -> None:
        self._keyed = blake2b(key=salt, digest_size=8)

    def _digest(self, data: bytes) -> bytes:
        state = self._keyed.copy()
        state.update(data)
        return state.digest()

    def hash(self, data: bytes) -> int:
        """A signed 64-bit identity of some content."""
        return int.from_bytes(self._digest(data), "big", signed=True)

    def name(self, kind: str, *parts: str) -> str:
        """A pseudonym: the kind's first letter and 16 hex digits."""
        return kind[0] + self._digest("\0".join((kind, *parts)).encode("utf-8", "surrogatepass")).hex()

    def tool(self, name: str) -> str:
        """A tool's name where agents ship with it, else ``mcp:`` or ``tool:`` and a pseudonym."""
        if name in NAMES["tools"]:
            return name
        return ("mcp:" if name.startswith("mcp__") else "tool:") + self.name("tool", name)[1:]

    def model(self, name: str) -> str:
        """A model's bare id, a pseudonym where that could tell whose it is."""
        return _bare_model(name) or "model:" + self.name("model", name)[1:]

    def agent_type(self, name: str | None) -> str | None:
        """A sub-agent's type in lower case where it is a common one, else a pseudonym."""
        if not name:
            return None
        return name.lower() if name.lower() in NAMES["agent_types"] else self.name("type", name)


@lru_cache
def _bare_model(name: str) -> str | None:
    """A model's id without the cloud's address, region, vendor and revision around it; None where what is left could
    tell whose it is.
    """
    last = name.rsplit("/", 1)[-1].replace("@", "-")
    bare = _MODEL_AFFIXES.sub("", last)
    known = not {"/", "@"} & set(name) or "claude" in last
    return bare if known and _MODEL.fullmatch(bare) else None


def content_bytes(block: dict[str, Any] | str) -> bytes:
    """What of a content block reaches the model, in one shape: ids, cache marks, key order and the choice between a
    string and a list of one text change nothing.
    """
    if isinstance(block, str):
        return b"text\0" + block.encode("utf-8", "surrogatepass")
    kind = block.get("type")
    if kind == "text":
        return b"text\0" + str(block["text"]).encode("utf-8", "surrogatepass")
    if kind == "tool_use":
        return b"tool_use\0" + str(block["name"]).encode() + b"\0" + _canonical(block["input"])
    if kind == "tool_result":
        inner = block.get("content") or ""
        parts = [inner] if isinstance(inner, str) else inner
        return b"tool_result\0" + b"\0".join(content_bytes(part) for part in parts)
    if kind == "thinking":
        return b"thinking\0" + str(block["thinking"] + block.get("signature", "")).encode("utf-8", "surrogatepass")
    return _canonical({key: value for key, value in block.items() if key not in ("cache_control", "id")})


def _canonical(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def new_salt() -> bytes:
    """A salt that nobody keeps."""
    return secrets.token_bytes(SALT_BYTES)


def salt_from_file(path: Path) -> bytes:
    """The salt kept in a file, made now (mode 0600) if there is none."""
    with suppress(FileExistsError):
        path.touch(0o600, exist_ok=False)
        path.write_bytes(new_salt())
    salt = path.read_bytes()
    if len(salt) != SALT_BYTES:
        raise InputError(f"{path}: not a salt file: {len(salt)} bytes, expected {SALT_BYTES}")
    return salt
