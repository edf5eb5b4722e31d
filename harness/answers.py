"""What an answer says: its account, and the pieces that later prompts will hold. One reader a dialect.

They are the replayers' own readers, which also keep what was said until the answer is over.
"""

import zlib
from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from typing import Any

import orjson
import pyarrow as pa

from keepwarm.harness.bodies import item, json_object, piece, said
from keepwarm.replayers import chat, messages, responses
from keepwarm.replayers.account import account
from keepwarm.replayers.sse import Events, failure, fault, part, string
from keepwarm.traces.identity import Identity, content_bytes
from keepwarm.traces.model import MISS_REASONS, STOP_REASONS
from keepwarm.traces.records import AnswerRecord
from keepwarm.traces.steps import Asked, Usage

Said = list[tuple[Any, int]]
"""What an answer said: its blocks, each with the time when it was whole."""


class _Message(messages.Reader):
    def __init__(self) -> None:
        super().__init__()
        self._blocks: dict[int, dict[str, Any]] = {}
        self._parts: dict[tuple[int, str], list[str]] = {}
        self._ends: dict[int, int] = {}

    def take(self, event: dict[str, Any], now_ns: int) -> None:
        kind = event.get("type")
        super().take(event, now_ns)
        if kind == "content_block_delta":
            index, delta = event["index"], event["delta"]
            for name in ("text", "partial_json", "thinking", "signature"):
                if name in delta:
                    self._parts.setdefault((index, name), []).append(delta[name])
        elif kind == "content_block_start":
            self._blocks[event["index"]] = event["content_block"]
        elif kind == "content_block_stop":
            self._ends[event["index"]] = now_ns
        elif kind == "message_start":
            self._about(event["message"])

    def take_whole(self, body: dict[str, Any]) -> None:
        super().take_whole(body)
        self._about(body)
        self._blocks = dict(enumerate(body.get("content") or ()))

    def _about(self, message: dict[str, Any]) -> None:
        self.ident = string(message.get("id"))
        self.miss = string(part(part(message, "diagnostics"), "cache_miss_reason").get("type"))

    def said(self, now_ns: int) -> Said:
        for (index, name), parts in self._parts.items():
            block, text = self._blocks[index], "".join(parts)
            if name == "partial_json":
                block["input"] = orjson.loads(text) if text else {}
            else:
                block[name] = text
        return [(block, self._ends.get(index, now_ns)) for index, block in sorted(self._blocks.items())]


class _Completion(chat.Reader):
    def __init__(self) -> None:
        super().__init__()
        self._parts: dict[str, list[str]] = {"content": [], "reasoning_content": []}
        self._calls: dict[int, dict[str, Any]] = {}

    def take(self, event: dict[str, Any], now_ns: int) -> None:
        super().take(event, now_ns)
        self._add(event, "delta")

    def take_whole(self, body: dict[str, Any]) -> None:
        super().take_whole(body)
        self._add(body, "message")

    def _add(self, told: dict[str, Any], name: str) -> None:
        self.ident = self.ident or string(told.get("id"))
        delta = part(chat.choice(told), name)
        for name, parts in self._parts.items():
            parts.append(string(delta.get(name)) or "")
        for at, call in enumerate(delta.get("tool_calls") or ()):
            known = self._calls.setdefault(call.get("index", at), {"id": None, "name": "", "arguments": ""})
            known["id"] = string(call.get("id")) or known["id"]
            for name in ("name", "arguments"):
                known[name] += string(part(call, "function").get(name)) or ""

    def said(self, now_ns: int) -> Said:
        content, thought = ("".join(parts) for parts in self._parts.values())
        calls = [{"id": call["id"], "function": call} for call in self._calls.values()]
        blocks = [*([thought] if thought else ()), *said({"content": content, "tool_calls": calls})]
        return [(block, now_ns) for block in blocks]


class _Response(responses.Reader):
    def __init__(self) -> None:
        super().__init__()
        self._items: list[tuple[dict[str, Any], int]] = []

    def take(self, event: dict[str, Any], now_ns: int) -> None:
        super().take(event, now_ns)
        self.ident = self.ident or string(part(event, "response").get("id"))
        if event.get("type") == "response.output_item.done":
            self._items.append((event["item"], now_ns))

    def take_whole(self, body: dict[str, Any]) -> None:
        super().take_whole(body)
        self.ident = string(body.get("id"))
        self._items = self._items or [(one, 0) for one in body.get("output") or ()]

    def said(self, now_ns: int) -> Said:
        return [(block, at_ns or now_ns) for one, at_ns in self._items for _, block in item(one)]


Reader = _Message | _Completion | _Response
"""An answer in the making."""
READERS: dict[str, Callable[[], Reader]] = {"messages": _Message, "chat": _Completion, "responses": _Response}


class Answer:
    """An answer as it passes by: taken in piece by piece, whatever its encoding, and never an error for who sends it.

    Times are ns since 1970. What is no stream, or has an encoding that only whole files are read of, is kept until the
    end; past ``most`` bytes it is let go.
    """

    def __init__(self, dialect: str, status: int, kind: str, encoding: str, most: int) -> None:
        self.reader = READERS[dialect]()
        self.status = status
        self.error: str | None = None
        self._dialect = dialect
        self._encoding = encoding.strip().lower()
        self._events = Events() if kind.lower().startswith("text/event-stream") and status < 300 else None
        self._kept: list[tuple[int, bytes]] = []
        self._most = self._room = most
        zipped = {"gzip": 31, "x-gzip": 31, "deflate": 47}.get(self._encoding)
        self._zipped = zlib.decompressobj(zipped) if zipped else None
        self._live = zipped is not None or self._encoding in ("", "identity")

    def read(self, coming: Iterable[int | bytes]) -> None:
        """Pieces of the body as they came, before each the time when it did."""
        at_ns, events = 0, self._events if self._live else None
        for one in coming:
            if isinstance(one, int):
                at_ns = one
                continue
            self._room -= len(one)
            if self._room < 0:
                self._kept.clear()
            elif events is None:
                self._kept.append((at_ns, one))
            else:
                try:
                    if self._zipped is not None:
                        one = self._zipped.decompress(one, max(1, self._room))
                        self._room -= len(one)
                    for event in events.feed(one):
                        with suppress(Exception):  # one that cannot be read is not the end of the others
                            self.reader.event(event, at_ns)
                except Exception:  # whatever is wrong with it, it passes by
                    self.error = self.error or "other"

    def end(self) -> None:
        """There is no more of it."""
        if self._room < 0:  # let go: what it said is unknown, and that is no error
            self.error = failure(self.status, "", "") if self.status >= 300 else None
            return
        try:
            body = decoded(b"".join(data for _, data in self._kept), self._encoding, self._most)
            if self._events is not None:
                for event in self._events.feed(body):  # it could not be read as it came: all of it came at first
                    with suppress(Exception):
                        self.reader.event(event, self._kept[0][0])
            elif self.status < 300:
                self.reader.whole(body)
            elif body:
                self.reader.heard.fault = fault(orjson.loads(body))
        except Exception:
            self.error = self.error or ("other" if self.status < 300 else None)
        heard = self.reader.heard
        if self.status >= 300 or heard.fault:
            self.error = failure(self.status, *(heard.fault or ("", "")))
        elif self._events is not None:
            self.error = None if heard.finished else self.error or "reset"

    def usage(self) -> tuple[Usage | None, dict[str, Any]]:
        """The account, and what else it tells, in trace columns."""
        told = account(self.reader.heard.usage, self._dialect, extra=False)
        if told["usage_source"] == "absent":
            return None, told
        parts = told["cache_read"], told["cache_write_5m"], told["cache_write_1h"], told["cache_write_other"]
        read, short, long, other = (tokens or 0 for tokens in parts)
        rest = told["prompt"] - read - short - long - other
        return Usage(rest, read, short, long, other, parts[0] is not None, parts[1:] != (None, None, None)), told

    def record(
        self, number: int, identity: Identity, session: str, first_byte_ns: int | None, end_ns: int, error: str | None
    ) -> AnswerRecord:
        """All of it for the journal; ``session`` is the client's own id."""
        self.end()
        usage, told = self.usage()
        reader = self.reader
        streamed = self._events is not None and reader.heard.token_ns
        try:
            blocks = reader.said(end_ns)
            said = tuple([piece(identity, "answer", block) for block, _ in blocks])
            uses = [one for one in blocks if isinstance(one[0], dict) and one[0].get("type") == "tool_use"]
            tools = tuple(_asked(*use, identity, session) for use in uses)
        except Exception:  # it makes no sense, and was passed on
            self.error, said, tools = self.error or "other", (), ()
        return AnswerRecord(
            number=number,
            end_ns=end_ns,
            first_byte_ns=first_byte_ns,
            first_token_ns=reader.heard.token_ns[0] if streamed else None,
            status=self.status,
            error=error or self.error,
            call=identity.name("call", reader.ident) if reader.ident else None,
            usage=usage,
            write_source=told["write_source"],
            output=told.get("output"),
            reasoning=told.get("reasoning"),
            stop_reason=_one_of(reader.heard.stop_reason, STOP_REASONS),
            miss_reason=_one_of(reader.miss, MISS_REASONS),
            said=said,
            tools=tools,
        )


def _one_of(told: str | None, known: Container[str]) -> str | None:
    """A word of the provider's, if it is one that it is known to say."""
    return told if told is None or told in known else "other"


def decoded(body: bytes, encoding: str, most: int) -> bytes:
    """A body without its encoding; ValueError where it would be larger than ``most``, as only a trap is."""
    if encoding in ("", "identity"):
        return body
    if encoding == "deflate":
        whole = zlib.decompressobj(47).decompress(body, most + 1)
    else:
        codec = {"br": "brotli", "x-gzip": "gzip"}.get(encoding, encoding)
        with pa.input_stream(pa.py_buffer(body), compression=codec) as stream:
            whole = bytes(stream.read(most + 1))
    if len(whole) > most:
        raise ValueError(f"more than {most} bytes")
    return whole


def _asked(block: dict[str, Any], at_ns: int, identity: Identity, session: str) -> Asked:
    given = json_object(block["input"])
    prompt = next((text for name in ("prompt", "message", "task") if (text := string(given.get(name)))), None)
    to = string(given.get("to")) if block["name"] == "SendMessage" else None
    kind = string(given.get("subagent_type")) or string(given.get("agent_type"))
    return Asked(
        identity.name("use", str(block.get("id"))),
        identity.tool(str(block["name"])),
        at_ns,
        agent_type=identity.agent_type(kind),
        prompt_hash=identity.hash(content_bytes(prompt)) if prompt and to is None else None,
        behind=given.get("run_in_background") is True,
        to=identity.name("agent", session, to) if to else None,
    )
