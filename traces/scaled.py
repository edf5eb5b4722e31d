"""A trace whose prompts and answers are so much shorter, segment by segment. It is a trace again."""

from collections.abc import Iterable, Iterator
from typing import Any

from keepwarm.traces.model import Breakpoint, Call

Length = tuple[int, int]
"""A piece of a prompt: its tokens, and its tokens in the shorter trace."""

_TOKENS = ("prompt", "uncached", "cache_read", "cache_write_5m", "cache_write_1h", "cache_write_other")
UNKNOWN: dict[str, Any] = dict.fromkeys(_TOKENS) | {"usage_source": "absent", "write_source": "absent"}
"""The account of a call whose tokens nobody counted."""


def scaled(sessions: Iterable[list[Call]], factor: float) -> Iterator[list[Call]]:
    """The sessions with every segment and answer cut to ``factor`` of its tokens, none to nothing, marks where they
    were. What was recorded of their tokens does not hold for them and is left out.
    """
    return (list(_shorter(calls, factor)) for calls in sessions)


def _shorter(calls: Iterable[Call], factor: float) -> Iterator[Call]:
    prompts: dict[str | None, list[Length]] = {}
    for call in calls:
        kept = list(_cut(prompts.get(call.prompt_parent, []), call.keep))
        append = [part for part in call.append if part.tokens]
        shorter = [part._replace(tokens=_less(part.tokens, factor)) for part in append]
        prompt = kept + [(old.tokens, new.tokens) for old, new in zip(append, shorter, strict=True)]
        prompts[call.call] = prompt
        output = call.output if call.output is not None else call.output_est
        yield call._replace(
            keep=sum(new for _, new in kept),
            append=tuple(shorter),
            output=None if output is None else _less(output, factor),
            breakpoints=tuple(
                Breakpoint(sum(new for _, new in _cut(prompt, mark.at)), mark.ttl_s) for mark in call.breakpoints
            ),
            **UNKNOWN,
        )


def _less(tokens: int, factor: float) -> int:
    return max(round(tokens * factor), 1)


def _cut(lengths: list[Length], tokens: int) -> Iterator[Length]:
    """The pieces that hold a prompt's first ``tokens`` tokens; of the last one a share that is as large as it was."""
    for old, new in lengths:
        if tokens <= 0:
            return
        yield (old, new) if old <= tokens else (tokens, new * tokens // old)
        tokens -= old
