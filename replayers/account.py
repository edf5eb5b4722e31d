"""The token account of a call: what a provider's ``usage`` object says in outcome columns, whatever its layout.

Whose fields are read: Anthropic, OpenAI (chat, Responses), vLLM, SGLang, Dynamo, DeepSeek, Gemini, Bedrock,
OpenRouter, xAI, Moonshot, Qwen, and gateways such as LiteLLM and Portkey that mix two of these.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import orjson

from keepwarm.replayers.sse import count
from keepwarm.traces.shipped import shipped

HOUR_S = 3600
MOST_EXTRA = 1000
"""How many characters of fields that are not understood an outcome keeps."""

Path = tuple[str, ...]
NUMBERS: dict[Path, str] = {
    tuple(name.split(".")): number
    for number, names in shipped("keepwarm.replayers", "usage.toml").items()
    for name in names
}
"""What providers call each number; the first that is a count holds, those in the dialect's own words before others."""

OWN = {"messages": ("input_", "output_", "cache_"), "responses": ("input_", "output_")}
"""How the names of a dialect's own fields begin; those of the others begin as chat's do."""

Counts = dict[str, int | None]
UNKNOWN: Counts = dict.fromkeys(NUMBERS.values())


def account(told: Mapping[str, Any] | None, dialect: str, *, extra: bool = True) -> dict[str, Any]:
    """The account in outcome columns; what was not told, or cannot hold, is None.

    Most tell the whole input; Anthropic and Bedrock tell the rest beside the cached parts, in which sum the untold
    stands as nothing; gateways do either (see ``_is_rest``). A field that was left out means none in two places only:
    Google's, whose JSON omits zeros, and the read beside such a rest where the written part is told, because Dynamo
    leaves out just a read of zero there. A server that tells neither part knows nothing of caches: None.
    ``usage_extra`` is JSON of the fields that are not understood, disagree with the account or cannot hold; a value
    that is too long is null there, and empty ones are left out; it is None where no ``extra`` is wanted.
    """
    told = _keyed(told or {})
    fields = _fields(told, (), {})
    counts = tuple(path for path, value in fields.items() if path in NUMBERS and count(value) is not None)
    where = _where(counts, OWN.get(dialect, ("prompt_", "completion_")))
    if "input" not in where:
        left = _extra(told, {}) if extra else None
        return {"usage_source": "absent", "write_source": "absent", "usage_extra": left}
    got: Counts = UNKNOWN | {number: fields[path] for number, path in where.items()}
    rest = where["input"] == ("inputTokens",) or (dialect == "messages" and where["input"] == ("input_tokens",))
    google = where["input"] == ("promptTokenCount",)
    _fill(got, fields, rest, google)
    prompt = _split(got, rest or _is_rest(got, fields))
    output = _answer(got, prompt, google)
    read, written, short, long = got["read"], got["written"], got["short"], got["long"]
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
        "usage_extra": _extra(told, got) if extra else None,
    }


def _keyed(told: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same with Bedrock's list of writes as a mapping from TTL to tokens, where it is such a list."""
    if "cacheDetails" in told:
        with suppress(TypeError, KeyError):
            rows = {row["ttl"]: row["inputTokens"] for row in told["cacheDetails"]}
            return {**told, "cacheDetails": rows} if 0 < len(rows) == len(told["cacheDetails"]) else told
    return told


def _fields(told: Mapping[str, Any], path: Path, found: dict[Path, Any]) -> dict[Path, Any]:
    """All fields, down to the third level, by their paths."""
    for name, value in told.items():
        inner = (*path, name)
        found[inner] = value
        if len(path) < 2 and isinstance(value, dict):
            _fields(value, inner, found)
    return found


@lru_cache(1 << 10)
def _where(counts: Sequence[Path], own: tuple[str, ...]) -> dict[str, Path]:
    """Which field each number is taken from, of those that are counts."""
    told = [path for path in reversed(NUMBERS) if path in counts]
    return {NUMBERS[path]: path for path in sorted(told, key=lambda path: path[0].startswith(own))}  # the last holds


def _fill(got: Counts, fields: Mapping[Path, Any], rest: bool, google: bool) -> None:
    """Puts in what was left out and means none, and the sum of writes that were told by their TTLs alone."""
    if got["written"] is None and (got["short"] is not None or got["long"] is not None):
        got["written"] = (got["short"] or 0) + (got["long"] or 0)
    names = ("read", "output", "reasoning") if google else ("read",) if rest and got["written"] is not None else ()
    for name in names:
        if got[name] is None and name not in map(NUMBERS.get, fields) and ("cacheTokensDetails",) not in fields:
            got[name] = 0


def _is_rest(got: Counts, fields: Mapping[Path, Any]) -> bool:
    """Whether a gateway's input is the rest beside parts that it names as Anthropic does: they exceed it, or its total
    counts both.
    """
    told, parts = got["input"] or 0, (got["read"] or 0) + (got["written"] or 0)
    beside = parts > told or (parts > 0 and got["total"] == told + parts + (got["output"] or 0))
    return beside and bool(fields.keys() & {("cache_read_input_tokens",), ("cache_creation_input_tokens",)})


def _split(got: Counts, rest: bool) -> int:
    """The whole prompt; takes away parts that it has no room for."""
    prompt = (got["input"] or 0) + ((got["read"] or 0) + (got["written"] or 0) if rest else 0)
    if (got["read"] or 0) > prompt:
        got["read"] = None
    if (got["written"] or 0) > prompt - (got["read"] or 0):
        got["written"] = None
    if (got["short"] or 0) + (got["long"] or 0) > (got["written"] or 0):
        got["short"] = got["long"] = None
    if got["read"] is None or got["missed"] != prompt - got["read"]:
        got["missed"] = None
    return prompt


def _answer(got: Counts, prompt: int, google: bool) -> int | None:
    """All of the output: reasoning is a part of it, but beside it at Google's and, as their total shows, at xAI's."""
    output, reasoning = got["output"], got["reasoning"] or 0
    if output is not None and (google or (reasoning and got["total"] == prompt + output + reasoning)):
        output += reasoning
    if output is not None and reasoning > output:
        got["reasoning"] = None
    if got["total"] != prompt + (output or 0):
        got["total"] = None
    return output


def _extra(told: Mapping[str, Any], got: Counts) -> str | None:
    extra = _unread(told, got)
    with suppress(TypeError):  # nested deeper than JSON is written
        for name in (None, *sorted(extra, key=lambda name: -len(orjson.dumps(extra[name])))) if extra else ():
            extra |= {name: None} if name else {}
            text = orjson.dumps(extra, option=orjson.OPT_SORT_KEYS).decode()
            if len(text) <= MOST_EXTRA:
                return text
    return None


def _unread(told: Mapping[str, Any], got: Counts, path: Path = ()) -> dict[str, Any]:
    """What is not understood, disagrees or cannot hold, but what is empty."""
    found = {}
    for name, value in told.items():
        inner = (*path, name)
        known = got.get(NUMBERS.get(inner, ""))
        left = _unread(value, got, inner) if isinstance(value, dict) and len(path) < 2 else value
        if left not in (None, "", [], {}) and (known is None or count(value) != known):
            found[name] = left
    return found
