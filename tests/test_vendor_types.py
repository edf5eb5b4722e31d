"""The bodies that are sent, held against the types that the vendors publish for their requests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
from asking import blocks_of, body_of

from keepwarm.replayers.blocks import Block
from keepwarm.replayers.endpoint import Piece
from keepwarm.traces.model import Breakpoint

SDKS = Path(__file__).parent / "real" / ".cache" / "sdks"
KINDS = "tools tools system lead user answer hidden tool_result tool_result answer tool_result user answer user"

TYPED = """
import json, sys, typing
sys.path.insert(0, sys.argv[1])
from pydantic import TypeAdapter
typing.Iterable = typing.List  # which is checked at once
from anthropic.types.message_create_params import MessageCreateParamsStreaming as messages
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as chat
from openai.types.completion_create_params import CompletionCreateParamsStreaming as completions
from openai.types.responses.response_create_params import ResponseCreateParamsStreaming as responses
types = {name: TypeAdapter(globals()[name]) for name in ("messages", "chat", "responses", "completions")}
for line in sys.stdin:
    name, body = json.loads(line)
    known = json.loads(types[name].dump_json(types[name].validate_python(body), warnings=False))
    print(json.dumps([name, known]))
"""


@pytest.mark.skipif(
    not (SDKS / "openai").is_dir(), reason="the vendors' packages are not there: tests/real/install.sh sdks"
)
def test_the_vendors_own_types_take_the_bodies() -> None:
    """What Anthropic and OpenAI publish as the types of their requests knows every field that is sent."""
    prompt = [Piece(ident, 5, kind) for ident, kind in enumerate(KINDS.split())]
    marks = [Breakpoint(10, 3600), Breakpoint(45, 300), Breakpoint(70, 300)]
    more: dict[str, dict[str, Any]] = {
        "messages": {"max_tokens": 3, "tool_choice": {"type": "none"}},
        "chat": {"max_completion_tokens": 3, "tool_choice": "none", "prompt_cache_key": "k"},
        "responses": {"max_output_tokens": 3, "tool_choice": "none", "store": False},
        "completions": {"max_tokens": 3},
    }
    ids, blocks = [Block("user", b"1000,1001")], blocks_of(prompt, marks=marks)
    asked = [
        (name, orjson.loads(body_of(name, ids if name == "completions" else blocks, **head, stream=True)))
        for name, head in more.items()
    ]
    for item in asked[2][1]["input"]:  # OpenAI takes answers without these, as Codex sends them; its types want them
        if item.get("role") == "assistant":
            item |= {"id": "msg_1", "status": "completed"}
            item["content"][0]["annotations"] = []
    command = [sys.executable, "-c", TYPED, str(SDKS)]
    told = b"\n".join(orjson.dumps(each) for each in asked)
    done = subprocess.run(command, input=told, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    for line, (name, body) in zip(done.stdout.splitlines(), asked, strict=True):
        assert orjson.loads(line) == [name, body]
