"""What a request to the simulated endpoint asks for, read from a body of any dialect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import orjson

from keepwarm.harness.bodies import NOT_HUMAN, READERS
from keepwarm.harness.refused import Refused
from keepwarm.traces.model import Breakpoint

DAY_S, HOUR_S, USUAL_S = 86_400, 3600, 300
UNSEEN = frozenset(("cache_control", "id", "tool_use_id", "tool_call_id", "call_id", "signature"))
"""Fields of a content block that no model sees."""
LIMITS = {"chat": ("max_completion_tokens", "max_tokens"), "responses": ("max_output_tokens",)}
"""What the dialects call the most tokens of an answer; the others have one name for it."""
UNKEPT = ("previous_response_id", "conversation", "background", "prompt")
"""What the Responses API keeps for its clients, and this endpoint does not."""
ROLES = ("assistant", "developer", "system", "tool", "user")


class Asked(NamedTuple):
    """``text`` is the prompt's words, each with one space behind it, the first of a kind naming the kind before a NUL,
    so that kinds are part of what is cached and no tokens. ``kind`` is the last one's. ``output`` is None where the
    client set no limit; ``tell_usage`` says whether a stream ends with the token account. ``tools`` are the names of
    the functions offered, ``results`` how many tool results stand after the user's last word.
    """

    dialect: str
    model: str | None
    text: bytes
    tokens: int
    kind: str
    marks: tuple[Breakpoint, ...]
    output: int | None
    stream: bool
    tell_usage: bool = True
    tools: frozenset[str] = frozenset()
    results: int = 0


_SPACES = bytes.maketrans(b"\0\t\n\v\f\r", b"      ")


class Words:
    """A prompt being taken in, a word a token. A salt makes its first word another one. With ``blocks`` each content
    block is told apart, as vendors' rules do, and not only one kind from another.
    """

    def __init__(self, salt: str = "", *, blocks: bool = False) -> None:
        self._blocks = blocks
        self._said = [blake2b(salt.encode(), digest_size=16).hexdigest().encode() + b"\0"] if salt else []
        self._marks: list[Breakpoint] = []
        self._offered: set[str] = set()
        self._results = 0
        self._answered = True
        self.tokens = 0
        self.kind = ""

    def tools(self, tools: Sequence[Any]) -> None:
        """The list of tools."""
        for tool in tools:
            self.add("tools", tool)

    def add(self, kind: str, block: Any) -> None:
        """One block of some kind, its cache mark with it."""
        words = _text(block).encode().translate(_SPACES)
        while b"  " in words:  # far faster than split and join, for each pass halves every run of spaces
            words = words.replace(b"  ", b" ")
        if words := words.strip(b" "):
            named = self._blocks or kind != self.kind
            self._said += (kind.encode(), b"\0", words, b" ") if named else (words, b" ")
            self.tokens += words.count(b" ") + 1
            self.kind = kind
        if isinstance(block, dict):
            self.mark(block.get("cache_control"))
        self._note(kind, block)

    def said(self) -> bytes:
        """All of the words, each with a space behind it."""
        return b"".join(self._said)

    def _note(self, kind: str, block: Any) -> None:
        """Tool results since the user's last word; clients say something of their own beside results, and remind."""
        if kind == "tools" and block.get("type", "function") in ("function", "custom"):
            name = block.get("name") or (block.get("function") or {}).get("name")
            self._offered |= {name} if isinstance(name, str) and block.get("type") != "custom" else set()
        elif kind == "tool_result":
            self._results, self._answered = self._results + 1, False
        elif kind == "answer":
            self._answered = True
        elif kind == "user" and self._answered and not _text(block).startswith(NOT_HUMAN):
            self._results = 0

    def mark(self, control: Any) -> None:
        """A cache_control mark on what was added last."""
        if isinstance(control, dict):
            self._marks.append(Breakpoint(self.tokens, HOUR_S if control.get("ttl") == "1h" else USUAL_S))

    def begin(self) -> None:
        """Nothing is kept of earlier conversations."""

    def body(self, body: dict[str, Any]) -> Asked:
        """All of it, but for what dialects tell each in its own way."""
        model = body.get("model")
        choice = body.get("tool_choice")
        offered = frozenset() if choice == "none" or choice == {"type": "none"} else frozenset(self._offered)
        named, stream = model if isinstance(model, str) else None, body.get("stream") is True
        asked = Asked("", named, self.said(), self.tokens, self.kind, tuple(self._marks), None, stream)
        return asked._replace(tools=offered, results=self._results)


def _text(block: Any) -> str:
    """What of a content block the model sees. List or string, key order and marks make no difference."""
    if block is None or isinstance(block, str):
        return block or ""
    if not isinstance(block, dict):
        raise Refused(400, "content: expected a string or a list of content blocks")
    kind = block.get("type")
    if kind == "text" and isinstance(block.get("text"), str):
        return str(block["text"])
    if kind == "tool_result":
        inner = block.get("content")
        return " ".join(map(_text, inner if isinstance(inner, list) else [inner]))
    seen = {name: value for name, value in block.items() if name not in UNSEEN}
    if kind == "tool_use" and isinstance(seen.get("input"), str):
        seen["input"] = _parsed(seen["input"])
    return orjson.dumps(seen, option=orjson.OPT_SORT_KEYS).decode()


def _parsed(text: str) -> Any:
    """Arguments that a dialect has as a string, as the object that they are."""
    try:
        return orjson.loads(text)
    except ValueError:
        return text


def read(dialect: str, body: dict[str, Any], *, salt: str = "", blocks: bool = False) -> Asked:
    """What a body asks. Refused where it is none of the dialect's."""
    _known(dialect, body)
    prompt = Words(salt, blocks=blocks)
    try:
        asked = _completion(body, prompt) if dialect == "completions" else READERS[dialect](body, prompt)
    except KeyError as error:
        raise Refused(400, f"a field is missing: {error}") from error
    except (TypeError, AttributeError, RecursionError) as error:
        raise Refused(400, f"a field is not of its type: {error}") from error
    if not prompt.tokens:
        raise Refused(400, "the prompt is empty")
    stream_options = body.get("stream_options")
    tell = dialect in ("messages", "responses") or (
        isinstance(stream_options, Mapping) and stream_options.get("include_usage") is True
    )
    output = _output(body, *LIMITS.get(dialect, ("max_tokens",)))
    return asked._replace(dialect=dialect, output=output, tell_usage=tell, marks=_marks(dialect, body, asked))


def _known(dialect: str, body: dict[str, Any]) -> None:
    """Refuse what is not of a dialect's shape, or asks for what this endpoint has not."""
    for name in ("tools", *(("messages",) if dialect in ("messages", "chat") else ())):
        entries = body.get(name) or []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise Refused(400, f"{name}: expected a list of objects")
    if dialect in ("messages", "chat"):
        if not body.get("messages"):
            raise Refused(400, "messages: at least one message is required")
        for index, message in enumerate(body["messages"]):
            if message.get("role") not in ROLES:
                raise Refused(400, f"messages.{index}.role: expected one of {', '.join(ROLES)}")
    elif dialect == "responses":
        if not isinstance(body.get("input"), str | list):
            raise Refused(400, "input: expected a string or a list of items")
        if kept := next((name for name in UNKEPT if body.get(name)), None):
            raise Refused(400, f"{kept}: not supported: this endpoint keeps nothing of a conversation between requests")
    if body.get("n") not in (None, 1):
        raise Refused(400, "n: only one answer a request is given")


def _marks(dialect: str, body: dict[str, Any], asked: Asked) -> tuple[Breakpoint, ...]:
    """The prompt's cache marks. The OpenAI dialects have none: all of it is marked."""
    if dialect == "messages":
        return asked.marks
    return (Breakpoint(asked.tokens, DAY_S if body.get("prompt_cache_retention") == "24h" else USUAL_S),)


def _completion(body: dict[str, Any], prompt: Words) -> Asked:
    """The completions API: a text or a list of token ids, each of which is a token, or a list of one of them."""
    told = body["prompt"]
    if isinstance(told, list) and len(told) == 1 and isinstance(told[0], str | list):
        told = told[0]
    if isinstance(told, list) and all(type(ident) is int and ident >= 0 for ident in told):
        told = " ".join(map(str, told))
    if not isinstance(told, str):
        raise Refused(400, "prompt: expected one text or one list of token ids")
    prompt.add("text", told)
    return prompt.body(body)


def _output(body: dict[str, Any], *names: str) -> int | None:
    for name in names:
        value = body.get(name)
        if value is not None:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise Refused(400, f"{name}: expected an integer of at least 1")
            return value
    return None
