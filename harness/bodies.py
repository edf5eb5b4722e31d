"""What a request's body says: its prompt as pieces, what the client put in, marks, hints. One function a dialect."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import orjson

from keepwarm.replayers.sse import count, part, string
from keepwarm.traces.identity import Identity, content_bytes
from keepwarm.traces.model import Hints
from keepwarm.traces.steps import Input, Piece
from keepwarm.traces.thread import CHARACTER_TOKENS, PIECE_TOKENS

TTL_5M, TTL_1H = 300, 3600
NEWS = ("<task-notification>", "<subagent_notification>")
NEWS_OF = re.compile(r'(?:<task-id>|"agent_path": ?")([\w/-]+)')
"""How Claude Code and Codex tell an agent that another one has ended."""
NEWS_WITHIN = 600
NOT_HUMAN = ("<system-reminder>", "This session is being continued from", "Another language model started to solve")
"""What the two say in a user's place: reminders, and the summary that a conversation goes on from."""
CHILDREN = re.compile(r'^\{"(?:(?:agent_id|task_name)": ?"([\w/-]+)|status": ?\{(.*))', re.DOTALL)
CHILD = re.compile(r'"([0-9a-f-]{36})": ?\{"(?!running|pending)')
"""How Codex's tools name the agent that was started, and those that were waited for."""
SUMMARISES = (
    "create a detailed summary of the conversation",
    "CONTEXT CHECKPOINT COMPACTION",
    "Provide a detailed prompt for continuing our conversation",
)
"""What Claude Code, Codex and OpenCode say in the request that compacts a conversation."""

KNOWN_BYTES, MOST_KNOWN = 1 << 14, 1 << 11
"""Blocks up to that size are remembered, up to that number: each call says again all that was said before."""

_OFFER, _KNOWN = b'"tools":', b'"tools":0'
_DIGITS = bytes.maketrans(b"123456789", b"000000000")
_UNSEEN = ("id", "status", "internal_chat_message_metadata_passthrough")
_CLIENTS = dict.fromkeys(("agent_message", "compaction_trigger", "compaction"), "user")
_WEIGHTS = {"tools": 0.25, "system": 0.25, **CHARACTER_TOKENS}
_PICTURES = ("image", "input_image", "image_url", "document")

Blocks = list[tuple[str, Any]]
"""A prompt's blocks in the order in which a model sees them, each with its kind."""


class Offer(NamedTuple):
    """A list of tools as it stands in bodies: most of a request by size, and rarely another than before."""

    raw: bytes
    pieces: Sequence[Piece]
    marks: Sequence[tuple[int, int]]


class Body(NamedTuple):
    """A request as its body tells it, ``model`` empty where it does not. ``inputs`` are what the client put in since
    the last answer, with the number of the piece that each is; ``marks`` how many pieces each mark stands behind, and
    its TTL in seconds. ``compacts`` where the request asks for a summary of the conversation; the conversation comes
    after ``front`` pieces.
    """

    model: str = ""
    stream: bool | None = None
    pieces: Sequence[Piece] = ()
    inputs: Sequence[tuple[int, Input]] = ()
    marks: tuple[tuple[int, int], ...] = ()
    compacts: bool = False
    hints: Hints | None = None
    front: int = 0


@dataclass
class Pieces:
    """A prompt being taken apart. ``session`` is the client's own id of it, ``at_ns`` when it came; ``offer`` are its
    tools where they are known, ``before`` is what the provider has of the conversation already.
    """

    identity: Identity
    at_ns: int
    session: str
    keep_text: bool = False
    offer: Offer | None = None
    before: Sequence[Piece] = ()
    pieces: list[Piece] = field(default_factory=list)
    marks: list[tuple[int, int]] = field(default_factory=list)
    compacts: bool = False
    _since: list[tuple[int, Any]] = field(default_factory=list)

    def _add(self, kind: str, block: Any) -> None:
        """One block of some kind, its cache mark with it."""
        if kind == "answer":
            self._since.clear()
        elif kind != "tools":
            self._since.append((len(self.pieces), block))
        self.pieces.append(piece(self.identity, kind, block, self.keep_text))
        self._mark(block)

    def _mark(self, block: Any) -> None:
        """The cache_control mark that a block, or a body for its last one, may have."""
        if control := part(block, "cache_control"):
            self.marks.append((len(self.pieces), TTL_1H if control.get("ttl") == "1h" else TTL_5M))

    def _inputs(self, piece: Piece, block: Any) -> list[Input]:
        given = Input(piece.kind, piece.hash, piece.weight, self.at_ns)
        if piece.kind == "tool_result":
            return self._result(given, block)
        if _type(block) == "agent_message":
            return [self._message(given, block)]
        text = block if isinstance(block, str) else str(block.get("text") or "")
        if piece.kind == "user":
            self.compacts = any(said in text for said in SUMMARISES) or _type(block) == "compaction_trigger"
        news = NEWS_OF.search(text) if any(tag in text[:NEWS_WITHIN] for tag in NEWS) else None
        if news is not None:
            return [given._replace(agent=self._agent(news[1]))]
        human = bool(text) and not text.startswith(NOT_HUMAN)
        return [given._replace(human=human)] if piece.kind == "user" else []

    def _message(self, given: Input, block: dict[str, Any]) -> Input:
        """What one agent of Codex told another: its last words, or to the new one its task, which gives it a name."""
        told = str(block.get("content"))[:NEWS_WITHIN]
        if "Message Type: FINAL_ANSWER" in told:
            return given._replace(agent=self._agent(string(block.get("author")) or ""))
        if "Message Type: NEW_TASK" in told:
            return given._replace(agent=self._agent(string(block.get("recipient")) or ""), launched=True)
        return given

    def _result(self, given: Input, block: dict[str, Any]) -> list[Input]:
        """A tool's result; what started an agent tells its name, what waited for some tells theirs."""
        use, failed = string(block.get("tool_use_id")), block.get("is_error")
        name = self.identity.name("use", use) if use else None
        given = given._replace(tool_use=name, is_error=failed if isinstance(failed, bool) else None)
        content = block.get("content")
        text = content[0] if isinstance(content, list) and len(content) == 1 else content
        told = CHILDREN.match(text) if isinstance(text, str) else None
        if told is None:
            return [given]
        if told[1]:
            return [given._replace(agent=self._agent(told[1]), launched=True)]
        return [given, *(given._replace(tool_use=None, agent=self._agent(one)) for one in CHILD.findall(told[2]))]

    def _agent(self, name: str) -> str:
        return self.identity.name("agent", self.session, name)

    def body(self, dialect: str, body: dict[str, Any]) -> Body:
        """All of a request's body."""
        front, conversation = READERS[dialect](body)
        if self.offer is not None:
            self.pieces += self.offer.pieces
            self.marks += self.offer.marks
        elif tools := listed(body.get("tools")):
            for tool in tools:
                self._add("tools", tool)
            self.offer = Offer(_OFFER + orjson.dumps(tools), tuple(self.pieces), tuple(self.marks))
        for kind, block in front:
            self._add(kind, block)
        begun = len(self.pieces)
        self.pieces += self.before
        for kind, block in conversation:
            self._add(kind, block)
        self._mark(body)
        model = self.identity.model(told) if (told := string(body.get("model"))) else ""
        stream = body.get("stream") is True
        inputs = [(at, given) for at, block in self._since for given in self._inputs(self.pieces[at], block)]
        return Body(model, stream, self.pieces, inputs, tuple(self.marks), self.compacts, hints(body), begun)


def piece(identity: Identity, kind: str, block: Any, keep_text: bool = False) -> Piece:
    """A block as a piece."""
    content = content_bytes(block)
    made = _made if len(content) <= KNOWN_BYTES else _made.__wrapped__
    return made(identity, kind, _type(block), content, keep_text)


@lru_cache(MOST_KNOWN)
def _made(identity: Identity, kind: str, name: str, content: bytes, keep_text: bool) -> Piece:
    """A block of that type as a piece. Dates and counters stand in a client's own words: other blocks need no shape."""
    hash_ = identity.hash(content)
    shape = identity.hash(content.translate(_DIGITS)) if kind in ("system", "user") else hash_
    weight = PIECE_TOKENS["image"] if name in _PICTURES else len(content) * _WEIGHTS[kind] + PIECE_TOKENS.get(name, 0)
    told = content[content.find(b"\0") + 1 :].replace(b"text\0", b"") if keep_text else b""
    text = told.replace(b"\0", b"\n").decode("utf-8", "replace") if keep_text else None
    return Piece(kind, hash_, shape, weight, text)


def _type(block: Any) -> str:
    return str(block.get("type")) if isinstance(block, dict) else ""


def opened(body: bytes, offers: Iterable[Offer]) -> tuple[dict[str, Any], Offer | None]:
    """A body as an object, and its tools if they are among the known ones; then they are not read again."""
    at = body.find(_OFFER)
    offer = next((one for one in offers if body.startswith(one.raw, at)), None)
    if offer is not None:
        known = orjson.loads(body[:at] + _KNOWN + body[at + len(offer.raw) :])
        if known.get("tools") == 0:  # else a list like it stands somewhere deeper
            return known, offer
    return orjson.loads(body), None


def listed(value: Any) -> Sequence[Any]:
    """A list as it is, one thing alone, or nothing."""
    if value is None or value == "":
        return ()
    return value if isinstance(value, list) else (value,)


def parsed(arguments: Any) -> Any:
    """A tool's arguments, which the OpenAI dialects have as a string, as what they are."""
    try:
        return orjson.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def json_object(text: Any) -> dict[str, Any]:
    """The JSON object that a text is; empty where it is none."""
    told = parsed(text)
    return told if isinstance(told, dict) else {}


def messages(body: dict[str, Any]) -> tuple[Blocks, Blocks]:
    """The Messages API. Some messages are the system's too."""
    front = [("system", block) for block in listed(body.get("system"))]
    told = ((message["role"], block) for message in listed(body["messages"]) for block in listed(message["content"]))
    return front, [(_kind(role, block), block) for role, block in told]


def _kind(role: str, block: Any) -> str:
    if role == "user" and _type(block).endswith("tool_result"):
        return "tool_result"
    return {"system": "system", "developer": "system", "assistant": "answer"}.get(role, "user")


def chat(body: dict[str, Any]) -> tuple[Blocks, Blocks]:
    """The chat completions API."""
    blocks: Blocks = []
    for message in listed(body["messages"]):
        role, content = message["role"], [_text(part) for part in listed(message.get("content"))]
        if role == "tool":
            told = {"type": "tool_result", "tool_use_id": message.get("tool_call_id"), "content": content}
            blocks.append(("tool_result", told))
        else:
            blocks += ((_kind(role, block), block) for block in (said(message) if role == "assistant" else content))
    return [], blocks


def said(message: dict[str, Any]) -> list[Any]:
    """The blocks of an assistant's message of the chat API."""
    blocks = [_text(part) for part in listed(message.get("content"))]
    for call in listed(message.get("tool_calls")):
        name, given = call["function"]["name"], call["function"]["arguments"]
        blocks.append({"type": "tool_use", "id": call.get("id"), "name": name, "input": parsed(given)})
    return blocks


def _text(block: Any) -> Any:
    """A text block of the OpenAI dialects in the one shape that identity knows."""
    if isinstance(block, dict) and isinstance(block.get("text"), str):
        return block["text"]
    return block


def responses(body: dict[str, Any]) -> tuple[Blocks, Blocks]:
    """The Responses API."""
    front = [("system", block) for block in listed(body.get("instructions"))]
    return front, [block for entry in listed(body.get("input")) for block in item(entry)]


def item(entry: Any) -> Blocks:
    """The blocks of an item of the Responses API, each with its kind."""
    if isinstance(entry, str):
        return [("user", entry)]
    kind = entry.get("type") or "message"
    if kind == "message":
        return [(_kind(entry["role"], block), _text(block)) for block in listed(entry["content"])]
    if kind.endswith("_output"):
        content = [_text(part) for part in listed(entry.get("output"))]
        return [("tool_result", {"type": "tool_result", "tool_use_id": entry.get("call_id"), "content": content})]
    if kind in ("function_call", "custom_tool_call"):
        asked = parsed(entry.get("arguments")) if kind == "function_call" else entry.get("input")
        return [("answer", {"type": "tool_use", "id": entry.get("call_id"), "name": entry["name"], "input": asked})]
    if kind == "additional_tools":
        return [("tools", tool) for tool in entry["tools"]]
    seen = {name: value for name, value in entry.items() if name not in _UNSEEN}
    return [({"configuration_update": "system", **_CLIENTS}.get(kind, "answer"), seen)]


def hints(body: dict[str, Any]) -> Hints | None:
    """The scheduling hints in a body, as ``nvext`` has them."""
    told, cache = part(part(body, "nvext"), "agent_hints"), part(part(body, "nvext"), "cache_control")
    prefill, ttl = told.get("speculative_prefill"), str(cache.get("ttl") or "")[:9]
    seconds = {"s": 1, "m": 60, "h": 3600}.get(ttl[-1:], 0)
    found = Hints(
        priority=_signed(told.get("priority")),
        strict_priority=count(told.get("strict_priority")),
        osl=count(told.get("osl")),
        speculative_prefill=prefill if isinstance(prefill, bool) else None,
        ttl_s=count(int(ttl[:-1]) * seconds) if seconds and ttl[:-1].isdecimal() else None,
    )
    return None if found == Hints() else found


def _signed(value: Any) -> int | None:
    """A number that may be negative; None for anything else."""
    return value if isinstance(value, int) and (count(value) is not None or count(-value) is not None) else None


READERS = {"messages": messages, "chat": chat, "responses": responses}
"""What a body's prompt says besides tools: what stands before the conversation, and the conversation."""
