"""The token account: usage objects of every provider in outcome columns, and what no usage object may become."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
import usages
from hypothesis import example, given, settings
from hypothesis import strategies as st
from usages import Body

from keepwarm.replayers.account import account

DIALECTS = ("messages", "chat", "responses", "completions")
WRITES = ("cache_write_5m", "cache_write_1h", "cache_write_other")
COLUMNS = ("prompt", "uncached", "cache_read", *WRITES, "write_ttl_s", "output", "reasoning")
REPORTED, INFERRED, ABSENT = "reported", "inferred", "absent"
"""What ``write_source`` says."""


def columns(told: Body | None, dialect: str) -> tuple[Any, ...]:
    """The numbers in the order of COLUMNS, then ``write_source``."""
    out = account(told, dialect)
    assert out["usage_source"] == "reported"
    return *(out[name] for name in COLUMNS), out["write_source"]


def extra(told: Body, dialect: str = "chat") -> Any:
    """What was not understood, None for nothing."""
    text = account(told, dialect)["usage_extra"]
    return None if text is None else json.loads(text)


N = None


@pytest.mark.parametrize(
    ("name", "dialect", "expected"),
    [
        ("ANTHROPIC_5M_1H", "messages", (4096, 2048, 1800, 148, 100, 0, 3600, 503, N, REPORTED)),
        ("ANTHROPIC_1H", "messages", (5427, 3, 0, 0, 5424, 0, 3600, 40, 12, REPORTED)),
        ("VLLM_MESSAGES", "messages", (1988, 4, 1952, N, N, 32, N, 6, N, REPORTED)),
        ("VLLM_CHAT", "chat", (1987, 3, 1952, N, N, 32, N, 5, N, REPORTED)),
        ("VLLM_CHAT", "completions", (1987, 3, 1952, N, N, 32, N, 5, N, REPORTED)),
        ("VLLM_RESPONSES", "responses", (1985, 1, 1952, N, N, 32, N, 4, 0, REPORTED)),
        ("DYNAMO_COLD", "messages", (892, 892, 0, N, N, 0, N, 6, N, REPORTED)),
        ("DYNAMO_WARM", "messages", (892, 12, 880, N, N, 0, N, 6, N, REPORTED)),
        ("DYNAMO_RESPONSES", "responses", (656, 16, 640, N, N, N, N, 5, 0, INFERRED)),
        ("OPENAI_CHAT", "chat", (2006, 86, 1920, N, N, N, N, 300, 0, INFERRED)),
        ("OPENAI_RESPONSES", "responses", (2600, 200, 2000, N, N, 400, N, 300, 64, REPORTED)),
        ("SGLANG", "chat", (516, 4, 512, N, N, N, N, 4, N, INFERRED)),
        ("SGLANG_SILENT", "chat", (516, N, N, N, N, N, N, 4, N, ABSENT)),
        ("DEEPSEEK", "chat", (100, 20, 80, N, N, N, N, 50, N, INFERRED)),
        ("MOONSHOT", "chat", (19, 9, 10, N, N, N, N, 21, N, INFERRED)),
        ("MOONSHOT_TWICE", "chat", (1336, 56, 1280, N, N, N, N, 31, N, INFERRED)),
        ("GEMINI", "chat", (19588, 1185, 18403, N, N, N, N, 213, 144, INFERRED)),
        ("GEMINI_NO_TOTAL", "chat", (9, 9, 0, N, N, N, N, 5, 3, INFERRED)),
        ("GEMINI_THOUGHT_ONLY", "chat", (21, 21, 0, N, N, N, N, 60, 60, INFERRED)),
        ("GEMINI_AS_OPENAI", "chat", (20, N, N, N, N, N, N, 198, N, ABSENT)),
        ("BEDROCK_PLAIN", "chat", (15, 15, 0, N, N, 0, N, 395, N, REPORTED)),
        ("BEDROCK", "chat", (1310, 10, 800, 300, 200, 0, 3600, 50, N, REPORTED)),
        ("OPENROUTER", "chat", (194, 94, 0, N, N, 100, N, 2, 0, REPORTED)),
        ("XAI", "chat", (10120, 9992, 128, N, N, N, N, 4308, 2809, INFERRED)),
        ("LITELLM", "chat", (2006, 86, 1920, N, N, 0, N, 300, 0, REPORTED)),
        ("LITELLM_REST", "chat", (1284, 31, 0, N, N, 1253, N, 467, N, REPORTED)),
        ("LITELLM_SPLIT", "chat", (117, 7, 80, 10, 20, 0, 3600, 5, N, REPORTED)),
        ("PORTKEY", "chat", (2825, 4, 0, N, N, 2821, N, 97, N, REPORTED)),
        ("PORTKEY_LONG", "chat", (5821, 3000, 0, N, N, 2821, N, 97, N, REPORTED)),
        ("QWEN", "chat", (2059, 11, 0, 2048, N, 0, 300, 201, 170, REPORTED)),
    ],
)
def test_every_layout_becomes_disjoint_parts(name: str, dialect: str, expected: tuple[Any, ...]) -> None:
    """Whatever the provider calls them and however it splits them, the parts sum to the prompt where they are known."""
    found = columns(getattr(usages, name), dialect)
    assert found == expected
    if found[1] is not None:
        assert sum(tokens or 0 for tokens in found[1:6]) == found[0]


@pytest.mark.parametrize(
    ("told", "dialect", "left"),
    [
        (usages.ANTHROPIC_5M_1H | {"service_tier": "standard"}, "messages", {"service_tier": "standard"}),
        (usages.VLLM_RESPONSES, "responses", None),
        (usages.DYNAMO_RUNNING, "messages", None),
        (usages.SGLANG, "chat", None),
        (usages.DEEPSEEK, "chat", None),
        (usages.DEEPSEEK | {"prompt_cache_miss_tokens": 21}, "chat", {"prompt_cache_miss_tokens": 21}),
        (usages.MOONSHOT_TWICE, "chat", None),
        (usages.MOONSHOT_TWICE | {"cached_tokens": 1281}, "chat", {"cached_tokens": 1281}),
        (usages.GEMINI, "chat", None),
        (usages.GEMINI_AS_OPENAI, "chat", {"total_tokens": 623}),
        (usages.BEDROCK, "chat", None),
        (usages.XAI, "chat", None),
        (usages.QWEN, "chat", {"prompt_tokens_details": {"text_tokens": 2059, "cache_type": "ephemeral"}}),
        (usages.LITELLM_REST, "chat", {"total_tokens": 498}),
        (usages.LITELLM_SPLIT, "chat", None),
        (
            *(usages.OPENROUTER, "chat"),
            {
                "cost": 0.95,
                "cost_details": {"upstream_inference_cost": 19},
                "prompt_tokens_details": {"audio_tokens": 0},
            },
        ),
    ],
)
def test_what_is_not_understood_is_kept(told: Body, dialect: str, left: Body | None) -> None:
    """As it was seen, and where it was; what only repeats the account is not kept unless it disagrees with it."""
    assert extra(told, dialect) == left


def test_a_field_left_out_is_no_zero() -> None:
    """Only the lengths told: nothing is known of the cache. Null is not left out; and with a total that has no parts
    beside it, a server that knows of writes still says nothing of reads.
    """
    for dialect, told in (
        ("messages", {"input_tokens": 10, "output_tokens": 2}),
        ("responses", {"input_tokens": 10, "output_tokens": 2, "input_tokens_details": {}}),
        ("chat", {"prompt_tokens": 10, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": None}}),
    ):
        assert columns(told, dialect) == (10, N, N, N, N, N, N, 2, N, ABSENT)
    null = usages.DYNAMO_COLD | {"cache_read_input_tokens": None}
    assert columns(null, "messages") == (892, N, N, N, N, 0, N, 6, N, REPORTED)
    assert columns({"prompt_tokens": 9, "cache_creation_input_tokens": 4}, "chat")[1:3] == (N, N)
    hidden = {"promptTokenCount": 4583, "cacheTokensDetails": [{"modality": "TEXT", "tokenCount": 2047}]}
    assert columns(hidden, "chat")[2] is None  # googleapis/python-genai issue 795


@pytest.mark.parametrize("told", [None, {}, {"output_tokens": 2}, {"input_tokens": -1}, {"prompt_tokens": True}])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_without_a_prompt_there_is_no_account(told: Body | None, dialect: str) -> None:
    """What was told is kept, but none of it as a number."""
    kept = orjson.dumps(told).decode() if told else None
    assert account(told, dialect) == {"usage_source": "absent", "write_source": "absent", "usage_extra": kept}


@pytest.mark.parametrize(
    ("details", "expected"),
    [
        ({"cached_tokens": 101}, (N, N, N, ABSENT)),
        ({"cached_tokens": 60, "cache_write_tokens": 41}, (40, 60, N, INFERRED)),
        ({"cached_tokens": 60, "cache_write_tokens": 40}, (0, 60, 40, REPORTED)),
        ({"cache_write_tokens": 101}, (N, N, N, ABSENT)),
        ({"cached_tokens": -1, "cache_write_tokens": 7}, (N, N, 7, REPORTED)),
        ({"cached_tokens": 6.0}, (N, N, N, ABSENT)),
        ({"cached_tokens": "6"}, (N, N, N, ABSENT)),
        ({"cached_tokens": 1 << 40}, (N, N, N, ABSENT)),
    ],
)
def test_a_part_that_cannot_hold_is_unknown_and_kept(details: Body, expected: tuple[Any, ...]) -> None:
    """More read, or read and written, than was sent: the prompt stands, the part does not, and shows in the extra."""
    told = {"prompt_tokens": 100, "completion_tokens": 1, "prompt_tokens_details": details}
    found = account(told, "chat")
    assert (found["prompt"], found["output"]) == (100, 1)
    assert tuple(found[name] for name in ("uncached", "cache_read", "cache_write_other", "write_source")) == expected
    kept = (extra(told) or {}).get("prompt_tokens_details", {})
    held = [value for value in expected[1:3] if value is not None]
    assert kept == {name: value for name, value in details.items() if value not in held}


def test_ttls_that_exceed_their_sum_are_dropped() -> None:
    """The sum holds; what its parts were is unknown. Reasoning beyond the output is none of it."""
    split = {"ephemeral_5m_input_tokens": 200, "ephemeral_1h_input_tokens": 100}
    told = usages.ANTHROPIC_5M_1H | {"cache_creation": split, "output_tokens_details": {"thinking_tokens": 504}}
    assert columns(told, "messages") == (4096, 2048, 1800, N, N, 248, N, 503, N, REPORTED)
    assert extra(told, "messages") == {"cache_creation": split, "output_tokens_details": {"thinking_tokens": 504}}
    alone = {"input_tokens": 5, "output_tokens": 1, "cache_creation": split}
    assert columns(alone, "messages") == (305, 5, 0, 200, 100, 0, 3600, 1, N, REPORTED)


def test_writes_of_one_ttl_told_twice_are_left_alone() -> None:
    """Bedrock tells each TTL once; a list that does not is kept as it is, and the sum of all writes holds."""
    rows = [{"inputTokens": 200, "ttl": "5m"}, {"inputTokens": 300, "ttl": "5m"}]
    told = usages.BEDROCK | {"cacheDetails": rows}
    assert columns(told, "chat") == (1310, 10, 800, N, N, 500, N, 50, N, REPORTED)
    assert extra(told) == {"cacheDetails": rows}


def test_what_merely_equals_a_count_is_none() -> None:
    """True and 1.0 stand in no count's place, and are kept."""
    told = {
        "prompt_tokens": 1,
        "prompt_tokens_details": {"cached_tokens": 1},
        "cached_tokens": True,
        "total_tokens": 1.0,
    }
    assert columns(told, "chat")[:3] == (1, 0, 1)
    assert extra(told) == {"cached_tokens": True, "total_tokens": 1.0}


def test_a_dialects_own_words_come_first() -> None:
    """Gateways fill in the other dialect's names with zeros. Among its own, OpenAI's come before an engine's."""
    told = {"prompt_tokens": 9, "completion_tokens": 2, "input_tokens": 0, "output_tokens": 0}
    assert columns(told, "chat")[0] == 9
    assert columns(told, "responses")[0] == 0
    assert extra(told, "chat") == {"input_tokens": 0, "output_tokens": 0}
    both = {"cache_write_tokens": 1, "created_cache_tokens": 2}
    assert columns({"prompt_tokens": 9, "prompt_tokens_details": both}, "chat")[5] == 1


def test_extra_is_compact_sorted_and_bounded() -> None:
    """A value too long is null, its name stays; where names alone are too long, or too deep to write, there is none."""
    told = {"prompt_tokens": 1, "z": 1, "a": {"y": None, "b": [1, 2], "a": ""}}
    assert account(told, "chat")["usage_extra"] == '{"a":{"b":[1,2]},"z":1}'
    long = {"long": "x" * 2000, "longer": ["y"] * 900, "short": "s" * 800}
    nulled = {"a": {"b": [1, 2]}, "long": None, "longer": None, "short": "s" * 800, "z": 1}
    assert extra(told | long) == nulled
    assert extra(told | {f"name {number}": number for number in range(200)}) is None
    deep: Any = 1
    for _ in range(1000):
        deep = {"d": deep}
    assert account(told | {"deep": deep}, "chat")["usage_extra"] is None


TOKENS = st.integers(0, 300) | st.none()
ODD = st.sampled_from([-1, 1 << 29, 1 << 80, 2.5, float("nan"), True, False, "12", "", [], [3], {}, {"x": 1}])
VALUES = TOKENS | TOKENS | ODD


def bodies(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Body]:
    """Usage objects of any layout or a mix of several, from the samples' own names, with these values."""
    names = "ANTHROPIC_1H VLLM_CHAT VLLM_RESPONSES DEEPSEEK MOONSHOT GEMINI BEDROCK OPENROUTER LITELLM_SPLIT QWEN"
    samples = [getattr(usages, name) for name in names.split()]

    def like(sample: Body) -> st.SearchStrategy[Body]:
        parts = {name: like(part) if isinstance(part, dict) else values for name, part in sample.items()}
        if "cacheDetails" in parts:
            row = st.fixed_dictionaries(
                {}, optional={"ttl": st.sampled_from(["5m", "1h", "1d", []]), "inputTokens": values}
            )
            parts["cacheDetails"] = st.lists(row | values, max_size=3)
        return st.fixed_dictionaries({}, optional=parts) | (st.builds(dict) if sample in samples else values)

    return st.lists(st.sampled_from(samples).flatmap(like), min_size=1, max_size=3).map(
        lambda parts: {name: value for part in parts for name, value in part.items()}
    )


@settings(max_examples=300, deadline=None)
@given(bodies(VALUES), st.sampled_from(DIALECTS))
@example({"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 3}}, "chat")
@example({"inputTokens": 5, "cacheDetails": [{"ttl": [], "inputTokens": 1}]}, "chat")
def test_no_account_is_impossible(told: Body, dialect: str) -> None:
    """Whatever is told: no error, nothing negative, no more in the parts than in the whole, and extra that is JSON."""
    before = json.dumps(told)
    out = account(told, dialect)
    assert json.dumps(told) == before
    assert out["usage_extra"] is None or (len(out["usage_extra"]) <= 1000 and json.loads(out["usage_extra"]))
    if out["usage_source"] == "absent":
        assert set(out) == {"usage_source", "write_source", "usage_extra"}
        return
    numbers = {name: out[name] for name in COLUMNS}
    assert all(value is None or (type(value) is int and 0 <= value <= 1 << 30) for value in numbers.values())
    parts = [out[name] for name in ("uncached", "cache_read", *WRITES)]
    if out["uncached"] is None:
        assert out["cache_read"] is None
        assert sum(part or 0 for part in parts) <= out["prompt"]
    else:
        assert sum(part or 0 for part in parts) == out["prompt"]
    assert (out["write_source"] == "reported") == (out["cache_write_other"] is not None)
    assert out["output"] is None or (out["reasoning"] or 0) <= out["output"]


@settings(max_examples=200, deadline=None)
@given(bodies(st.integers(1, 300)), st.sampled_from(DIALECTS))
def test_nothing_missing_is_zero(told: Body, dialect: str) -> None:
    """Where no zero is told, only a sum or a remainder may be zero; a column of its own is told, or None. Not so in the
    two layouts that leave out a zero.
    """
    out = account(told, dialect)
    if out["usage_source"] == "reported" and "promptTokenCount" not in told:
        leaves_out = "inputTokens" in told or (dialect == "messages" and "input_tokens" in told)
        alone = [name for name in ("cache_read", *WRITES[:2], "output", "reasoning") if out[name] == 0]
        assert alone in ([], ["cache_read"] if leaves_out and out["write_source"] == "reported" else [])
