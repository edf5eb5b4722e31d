"""Endpoint is anything that answers calls: one method, which is also the seam for tests and a user's own."""

from typing import Any, NamedTuple, Protocol

from keepwarm.traces.model import Call


class Piece(NamedTuple):
    """The first ``tokens`` tokens of the segment ``ident``: a segment as a prompt holds it, perhaps cut at its end."""

    ident: int
    tokens: int
    kind: str
    answer_of: str | None = None


class Said(NamedTuple):
    """What an endpoint answered: its text, escaped for JSON, and its tokens."""

    text: bytes
    tokens: int


class Request(NamedTuple):
    """A planned call made ready to be sent.

    ``output`` is how many tokens to answer with: the recorded count, else its estimate, else None. ``answer`` are the
    pieces in which later prompts repeat this call's answer. ``kept`` is what the endpoint keeps of the call's session
    for as long as that runs, None where it is to keep nothing.
    """

    call: Call
    prompt: tuple[Piece, ...]
    output: int | None
    answer: tuple[Piece, ...] = ()
    copy: int = 0
    kept: dict[Any, Any] | None = None


class Answer(NamedTuple):
    """What came of a request. Times are ns on the clock the endpoint was given; failures are values, not exceptions.

    The token account is the endpoint's own report, None where it reported nothing. ``said`` is kept where later prompts
    are to repeat it; ``told`` is an error's text, for people only: it may hold anything. ``head_ns`` is when
    the answer's head came, ``retry_after_s`` what a refusal told to wait.
    """

    sent_ns: int
    done_ns: int
    first_byte_ns: int | None = None
    first_token_ns: int | None = None
    last_token_ns: int | None = None
    token_ns: tuple[int, ...] | None = None
    prompt: int | None = None
    uncached: int | None = None
    cache_read: int | None = None
    cache_write_5m: int | None = None
    cache_write_1h: int | None = None
    cache_write_other: int | None = None
    write_ttl_s: int | None = None
    output: int | None = None
    reasoning: int | None = None
    usage_source: str = "absent"
    write_source: str = "absent"
    usage_extra: str | None = None
    status: int | None = None
    error: str | None = None
    stop_reason: str | None = None
    worker: str | None = None
    said: Said | None = None
    told: str | None = None
    head_ns: int | None = None
    retry_after_s: float | None = None


class Endpoint(Protocol):
    """Anything that answers calls."""

    async def send(self, request: Request) -> Answer:
        """Send one request and wait for the whole answer."""

    async def aclose(self) -> None:
        """Let go of connections."""
