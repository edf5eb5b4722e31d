"""The simulated cluster in each of its four dialects: shapes, tools, accounts, and what is one prompt in all."""

from __future__ import annotations

from typing import Any

import httpx
import orjson
import pytest
from serving import account, ask, events, post, said, served, text

from keepwarm.harness.script import Script
from keepwarm.replayers.times import ServiceTimes

ARGUMENTS = {"command": 'cat "é"', "timeout": 5}
FUNCTION = {"name": "Bash", "description": "runs", "parameters": {"type": "object"}}
PATHS = {"messages": "messages", "chat": "chat/completions", "responses": "responses", "completions": "completions"}


def body(dialect: str, words: str, limit: int | None = None) -> dict[str, Any]:
    """A request with one user's words."""
    names = {"messages": "max_tokens", "responses": "max_output_tokens"}
    asked: dict[str, Any] = {"model": "m"} | ({} if limit is None else {names.get(dialect, "max_tokens"): limit})
    if dialect in ("messages", "chat"):
        return asked | {"messages": [said("user", words)]}
    return asked | {"input" if dialect == "responses" else "prompt": words}


def with_tool(dialect: str, words: str, name: str = "Bash") -> dict[str, Any]:
    """The same with a tool on offer."""
    function = FUNCTION | {"name": name}
    if dialect == "chat":
        return body(dialect, words) | {"tools": [{"type": "function", "function": function}]}
    tool = {"type": "function", **function} if dialect == "responses" else {"name": name, "input_schema": {}}
    return body(dialect, words) | {"tools": [tool]}


def called(dialect: str, answer: dict[str, Any]) -> tuple[str, dict[str, Any], str] | None:
    """The id, arguments and name of the tool that an answer asks for, and that its stop reason says so."""
    if dialect == "messages":
        block = answer["content"][0]
        assert (block["type"] == "tool_use") == (answer["stop_reason"] == "tool_use")
        return (block["id"], block["input"], block["name"]) if block["type"] == "tool_use" else None
    if dialect == "chat":
        choice = answer["choices"][0]
        calls = choice["message"].get("tool_calls")
        assert bool(calls) == (choice["finish_reason"] == "tool_calls")
        return (calls[0]["id"], orjson.loads(calls[0]["function"]["arguments"]), "Bash") if calls else None
    item = answer["output"][0]
    if item["type"] != "function_call":
        return None
    return item["call_id"], orjson.loads(item["arguments"]), item["name"]


def go_on(dialect: str, asked: dict[str, Any], answer: dict[str, Any], result: str) -> dict[str, Any]:
    """The request with the answer, and the result of the tool that it asked for or else the user's next words."""
    use = called(dialect, answer)
    if dialect == "responses":
        told: dict[str, Any] = said("user", [{"type": "input_text", "text": result}])
        if use:
            told = {"type": "function_call_output", "call_id": use[0], "output": result}
        before = asked["input"] if isinstance(asked["input"], list) else [said("user", asked["input"])]
        return asked | {"input": [*before, *answer["output"], told]}
    if dialect == "chat":
        told = {"role": "tool", "tool_call_id": use[0], "content": result} if use else said("user", result)
        return asked | {"messages": [*asked["messages"], answer["choices"][0]["message"], told]}
    block = {"type": "tool_result", "tool_use_id": use[0], "content": result} if use else None
    turn = said("user", [block] if block else result)
    return asked | {"messages": [*asked["messages"], said("assistant", answer["content"]), turn]}


TOOLS = [("Bash", ARGUMENTS)]


@pytest.mark.parametrize("dialect", ["messages", "chat", "responses"])
def test_a_session_with_tools_keeps_its_prefix(dialect: str) -> None:
    """Two tool calls and a word, then the user speaks again: ids differ, and each prompt reads all but one of the last
    one's tokens and its answer's."""
    with served(block=1, script=Script(output=7, tools=TOOLS, turns=2)) as client:
        asked, known, uses = with_tool(dialect, text(0, 30)), 0, []
        for turn in range(6):
            answer = post(client, PATHS[dialect], asked)
            use = called(dialect, answer)
            uses.append(use and use[0])
            assert use is None or use[1:] == (ARGUMENTS, "Bash")
            assert account(answer)[1] == known
            known = (
                sum(account(answer))
                + answer["usage"].get("output_tokens", answer["usage"].get("completion_tokens"))
                - 1
            )
            asked = go_on(dialect, asked, answer, text(100 * turn + 100, 10))
    assert [use is not None for use in uses] == [True, True, False, True, True, False]
    assert len(set(uses)) == 5


def test_tools_are_called_only_where_it_makes_sense() -> None:
    """Not those not offered or forbidden, nor in an answer too short for the call; several take turns."""
    tools = [("Bash", ARGUMENTS), ("Read", {"path": "x"})]
    with served(script=Script(tools=tools, turns=3)) as client:
        for more in ({"tool_choice": "none"}, {"max_tokens": 1}, {"tools": []}):
            assert called("chat", post(client, "chat/completions", with_tool("chat", "hello") | more)) is None
        assert called("messages", post(client, "messages", with_tool("messages", "hello", "Zsh"))) is None
        asked = with_tool("messages", "hello")
        asked["tools"] += with_tool("messages", "hello", "Read")["tools"]
        names = []
        for _ in range(4):
            answer = post(client, "messages", asked)
            use = called("messages", answer)
            names.append(use and use[2])
            asked = go_on("messages", asked, answer, "done")
        assert names == ["Bash", "Read", "Bash", None]
    with served() as client:
        assert called("messages", post(client, "messages", with_tool("messages", "hello"))) is None


def test_reminders_beside_results_are_no_users_words() -> None:
    """What a client says of its own beside a result or in a reminder does not begin a new round of tools."""
    with served(script=Script(tools=TOOLS)) as client:
        asked = with_tool("messages", "hello")
        asked = go_on("messages", asked, post(client, "messages", asked), "result")
        asked["messages"][-1]["content"].append({"type": "text", "text": "hurry"})
        asked["messages"].append(said("user", "<system-reminder>be kind</system-reminder>"))
        assert called("messages", post(client, "messages", asked)) is None
        asked["messages"] += [said("assistant", "fine"), said("user", "again")]
        assert called("messages", post(client, "messages", asked)) is not None


def test_dialects_with_roles_share_a_prompt() -> None:
    """The same words of the same role are one prompt in three dialects; plain completions have no roles."""
    with served(block=1) as client:
        reads = [account(post(client, path, body(dialect, text(0, 40), 1)))[1] for dialect, path in PATHS.items()]
    assert reads == [0, 39, 39, 0]


CALL = {"id": "call_1", "type": "function", "function": {"name": "Bash", "arguments": '{"a": 1, "b": [2]}'}}
CHAT = [
    said("system", "be good"),
    said("user", text(0, 8)),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": text(50, 5)},
]
SAME_CHAT = [
    {"content": [{"text": "be good", "type": "text"}], "role": "developer"},
    said("user", [{"type": "text", "text": text(0, 5)}, {"type": "text", "text": text(5, 3)}]),
    said("assistant", "")
    | {"tool_calls": [CALL | {"id": "other", "function": {"arguments": '{"b":[2],"a":1}', "name": "Bash"}}]},
    {"role": "tool", "tool_call_id": "other", "content": [{"type": "text", "text": text(50, 5)}]},
]
ITEMS = [
    said("user", text(0, 8)),
    {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "sealed"},
    {
        "type": "function_call",
        "id": "fc_1",
        "call_id": "c",
        "name": "Bash",
        "arguments": '{"a": 1}',
        "status": "completed",
    },
    {"type": "function_call_output", "call_id": "c", "output": text(50, 5)},
]
SAME_ITEMS = [
    {"type": "message", **said("user", [{"type": "input_text", "text": text(0, 8)}]), "id": "msg_1"},
    {"type": "reasoning", "summary": [], "encrypted_content": "sealed"},
    {"name": "Bash", "type": "function_call", "call_id": "d", "arguments": '{"a":1}'},
    {
        "type": "function_call_output",
        "id": "x",
        "call_id": "d",
        "output": [{"type": "input_text", "text": text(50, 5)}],
    },
]


@pytest.mark.parametrize(
    ("path", "one", "same"),
    [
        ("chat/completions", {"messages": CHAT}, {"messages": SAME_CHAT, "temperature": 1}),
        ("responses", {"input": ITEMS, "instructions": "be good"}, {"instructions": "be good", "input": SAME_ITEMS}),
        ("completions", {"prompt": [10, 20, 30, 40]}, {"prompt": [[10, 20, 30, 40]], "echo": False}),
        ("completions", {"prompt": "a b c d"}, {"prompt": ["a  b\nc d"]}),
    ],
)
def test_what_no_model_sees_changes_nothing(path: str, one: dict[str, Any], same: dict[str, Any]) -> None:
    """String or list, ids, key order and white space in arguments leave a prompt what it is: all but a word is read."""
    with served(block=1) as client:
        total = sum(account(post(client, path, one | {"max_output_tokens": 1, "max_tokens": 1})))
        assert account(post(client, path, same | {"max_output_tokens": 1, "max_tokens": 1})) == (0, total - 1, 1)


def test_a_token_id_is_a_token() -> None:
    """Prompts of ids have as many tokens as ids, and share those that they begin with."""
    with served() as client:
        assert post(client, "completions", {"prompt": [10] * 64, "max_tokens": 1})["usage"]["prompt_tokens"] == 64
        assert account(post(client, "completions", {"prompt": [10] * 40 + [11] * 40, "max_tokens": 1})) == (0, 32, 48)


def test_a_completion_sent_back_is_readable() -> None:
    """Prompt and completion, put together by a client, are read up to the last token computed."""
    with served(block=1) as client:
        answer = post(client, "completions", {"prompt": text(0, 10), "max_tokens": 5})
        more = f"{text(0, 10)} {answer['choices'][0]['text']} more"
        assert account(post(client, "completions", {"prompt": more, "max_tokens": 1}))[1] == 14


def streamed(dialect: str, told: list[Any]) -> tuple[str, Any, Any]:
    """What a stream said, why it ended, and its account."""
    if dialect == "responses":
        assert [event["sequence_number"] for event in told] == list(range(len(told)))
        kinds = [event["type"].removeprefix("response.") for event in told]
        assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
        assert set(kinds[4:-4]) == {"output_text.delta"}
        assert kinds[-4:-1] == ["output_text.done", "content_part.done", "output_item.done"]
        spoken = "".join(event["delta"] for event in told[4:-4])
        final = told[-1]["response"]
        assert kinds[-1] == final["status"]
        assert spoken == told[-4]["text"] == final["output"][0]["content"][0]["text"]
        assert told[-2]["item"] == final["output"][0]
        return spoken, final["status"], final["usage"]
    spoken = "".join(event["choices"][0]["text"] for event in told if event["choices"])
    return spoken, told[-2]["choices"][0]["finish_reason"], told[-1]["usage"]


@pytest.mark.parametrize(("dialect", "limit", "stops"), [
    ("responses", 50, ("incomplete", "incomplete")),
    ("responses", None, ("completed", "completed")),
    ("completions", 50, ("length", "length")),
    ("completions", None, ("stop", "stop")),
])  # fmt: skip
def test_a_stream_tells_what_the_whole_answer_tells(dialect: str, limit: int | None, stops: tuple[str, str]) -> None:
    """The words, the account and the end of a stream are those of the same request not streamed."""
    answers = []
    for more in ({}, {"stream": True, "stream_options": {"include_usage": True}}):
        with served(service=ServiceTimes(0.0, 1e9, 200.0), script=Script(output=60)) as client:
            answers.append(client.post(f"/v1/{PATHS[dialect]}", json=body(dialect, text(0, 40), limit) | more))
    whole, told = answers[0].json(), events(answers[1])
    spoken, stop, usage = streamed(dialect, told)
    assert len(spoken.split(" ")) == (limit or 60)
    assert sum(event.get("type") == "response.output_text.delta" or "choices" in event for event in told) > 1
    assert usage == whole["usage"]
    if dialect == "responses":
        assert (whole["status"], stop) == stops
        assert spoken == whole["output"][0]["content"][0]["text"]
        assert usage["input_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": 32}
    else:
        assert (whole["choices"][0]["finish_reason"], stop) == stops
        assert spoken == whole["choices"][0]["text"]


@pytest.mark.parametrize("dialect", ["messages", "chat", "responses"])
def test_a_tool_call_is_streamed_whole(dialect: str) -> None:
    """The pieces of the arguments make up the arguments, in each dialect's events."""
    with served(script=Script(tools=TOOLS), service=ServiceTimes(0.0, 1e9, 4.0)) as client:
        told = events(client.post(f"/v1/{PATHS[dialect]}", json=with_tool(dialect, "hello") | {"stream": True}))
    if dialect == "messages":
        assert told[1]["content_block"]["input"] == {}
        assert told[-2]["delta"]["stop_reason"] == "tool_use"
        parts = [event["delta"]["partial_json"] for event in told if event["type"] == "content_block_delta"]
    elif dialect == "chat":
        calls = [call for event in told for call in event["choices"][0]["delta"].get("tool_calls", ())]
        assert calls[0]["function"]["name"] == "Bash" and calls[0]["id"] and not any("id" in one for one in calls[1:])
        parts = [call["function"]["arguments"] for call in calls]
    else:
        parts = [event["delta"] for event in told if event["type"] == "response.function_call_arguments.delta"]
        assert told[-1]["type"] == "response.completed"
        assert told[-1]["response"]["output"][0]["arguments"] == "".join(parts)
    assert orjson.loads("".join(parts)) == ARGUMENTS
    assert len(parts) > 1


def test_counting_is_exact() -> None:
    """count_tokens counts what the answer's account adds up to."""
    asked = with_tool("messages", text(0, 17)) | {"system": "be good", "max_tokens": 1}
    with served() as client:
        counted = post(client, "messages/count_tokens", asked)
        assert counted == {"input_tokens": sum(account(post(client, "messages", asked)))}


def isolated(client: httpx.Client, **salted: Any) -> int:
    """What the second of two requests with this salt reads, all else being warm."""
    headers, fields = salted.pop("headers", {}), salted
    asked = {"model": "m", "max_tokens": 1, "messages": [said("user", text(0, 40))], **fields}
    reads = [account(post(client, "messages", asked, **headers))[1] for _ in range(2)]
    assert reads[0] == 0
    return reads[1]


def test_a_salt_sets_a_cache_apart() -> None:
    """Each salt, in a body or as a tenant's header, begins cold and then reads its own; the tokens are as many."""
    with served() as client:
        total = sum(account(ask(client, said("user", text(0, 40)))))
        for salted in (
            {"cache_salt": "a"},
            {"nvext": {"cache_salt": "b"}},
            {"headers": {"x-tenant-id": "c"}, "nvext": {"cache_salt": "a"}},
        ):
            assert isolated(client, **salted) == 32
        assert sum(account(ask(client, said("user", text(0, 40)), cache_salt="d"))) == total
