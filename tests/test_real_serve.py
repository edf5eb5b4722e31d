"""Real clients against ``keepwarm serve``: the vendors' own packages, Claude Code, Codex and AIPerf.

Each completes a session of several turns with tools, and what it was told of its tokens is what the cluster's metrics
say. ``tests/real/install.sh`` fetches the clients; the test of an absent one skips.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families
from real.codex import BINARY as CODEX
from real.recording import KEEPWARM
from real.scenes import BINARY as CLAUDE
from real.scenes import SETTINGS

HERE = Path(__file__).parent / "real"
SDKS, AIPERF = HERE / ".cache/sdks", HERE / ".cache/aiperf/bin"
BLOCK = 16
TIMES = ["--base-s", "0", "--prefill-tps", "1e9", "--decode-tps", "5000", "--block", str(BLOCK)]
ABSENT = "run tests/real/install.sh"

pytestmark = pytest.mark.slow


@contextmanager
def serving(*options: str, **tools: dict[str, Any]) -> Iterator[str]:
    """``keepwarm serve`` with a model that calls these tools; its URL."""
    calls = [f"--tool={name}={orjson.dumps(arguments).decode()}" for name, arguments in tools.items()]
    command = [*KEEPWARM, "serve", "--port", "0", *TIMES, *calls, *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        told = server.stderr.readline()
        try:
            assert " at http" in told, told + server.stderr.read()
            yield told.rsplit(" ", 1)[-1].strip()
        finally:
            server.terminate()


def counted(url: str) -> dict[str, float]:
    """The cluster's own counters, by name."""
    page = httpx.get(url + "/metrics", trust_env=False).text
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    names = {sample.name for sample in samples}
    return {name.removeprefix("vllm:"): sum(s.value for s in samples if s.name == name) for name in names}


def package(name: str) -> ModuleType:
    """A vendor's package; its test skips where it is absent."""
    if SDKS.is_dir() and str(SDKS) not in sys.path:
        sys.path.append(str(SDKS))
    return pytest.importorskip(name, reason=f"no {name}: {ABSENT}")


LONG = " ".join(f"word{number}" for number in range(200))
WEATHER = {"city": "Århus", "days": 3}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}


def test_anthropics_own_package() -> None:
    """Streams and whole answers, tools, counting, the list of models, and errors as the exceptions that they are."""
    anthropic = package("anthropic")
    with serving("--tool-turns", "2", "--max-model-len", "2000", get_weather=WEATHER) as url:
        tools = [{"name": "get_weather", "description": LONG, "input_schema": SCHEMA}]
        turns: list[Any] = [{"role": "user", "content": "What is the weather?"}]
        total = read = 0
        with anthropic.Anthropic(base_url=url, api_key="any", max_retries=0) as client:
            asked = {"model": "m", "max_tokens": 32_000, "tools": tools}
            for turn in range(3):
                counted_tokens = client.messages.count_tokens(model="m", tools=tools, messages=turns).input_tokens
                with client.messages.stream(**asked, messages=turns) as stream:
                    words = "".join(stream.text_stream)
                    answer = stream.get_final_message()
                usage = answer.usage
                parts = (usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens)
                assert sum(parts) == counted_tokens
                assert parts[1] == (0 if not turn else total // BLOCK * BLOCK)
                total, read = counted_tokens + usage.output_tokens - 1, read + parts[1]
                turns.append({"role": "assistant", "content": answer.content})
                if turn < 2:
                    assert (answer.stop_reason, answer.content[0].input) == ("tool_use", WEATHER)
                    told = {"type": "tool_result", "tool_use_id": answer.content[0].id, "content": "rain " * 20}
                    turns.append({"role": "user", "content": [told]})
            assert (answer.stop_reason, answer.content[0].text, usage.output_tokens) == ("end_turn", words, 128)
            whole = client.messages.create(model="m", max_tokens=7, messages=[{"role": "user", "content": "hello"}])
            assert (whole.stop_reason, len(whole.content[0].text.split())) == ("max_tokens", 7)
            assert [model.id for model in client.models.list()] == ["keepwarm-simulated"]
            with pytest.raises(anthropic.BadRequestError, match="prompt is too long: 3000 tokens > 2000 maximum"):
                client.messages.create(**asked | {"max_tokens": 9}, messages=[{"role": "user", "content": "x " * 2800}])
        assert counted(url)["prefix_cache_hits_total"] == read


def test_openais_own_package() -> None:
    """Chat, responses and completions, streams and whole answers, tools, models, errors as exceptions."""
    openai = package("openai")
    with (
        serving("--max-model-len", "40000", get_weather=WEATHER) as url,
        openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0) as client,
    ):
        _chat(client)
        _responses(client)
        ids = list(range(100, 200))
        done = client.completions.create(model="m", prompt=ids, max_tokens=3)
        assert (done.usage.prompt_tokens, done.choices[0].finish_reason) == (100, "length")
        parts = client.completions.create(model="m", prompt=ids, max_tokens=3, stream=True)
        assert "".join(part.choices[0].text for part in parts) == done.choices[0].text
        assert [model.id for model in client.models.list()] == ["keepwarm-simulated"]
        with pytest.raises(openai.BadRequestError, match="maximum context length is 40000 tokens"):
            client.completions.create(model="m", prompt=ids, max_tokens=40_000)
        with pytest.raises(openai.BadRequestError, match="previous_response_id"):
            client.responses.create(model="m", input="x", previous_response_id="resp_1")


def _chat(client: Any) -> None:
    """A tool call in a stream that the package puts together, then its result."""
    function = {"name": "get_weather", "description": LONG, "parameters": SCHEMA}
    asked: dict[str, Any] = {"model": "m", "tools": [{"type": "function", "function": function}]}
    turns: list[Any] = [{"role": "user", "content": "What is the weather?"}]
    with client.chat.completions.stream(**asked, messages=turns, stream_options={"include_usage": True}) as stream:
        first = stream.get_final_completion()
    call = first.choices[0].message.tool_calls[0]
    assert first.choices[0].finish_reason == "tool_calls"
    assert orjson.loads(call.function.arguments) == WEATHER
    turns.append(first.choices[0].message.model_dump(exclude_none=True))
    turns.append({"role": "tool", "tool_call_id": call.id, "content": "rain " * 20})
    second = client.chat.completions.create(**asked, messages=turns)
    known = first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert second.usage.prompt_tokens_details.cached_tokens == known // BLOCK * BLOCK
    assert (second.choices[0].finish_reason, second.usage.completion_tokens) == ("stop", 128)
    short = client.chat.completions.create(**asked, messages=turns, max_completion_tokens=5)
    assert (short.choices[0].finish_reason, len(short.choices[0].message.content.split())) == ("length", 5)


def _responses(client: Any) -> None:
    """The same in the Responses API; the package checks the order of a stream's events as it takes them in."""
    tools = [{"type": "function", "name": "get_weather", "description": LONG, "parameters": SCHEMA, "strict": False}]
    items: list[Any] = [{"role": "user", "content": "What is the weather?"}]
    with client.responses.stream(model="m", input=items, tools=tools) as stream:
        first = stream.get_final_response()
    call = first.output[0]
    assert (call.type, orjson.loads(call.arguments)) == ("function_call", WEATHER)
    items += [call.to_dict(), {"type": "function_call_output", "call_id": call.call_id, "output": "rain " * 20}]
    with client.responses.stream(model="m", input=items, tools=tools) as stream:
        words = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        second = stream.get_final_response()
    known = first.usage.input_tokens + first.usage.output_tokens - 1
    assert second.usage.input_tokens_details.cached_tokens == known // BLOCK * BLOCK
    assert (second.status, second.output_text, second.usage.output_tokens) == ("completed", words, 128)
    cut = client.responses.create(model="m", input=items, max_output_tokens=4)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with a file to read, beside a home without anything."""
    (tmp_path / "home/.codex").mkdir(parents=True)
    (tmp_path / "project").mkdir()
    (tmp_path / "project/notes.txt").write_text("a note\n" * 5)
    return tmp_path / "project"


def _run(command: list[str], project: Path, **more: str) -> bytes:
    """What an agent prints; it has to succeed."""
    env = {"PATH": os.environ["PATH"], "HOME": str(project.parent / "home")} | more
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 120, "check": False}
    done: subprocess.CompletedProcess[bytes] = subprocess.run(command, cwd=project, env=env, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.skipif(CLAUDE is None, reason=f"no Claude Code: {ABSENT}")
def test_claude_code(project: Path) -> None:
    """Two prompts to one session, each with a command and a file read; the tokens it counts are the cluster's."""
    tools = {"Bash": {"command": "cat notes.txt >> seen.txt"}, "Read": {"file_path": str(project / "notes.txt")}}
    parts = {"input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"}
    told: list[dict[str, Any]] = []
    with serving("--tool-turns", "2", **tools) as url:
        keys = {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": "dummy"} | dict.fromkeys(SETTINGS, "1")
        options = ["--model", "claude-sonnet-4-5", "--allowedTools", "Bash,Read", "--output-format", "json"]
        for asked in (["read the notes"], ["again", "--resume"]):
            resumed = [told[0]["session_id"]] if told else []
            told.append(orjson.loads(_run([str(CLAUDE), "-p", *asked, *resumed, *options], project, **keys)))
        seen = counted(url)
    for one in told:
        assert (one["subtype"], one["is_error"], one["num_turns"], one["stop_reason"]) == (
            "success",
            False,
            3,
            "end_turn",
        )
        assert len(one["result"].split()) == 128
    assert (project / "seen.txt").read_text() == "a note\n" * 10
    assert sum(one["usage"][part] for one in told for part in parts) == seen["prompt_tokens_total"]
    assert sum(one["usage"]["cache_read_input_tokens"] for one in told) == seen["prefix_cache_hits_total"]
    assert seen["request_success_total"] == 6
    assert seen["prefix_cache_hits_total"] > 0.7 * seen["prompt_tokens_total"]


@pytest.mark.skipif(CODEX is None, reason=f"no Codex: {ABSENT}")
@pytest.mark.parametrize("builtin", [False, True], ids=["its own provider", "a WebSocket first"])
def test_codex(project: Path, builtin: bool) -> None:
    """A session of two commands, gone on with; the built-in provider asks for a WebSocket first, and then posts."""
    tools = {"exec_command": {"cmd": "cat notes.txt >> seen.txt"}}
    with serving("--tool-turns", "2", **tools) as url:
        own = f'{{name="x",base_url="{url}/v1",wire_api="responses",env_key="CODEX_API_KEY"}}'
        provider = ["-c", f'openai_base_url="{url}/v1"'] if builtin else ["-c", "model_provider=stage"]
        provider += ["-m", "gpt-5.5"] if builtin else ["-c", f"model_providers.stage={own}", "-m", "any"]
        keys = {"CODEX_HOME": str(project.parent / "home/.codex"), "CODEX_API_KEY": "dummy"}
        options = ["--json", "--skip-git-repo-check", *provider, "-s", "danger-full-access"]
        first = _lines(_run([str(CODEX), "exec", *options, "read the notes"], project, **keys))
        thread = first[0]["thread_id"]
        again = _lines(_run([str(CODEX), "exec", *options, "resume", thread, "again"], project, **keys))
        seen = counted(url)
    for events in (first, again):
        done = [event["item"] for event in events if event["type"] == "item.completed"]
        commands = [item for item in done if item["type"] == "command_execution"]
        assert [item["exit_code"] for item in commands] == [0, 0]
        assert [len(item["text"].split()) for item in done if item["type"] == "agent_message"] == [128]
        assert events[-1]["type"] == "turn.completed"
    assert (project / "seen.txt").read_text() == "a note\n" * 20
    usage = again[-1]["usage"]
    assert (usage["input_tokens"], usage["cached_input_tokens"]) == (
        seen["prompt_tokens_total"],
        seen["prefix_cache_hits_total"],
    )
    assert seen["request_success_total"] == 6
    assert seen["prefix_cache_hits_total"] > 0.7 * seen["prompt_tokens_total"]


def _lines(told: bytes) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in told.splitlines() if line.startswith(b"{")]


@pytest.mark.skipif(not (AIPERF / "aiperf").exists(), reason=f"no AIPerf: {ABSENT}")
def test_aiperf(tmp_path: Path, project: Path) -> None:
    """Four conversations of three turns: AIPerf's own counts are those of the server, which it scrapes as a vLLM."""
    subprocess.run([AIPERF / "python", HERE / "word_tokenizer.py", tmp_path / "words"], check=True)
    with serving() as url:
        options = {
            "model": "keepwarm-simulated",
            "tokenizer": str(tmp_path / "words"),
            "url": url,
            "endpoint-type": "chat",
            "concurrency": "2",
            "conversation-num": "4",
            "conversation-turn-mean": "3",
            "conversation-turn-stddev": "0",
            "synthetic-input-tokens-mean": "200",
            "output-tokens-mean": "20",
            "artifact-dir": str(tmp_path / "told"),
            "ui": "none",
        }
        flat = [part for name, value in options.items() for part in (f"--{name}", value)]
        _run([str(AIPERF / "aiperf"), "profile", "--streaming", *flat], project)
        seen = counted(url)
    calls = _lines((tmp_path / "told/profile_export.jsonl").read_bytes())
    figures = [{name: one["value"] for name, one in call["metrics"].items()} for call in calls]
    assert sorted(one["usage_prompt_tokens"] for one in figures) == [200] * 4 + [420] * 4 + [640] * 4
    assert all(one["usage_prompt_tokens"] == one["input_sequence_length"] for one in figures)
    assert all(one["usage_completion_tokens"] == one["output_sequence_length"] == 20 for one in figures)
    read = {prompt: {one["usage_prompt_cache_read_tokens"] for one in figures if one["usage_prompt_tokens"] == prompt}
            for prompt in (420, 640)}  # fmt: skip
    assert read == {420: {208}, 640: {432}}
    assert sum(one["usage_prompt_cache_read_tokens"] for one in figures) == seen["prefix_cache_hits_total"]
    assert seen["prompt_tokens_total"] == 4 * (200 + 420 + 640)
    scraped = orjson.loads((tmp_path / "told/server_metrics_export.json").read_bytes())
    assert "vllm:prefix_cache_hits" in str(scraped)
