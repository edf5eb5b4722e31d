"""What a request to the simulated endpoint asks for, read from a body of any dialect."""

from hashlib import blake2b
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException

from keepwarm.harness.bodies import NOT_HUMAN, READERS, Blocks, listed
from keepwarm.replayers.sse import part, string
from keepwarm.traces.identity import content_bytes
from keepwarm.traces.model import Breakpoint

DAY_S, HOUR_S, USUAL_S = 86_400, 3600, 300
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
    tell_usage: bool
    tools: frozenset[str]
    results: int


_REMINDERS = tuple(said.encode() for said in NOT_HUMAN)
_SPACES = bytes.maketrans(b"\t\n\v\f\r", b"     ")


class Words:
    """A prompt being taken in, a word a token. A salt makes its first word another one. With ``blocks`` each content
    block is told apart, as vendors' rules do, and not only one kind from another. ``results`` are the tool results
    since the user's last word.
    """

    def __init__(self, salt: str = "", *, blocks: bool = False) -> None:
        self._blocks = blocks
        self._said = [blake2b(salt.encode(), digest_size=16).hexdigest().encode() + b"\0"] if salt else []
        self._answered = True
        self.marks: list[Breakpoint] = []
        self.tokens = self.results = 0
        self.kind = ""

    def add(self, kind: str, block: Any) -> None:
        """One block of some kind, its cache mark with it."""
        if not isinstance(block, str | dict):
            raise HTTPException(400, "content: expected a string or a list of content blocks")
        content = content_bytes(block).removeprefix(b"text\0")
        words = content.translate(_SPACES, b"\0")  # what stands before other NULs becomes part of the next word
        while b"  " in words:  # far faster than split and join, for each pass halves every run of spaces
            words = words.replace(b"  ", b" ")
        words = words.strip(b" ")
        if words:
            named = self._blocks or kind != self.kind
            self._said += (kind.encode(), b"\0", words, b" ") if named else (words, b" ")
            self.tokens += words.count(b" ") + 1
            self.kind = kind
        self.mark(block)
        self._note(kind, words)

    def said(self) -> bytes:
        """All of the words, each with a space behind it."""
        return b"".join(self._said)

    def mark(self, block: Any) -> None:
        """The cache_control mark that a block, or a body for its last one, may have."""
        if control := part(block, "cache_control"):
            self.marks.append(Breakpoint(self.tokens, HOUR_S if control.get("ttl") == "1h" else USUAL_S))

    def _note(self, kind: str, words: bytes) -> None:
        """Count results; clients say something of their own beside them, and remind."""
        if kind == "tool_result":
            self.results, self._answered = self.results + 1, False
        elif kind == "answer":
            self._answered = True
        elif kind == "user" and self._answered and not words.startswith(_REMINDERS):
            self.results = 0


def read(dialect: str, body: dict[str, Any], *, salt: str = "", blocks: bool = False) -> Asked:
    """What a body asks. HTTPException where it is none of the dialect's."""
    _known(dialect, body)
    prompt = Words(salt, blocks=blocks)
    try:
        prompted = _prompted(dialect, body)
        for kind, block in prompted:
            prompt.add(kind, block)
        offered = _offered(body, prompted)
    except KeyError as error:
        raise HTTPException(400, f"a field is missing: {error}") from error
    except (TypeError, AttributeError, RecursionError) as error:
        raise HTTPException(400, f"a field is not of its type: {error}") from error
    if not prompt.tokens:
        raise HTTPException(400, "the prompt is empty")
    prompt.mark(body)
    if dialect != "messages":  # the OpenAI dialects have no marks: all of it is marked
        prompt.marks = [Breakpoint(prompt.tokens, DAY_S if body.get("prompt_cache_retention") == "24h" else USUAL_S)]
    return Asked(
        dialect=dialect,
        model=string(body.get("model")),
        text=prompt.said(),
        tokens=prompt.tokens,
        kind=prompt.kind,
        marks=tuple(prompt.marks),
        output=_output(body, *LIMITS.get(dialect, ("max_tokens",))),
        stream=body.get("stream") is True,
        tell_usage=dialect in ("messages", "responses") or part(body, "stream_options").get("include_usage") is True,
        tools=offered,
        results=prompt.results,
    )


def _prompted(dialect: str, body: dict[str, Any]) -> Blocks:
    """The prompt's blocks."""
    if dialect == "completions":
        return [("text", _completion(body["prompt"]))]
    front, conversation = READERS[dialect](body)
    return [*(("tools", tool) for tool in listed(body.get("tools"))), *front, *conversation]


def _offered(body: dict[str, Any], prompted: Blocks) -> frozenset[str]:
    """The names of the functions that may be called."""
    if body.get("tool_choice") in ("none", {"type": "none"}):
        return frozenset()
    tools = [tool for kind, tool in prompted if kind == "tools" and tool.get("type", "function") == "function"]
    names = (tool.get("name") or (tool.get("function") or {}).get("name") for tool in tools)
    return frozenset(name for name in names if isinstance(name, str))


def _known(dialect: str, body: dict[str, Any]) -> None:
    """Refuse what is not of a dialect's shape, or asks for what this endpoint has not."""
    for name in ("tools", *(("messages",) if dialect in ("messages", "chat") else ())):
        entries = body.get(name) or []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise HTTPException(400, f"{name}: expected a list of objects")
    if dialect in ("messages", "chat"):
        if not body.get("messages"):
            raise HTTPException(400, "messages: at least one message is required")
        for index, message in enumerate(body["messages"]):
            if message.get("role") not in ROLES:
                raise HTTPException(400, f"messages.{index}.role: expected one of {', '.join(ROLES)}")
    elif dialect == "responses":
        if not isinstance(body.get("input"), str | list):
            raise HTTPException(400, "input: expected a string or a list of items")
        if kept := next((name for name in UNKEPT if body.get(name)), None):
            raise HTTPException(400, f"{kept}: not supported: nothing of a conversation is kept between requests")
    if body.get("n") not in (None, 1):
        raise HTTPException(400, "n: only one answer a request is given")


def _completion(told: Any) -> str:
    """The prompt of the completions API: a text or a list of token ids, each of which is a token, or a list of one."""
    if isinstance(told, list) and len(told) == 1 and isinstance(told[0], str | list):
        told = told[0]
    if isinstance(told, list) and all(type(ident) is int and ident >= 0 for ident in told):
        told = " ".join(map(str, told))
    if not isinstance(told, str):
        raise HTTPException(400, "prompt: expected one text or one list of token ids")
    return told


def _output(body: dict[str, Any], *names: str) -> int | None:
    name, output = next(((name, body[name]) for name in names if body.get(name) is not None), ("", None))
    if output is not None and (type(output) is not int or output < 1):
        raise HTTPException(400, f"{name}: expected an integer of at least 1")
    return output
