"""The OpenAI chat completions dialect: bodies to send, token accounts and streams to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from keepwarm.replayers import sse
from keepwarm.replayers.endpoint import Request
from keepwarm.replayers.sse import count, fault, part, string
from keepwarm.replayers.text import PromptText, roles

PATH = "/v1/chat/completions"
KEY_ENV = "OPENAI_API_KEY"
WRITES = ("cache_write_tokens", "created_cache_tokens")
"""What OpenAI and vLLM call the tokens newly cached."""


def headers(key: str | None) -> dict[str, str]:
    """What the API wants in every request; ``key`` None for an endpoint that asks for none."""
    return {"authorization": f"Bearer {key}"} if key else {}


def body(
    request: Request, *, text: PromptText, model: str, stream: bool = True, extra: Mapping[str, Any] | None = None
) -> bytes:
    """A request body: parameters (and ``extra`` ones) first, then the prompt, one message a run of pieces of one role,
    its content a string, because that is the shape every server takes. A prompt that grew from another has the other's
    bytes from ``messages`` on up to where they part.
    """
    prompt = [piece for piece in request.prompt if piece.tokens]
    head: dict[str, Any] = {"model": model, "max_tokens": request.output or 1, "stream": stream}
    if stream:
        head["stream_options"] = {"include_usage": True}
    out = [orjson.dumps(head | dict(extra or {}))[:-1], b',"messages":[']
    before = None
    for piece, role in zip(prompt, roles(prompt), strict=True):
        if role == before:
            out.append(b" ")
        else:
            out += (b'"},' if before else b"", b'{"role":"', role.encode(), b'","content":"')
        out.append(text.fragment(piece))
        before = role
    out.append(b'"}]}' if before else b"]}")
    return b"".join(out)


def usage(told: Mapping[str, Any] | None) -> dict[str, Any]:
    """The API's token account in outcome columns."""
    return openai_account(told, "prompt", "completion")


def openai_account(told: Mapping[str, Any] | None, prompt_name: str, output_name: str) -> dict[str, Any]:
    """An account in which ``<prompt_name>_tokens`` are all of the prompt, in outcome columns; what was not reported is
    None; writes have no TTL that the API would tell.
    """
    prompt = count(told.get(f"{prompt_name}_tokens")) if told else None
    if told is None or prompt is None:
        return {"usage_source": "absent", "write_source": "absent"}
    details = part(told, f"{prompt_name}_tokens_details")
    read = count(details.get("cached_tokens"))
    written = next((tokens for name in WRITES if (tokens := count(details.get(name))) is not None), None)
    return {
        "prompt": prompt,
        "uncached": None if read is None else max(prompt - read - (written or 0), 0),
        "cache_read": read,
        "cache_write_other": written,
        "output": count(told.get(f"{output_name}_tokens")),
        "reasoning": count(part(told, f"{output_name}_tokens_details").get("reasoning_tokens")),
        "usage_source": "reported",
        "write_source": "reported" if written is not None else "inferred" if read is not None else "absent",
    }


_SAID = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")


class Reader(sse.Reader):
    """Takes in an answer of the chat completions API."""

    def take(self, event: dict[str, Any], now_ns: int) -> None:
        """One event. A first one that names the role and says nothing is no token."""
        if event.get("error"):
            self.heard.fault = fault(event)
        self.heard.usage = part(event, "usage") or self.heard.usage
        choice = _choice(event)
        delta = part(choice, "delta")
        if any(delta.get(name) for name in _SAID):
            self.heard.token_ns.append(now_ns)
        self.heard.stop_reason = string(choice.get("finish_reason")) or self.heard.stop_reason

    def take_whole(self, body: dict[str, Any]) -> None:
        """The whole of it."""
        choice = _choice(body)
        self.heard.usage = part(body, "usage") or None
        self.heard.stop_reason = string(choice.get("finish_reason"))
        self.heard.finished = bool(choice)


def _choice(event: dict[str, Any]) -> dict[str, Any]:
    choices = event.get("choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
