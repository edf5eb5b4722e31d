"""Server-sent events cut from a byte stream, and what an answer has told so far."""

from typing import Any

import orjson

MOST_TOKENS = 1 << 28
"""No call has more: a larger count is a slip of who tells it, and its sums would not fit a trace."""


class Events:
    """Cuts a stream of bytes, however it is chunked, into the data of its events."""

    def __init__(self) -> None:
        self._rest: list[bytes] = []
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of each event that the chunk completes."""
        if b"\n" not in chunk:
            self._rest.append(chunk)  # a line may be megabytes
            return []
        *lines, rest = (b"".join((*self._rest, chunk)) if self._rest else chunk).split(b"\n")
        self._rest = [rest] if rest else []
        found, data = [], self._data
        for line in lines:
            if line[:5] == b"data:":
                data.append(line[5:].removesuffix(b"\r").removeprefix(b" "))
            elif data and (not line or line == b"\r"):
                found.append(b"\n".join(data))
                data.clear()
        return found


class Heard:
    """What an answer has told so far. ``token_ns`` are the arrival times of events that carried output; ``usage`` is
    the API's own token account, None until the final one came; ``fault`` the type and text of an error it told;
    ``text`` what was said, None where nobody asked to keep it; ``worker`` who answered, where that is told.
    """

    __slots__ = ("fault", "finished", "stop_reason", "text", "token_ns", "usage", "worker")

    def __init__(self) -> None:
        self.token_ns: list[int] = []
        self.text: list[str] | None = None
        self.worker: str | None = None
        self.usage: dict[str, Any] | None = None
        self.stop_reason: str | None = None
        self.fault: tuple[str, str] | None = None
        self.finished = False

    def token(self, now_ns: int, text: Any) -> None:
        """An event that carried output, and its text if it has one."""
        self.token_ns.append(now_ns)
        self.says(text)

    def routed(self, event: dict[str, Any]) -> None:
        """What Dynamo tells of its worker, in ``nvext``."""
        told = part(part(event, "nvext"), "worker_id").get("decode_worker_id")
        self.worker = self.worker if told is None else str(told)

    def says(self, text: Any) -> None:
        """Keep what was said, if it is to be kept."""
        if self.text is not None and isinstance(text, str):
            self.text.append(text)


class Reader:
    """Takes in an answer: the events of a stream as they come, or the whole of it. What they mean is its dialect's.
    ``ident`` is the provider's own id of it, ``miss`` its word on a cache miss, where the dialect reads them.
    """

    ident: str | None = None
    miss: str | None = None

    def __init__(self) -> None:
        self.heard = Heard()

    def event(self, data: bytes, now_ns: int) -> None:
        """One event's data."""
        if data == b"[DONE]":
            self.heard.finished = True
        elif isinstance(event := orjson.loads(data), dict):
            self.take(event, now_ns)

    def whole(self, data: bytes) -> None:
        """The body of an answer that was not streamed."""
        if isinstance(body := orjson.loads(data), dict):
            self.take_whole(body)

    def take(self, event: dict[str, Any], now_ns: int) -> None:
        """One event."""

    def take_whole(self, body: dict[str, Any]) -> None:
        """The whole of it."""


def part(value: Any, name: str) -> dict[str, Any]:
    """The object that stands under a name in another; empty where there is none."""
    inner = value.get(name) if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) else {}


def count(value: Any) -> int | None:
    """A number of tokens; None for anything else that stands in its place."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS else None


def string(value: Any) -> str | None:
    """A string; None for anything else that stands in its place."""
    return value if isinstance(value, str) else None


def fault(body: Any) -> tuple[str, str]:
    """Type and text of an error as the dialects tell it, ``{"error": {"type": …, "message": …}}``, or servers do that
    tell it barely.
    """
    error = part(body, "error") or (body if isinstance(body, dict) else {})
    kinds = [text for name in ("type", "code") if (text := string(error.get(name)))]
    texts = [text for name in ("message", "error", "detail") if (text := string(error.get(name)))]
    return " ".join(kinds), " ".join(texts)


def failure(status: int, kind: str, message: str) -> str:
    """The class of an error that an endpoint told by status or in its stream (then ``status`` is 200)."""
    told = f"{kind} {message}".lower()
    if status == 413 or "context_length" in told or "context length" in told or "prompt is too long" in told:
        return "overflow"
    if status == 429 or "rate_limit" in told:
        return "rate_limit"
    if status in (503, 529) or "overloaded" in told:
        return "overloaded"
    if status in (401, 403) or "authentication" in told or "permission" in told:
        return "auth"
    if status in (408, 504) or "timeout_error" in told:
        return "timeout"
    return "bad_request" if status in (400, 422) or "invalid_request" in told else "other"
