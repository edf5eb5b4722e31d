"""What the simulated model says: as many words as asked for, or the tools that its user wrote down for it."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import orjson
from starlette.exceptions import HTTPException

from keepwarm.harness.asked import Asked, Words
from keepwarm.replayers.text import WORD, words
from keepwarm.traces.shipped import shipped

TOO_LONG = shipped("keepwarm.harness", "script.toml")
LONGEST = 31_999
"""Agents ask for at most 32,000 or 64,000 tokens and mean no number by it; a replay asks for what was recorded."""


class Said(NamedTuple):
    """An answer of ``tokens`` tokens, its ``text`` words, or the arguments for ``tool``; it ends because of ``stop``:
    ``end``, ``limit``, ``tool``, or ``window`` where the model's context is full.
    """

    ident: str
    text: str
    tokens: int
    stop: str
    tool: str | None = None

    def upto(self, tokens: int) -> int:
        """How much of the text is out with so many tokens."""
        return len(self.text) * tokens // self.tokens if self.tool else max(WORD * tokens - 1, 0)

    def again(self, asked: Asked) -> bytes:
        """The answer as the words that a later prompt will have behind those of this one."""
        prompt = Words()
        prompt.kind = asked.kind
        kind = asked.kind if asked.dialect == "completions" else "answer"
        prompt.add(kind, use(self.tool, orjson.loads(self.text)) if self.tool else self.text)
        return prompt.said()


def use(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A tool use as prompts have it."""
    return {"type": "tool_use", "name": name, "input": arguments}


@dataclass(frozen=True, kw_only=True)
class Script:
    """Says what comes next. ``output`` is an answer's length where nobody sets a limit, ``longest`` that of prompt and
    answer together; ``tools`` are called in turn, with their arguments, until ``turns`` results follow the user's word.
    """

    output: int = 128
    longest: int | None = None
    tools: Sequence[tuple[str, dict[str, Any]]] = ()
    turns: int = 1

    def answer(self, asked: Asked) -> Said:
        """The answer to a request; HTTPException where prompt and answer are too long."""
        self._fit(asked)
        limit = asked.output if asked.output is not None and asked.output <= LONGEST else None
        ident = secrets.token_hex(12)
        called = self._called(asked)
        if called is not None:
            name, arguments = called
            spoken = Words()
            spoken.add("answer", use(name, arguments))
            if limit is None or spoken.tokens <= limit:
                return Said(ident, orjson.dumps(arguments).decode(), spoken.tokens, "tool", name)
        tokens, stop = (limit, "limit") if limit else (self.output, "end")
        if self.longest is not None and asked.tokens + tokens > self.longest:
            tokens, stop = max(self.longest - asked.tokens, 1), "window"
        seed = blake2b(asked.text[-4096:]).digest()
        return Said(ident, words(seed, tokens).decode(), tokens, stop)

    def _called(self, asked: Asked) -> tuple[str, dict[str, Any]] | None:
        """The tool to call now."""
        offered = [one for one in self.tools if one[0] in asked.tools]
        return offered[asked.results % len(offered)] if offered and asked.results < self.turns else None

    def _fit(self, asked: Asked) -> None:
        most, prompt, output = self.longest, asked.tokens, asked.output or 0
        if most is None:
            return
        if asked.dialect != "messages":
            fits, why = prompt + max(output, 1) <= most, "limited" if output else "unlimited"
        elif prompt <= most:
            fits, why = output > LONGEST or prompt + output <= most, "both"
        else:
            fits, why = False, "prompt"
        if not fits:
            told = TOO_LONG[why].format(prompt=prompt, output=output, total=prompt + output, most=most)
            raise HTTPException(400, told)
