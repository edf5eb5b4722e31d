"""The token account of a call: what a provider's ``usage`` object says in outcome columns, whatever its layout.

Whose fields are read: Anthropic, OpenAI (chat, Responses), vLLM, SGLang, Dynamo, DeepSeek, Gemini, Bedrock,
OpenRouter, xAI, Moonshot, Qwen, and gateways such as LiteLLM and Portkey that mix two of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from keepwarm.replayers.sse import count

HOUR_S = 3600
MOST_EXTRA = 1000
"""How many bytes of fields that are not understood an outcome keeps."""

Path = tuple[str, ...]
NAMES: dict[str, list[Path]] = {
    number: [tuple(name.split(".")) for name in names.split()]
    for number, names in {
        "input": "prompt_tokens input_tokens inputTokens promptTokenCount",
        "output": "completion_tokens output_tokens outputTokens candidatesTokenCount",
        "total": "total_tokens totalTokens totalTokenCount",
        "read": """prompt_tokens_details.cached_tokens input_tokens_details.cached_tokens cache_read_input_tokens
            prompt_cache_hit_tokens cached_tokens cacheReadInputTokens cachedContentTokenCount""",
        "missed": "prompt_cache_miss_tokens",
        "written": """prompt_tokens_details.cache_write_tokens prompt_tokens_details.created_cache_tokens
            prompt_tokens_details.cache_creation_input_tokens prompt_tokens_details.cache_creation_tokens
            input_tokens_details.cache_write_tokens input_tokens_details.created_cache_tokens
            cache_creation_input_tokens cacheWriteInputTokens""",
        "short": """cache_creation.ephemeral_5m_input_tokens cacheDetails.5m
            prompt_tokens_details.cache_creation.ephemeral_5m_input_tokens
            prompt_tokens_details.cache_creation_token_details.ephemeral_5m_input_tokens""",
        "long": """cache_creation.ephemeral_1h_input_tokens cacheDetails.1h
            prompt_tokens_details.cache_creation.ephemeral_1h_input_tokens
            prompt_tokens_details.cache_creation_token_details.ephemeral_1h_input_tokens""",
        "reasoning": """completion_tokens_details.reasoning_tokens output_tokens_details.reasoning_tokens
            output_tokens_details.thinking_tokens reasoning_tokens thoughtsTokenCount""",
    }.items()
}
"""What providers call each number; the first that is a count holds, those in the dialect's own words before others."""

OWN = {"messages": ("input_tokens", "output_", "cache_"), "responses": ("input_", "output_")}
"""How the names of a dialect's own fields begin; those of the others begin as chat's do."""

Numbers = dict[str, int | None]


def account(told: Mapping[str, Any] | None, dialect: str) -> dict[str, Any]:
    """The account in outcome columns; what was not told, or cannot hold, is None.

    Input that a cache has part in is told as a whole by most, as the rest beside the cached parts by Anthropic and
    Bedrock, and by gateways either way: they mean the rest where the parts exceed it, or where their total counts both.
    In a rest the untold stands as nothing. A field left out means none in two places only: Google's, whose JSON omits
    zeros, and the read of a rest that goes with a write, because Dynamo omits a read of zero there and always tells
    the write; a server that tells neither knows nothing of caches. ``usage_extra`` is JSON of the fields that are not
    understood, contradict others or cannot hold, a value null where it would be too long; empty ones say nothing.
    """
    fields = dict(_fields(told or {}))
    first = OWN.get(dialect, ("prompt_", "completion_"))
    where = {number: _where(fields, names, first) for number, names in NAMES.items()}
    got: Numbers = {number: fields[path] if path else None for number, path in where.items()}
    if where["input"] is None:
        return {"usage_source": "absent", "write_source": "absent", "usage_extra": _extra(fields, {})}
    rest = where["input"] == ("inputTokens",) or (dialect == "messages" and where["input"] == ("input_tokens",))
    _fill(got, fields, rest, google=where["input"] == ("promptTokenCount",))
    prompt = _split(got, rest or _is_rest(got, fields))
    output = _answer(got, prompt, google=where["input"] == ("promptTokenCount",))
    read, written, short, long = (got[name] for name in ("read", "written", "short", "long"))
    return {
        "prompt": prompt,
        "uncached": None if read is None else prompt - read - (written or 0),
        "cache_read": read,
        "cache_write_5m": short,
        "cache_write_1h": long,
        "cache_write_other": None if written is None else written - (short or 0) - (long or 0),
        "write_ttl_s": HOUR_S if long else 300 if short else None,
        "output": output,
        "reasoning": got["reasoning"],
        "usage_source": "reported",
        "write_source": "reported" if written is not None else "inferred" if read is not None else "absent",
        "usage_extra": _extra(fields, got),
    }


def _fields(told: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Each field under its path; Bedrock's list of writes under their TTLs."""
    for name, value in told.items():
        if name == "cacheDetails" and isinstance(value, list):
            by_ttl = {str(row.get("ttl")): row.get("inputTokens") for row in value if isinstance(row, dict)}
            value = by_ttl if len(by_ttl) == len(value) else value
        if isinstance(value, Mapping) and len(path) < 2:
            yield from _fields(value, (*path, name))
        else:
            yield (*path, name), value


def _where(fields: Mapping[Path, Any], names: list[Path], first: tuple[str, ...]) -> Path | None:
    told = (name for name in names if count(fields.get(name)) is not None)
    return min(told, key=lambda name: not name[0].startswith(first), default=None)


def _fill(got: Numbers, fields: Mapping[Path, Any], rest: bool, *, google: bool) -> None:
    """What was left out and means none, and the sum of writes that were told by their TTLs alone."""
    if got["written"] is None and (got["short"] is not None or got["long"] is not None):
        got["written"] = (got["short"] or 0) + (got["long"] or 0)
    for name in ("read", "output", "reasoning") if google else ("read",) if rest and got["written"] is not None else ():
        if not any(path in fields for path in (*NAMES[name], ("cacheTokensDetails",))):
            got[name] = 0


def _is_rest(got: Numbers, fields: Mapping[Path, Any]) -> bool:
    """Whether a gateway's input is the rest: only those that name the parts as Anthropic does tell it so."""
    if not fields.keys() & {("cache_read_input_tokens",), ("cache_creation_input_tokens",)}:
        return False
    told, parts = got["input"] or 0, (got["read"] or 0) + (got["written"] or 0)
    return parts > told or (parts > 0 and got["total"] == told + parts + (got["output"] or 0))


def _split(got: Numbers, rest: bool) -> int:
    """The whole prompt; parts that it has no room for are dropped."""
    prompt = got["input"] or 0
    if rest:
        prompt += (got["read"] or 0) + (got["written"] or 0)
    elif (got["read"] or 0) > prompt:
        got["read"] = None
    if (got["written"] or 0) > prompt - (got["read"] or 0):
        got["written"] = None
    if (got["short"] or 0) + (got["long"] or 0) > (got["written"] or 0):
        got["short"] = got["long"] = None
    if got["read"] is None or got["missed"] != prompt - got["read"]:
        got["missed"] = None
    return prompt


def _answer(got: Numbers, prompt: int, *, google: bool) -> int | None:
    """All of the output: reasoning is a part of it, but Google and xAI tell it beside; so shows xAI's total."""
    output, reasoning = got["output"], got["reasoning"] or 0
    if output is not None and (google or (reasoning and got["total"] == prompt + output + reasoning)):
        output += reasoning
    if output is not None and reasoning > output:
        got["reasoning"] = None
    if got["total"] != prompt + (output or 0):
        got["total"] = None
    return output


def _extra(fields: Mapping[Path, Any], got: Numbers) -> str | None:
    known = {path: got.get(number) for number, names in NAMES.items() for path in names}
    extra: dict[str, Any] = {}
    for path, value in fields.items():
        understood = known.get(path) is not None and count(value) == known[path]
        if not understood and value not in (None, "", [], {}):
            inner = extra
            for name in path[:-1]:
                inner = inner.setdefault(name, {})
            inner[path[-1]] = value
    try:
        sizes = {name: len(orjson.dumps(value)) for name, value in extra.items()}
        for name in sorted(sizes, key=lambda name: -sizes[name]):
            if len(orjson.dumps(extra)) > MOST_EXTRA:
                extra[name] = None
        text = orjson.dumps(extra, option=orjson.OPT_SORT_KEYS).decode()
    except TypeError:  # nested too deep
        return None
    return text if extra and len(text) <= MOST_EXTRA else None
