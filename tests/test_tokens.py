"""Calibration: what an endpoint's tokenizer and chat template make of prompts is found out by asking it alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import httpx
import orjson
import pytest
from asking import KINDS, request, steps
from asking import prompts as made
from hypothesis import given, settings
from templated import SHAPES, Templated

from keepwarm.replayers.address import Address
from keepwarm.replayers.endpoint import Piece
from keepwarm.replayers.http import HttpEndpoint
from keepwarm.replayers.server import learn
from keepwarm.replayers.text import WORDS
from keepwarm.replayers.tokens import Costs

DIALECTS = ("messages", "chat", "responses")
LEAST = 60
"""Tokens that a piece has more than what a block takes in any of the templates."""
BAD = {word.decode() for word in WORDS[5::40]}


def endpoint(server: Templated, dialect: str, costs: Costs | None = None, **options: Any) -> HttpEndpoint:
    """The endpoint in memory."""
    return HttpEndpoint(
        Address("http://test", {}),
        dialect=dialect,
        model="m",
        clock=time.monotonic_ns,
        stream=False,
        costs=costs or Costs(),
        transport=lambda: httpx.MockTransport(server.handler),
        **options,
    )


def calibrated(server: Templated, dialect: str) -> Costs:
    """What is learned of a server's costs."""
    asked = endpoint(server, dialect, accepts=frozenset())
    return asyncio.run(learn(asked)).costs


def prompt_tokens(server: Templated, dialect: str, costs: Costs, prompts: list[tuple[Piece, ...]]) -> list[int | None]:
    """What the server counts of prompts."""

    async def answers() -> list[int | None]:
        asked = endpoint(server, dialect, costs)
        return [(await asked.send(request(*prompt))).prompt for prompt in prompts]

    return asyncio.run(answers())


def large(prompt: tuple[Piece, ...], least: int = LEAST) -> tuple[Piece, ...]:
    """A prompt whose pieces have more tokens than what blocks take besides words."""
    return tuple(piece._replace(tokens=piece.tokens + least) for piece in prompt)


AGENT = "tools tools system lead user answer tool_result answer answer hidden tool_result tool_result user answer user"


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=4, deadline=None)
@given(asked=steps(*KINDS))
def test_prompts_have_the_planned_tokens_to_the_token(dialect: str, shape: str, asked: Any) -> None:
    """Whatever the template joins, merges, trims or adds: what adds up is found out; prompts are as long as planned,
    with tools of their own or without.
    """
    server = Templated(shape, keeps=False)
    costs = calibrated(server, dialect)
    assert (costs.word, costs.off) == (1.0, 0.0)
    agent = tuple(Piece(ident, 30, kind) for ident, kind in enumerate(AGENT.split()))
    prompts = [large(prompt, 120) for prompt in (agent, *made(asked))]
    planned = [sum(piece.tokens for piece in prompt) for prompt in prompts]
    assert prompt_tokens(server, dialect, costs, prompts) == planned


@pytest.mark.parametrize("dialect", DIALECTS)
def test_words_that_are_two_tokens_are_left_out(dialect: str) -> None:
    """Of a vocabulary in which some of our words are two tokens only good ones are used: exact all the same."""
    server = Templated(weight=lambda word: 2 if word in BAD else 1, keeps=False)
    costs = calibrated(server, dialect)
    assert not {word.decode() for word in costs.words} & BAD
    assert 64 <= len(costs.words) < len(WORDS)
    prompts = [large((Piece(1, 5000, "lead"), Piece(2, 700, "user"), Piece(3, 90, "answer"), Piece(4, 800, "user")))]
    assert prompt_tokens(server, dialect, costs, prompts) == [5000 + 700 + 90 + 800 + 4 * LEAST]


def even(word: str) -> int:
    """Two tokens for our words."""
    return 2 if word.isalpha() and len(word) == 4 else 1


def uneven(word: str) -> int:
    """Two tokens or three, for a word's letters; one for anything else."""
    return 1 if len(word) < 4 or not word.isalpha() else 2 + (sum(map(ord, word)) % 2)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("weight", "share"), [(lambda word: 2 if word.isalpha() and len(word) == 4 else 1, 0.002), (uneven, 0.01)]
)
def test_where_no_word_is_a_token_the_plan_is_met_within_a_share(
    dialect: str, weight: Callable[[str], int], share: float
) -> None:
    """Words that all take two tokens, or two and three: what they take on average is found out."""
    server = Templated("merged", weight=weight, keeps=False)
    costs = calibrated(server, dialect)
    assert len(costs.words) == len(WORDS)
    assert costs.word >= 2
    agent = tuple(Piece(ident, 700 + ident, kind) for ident, kind in enumerate(AGENT.split()))
    planned = sum(piece.tokens for piece in agent)
    (found,) = prompt_tokens(server, dialect, costs, [agent])
    assert found == pytest.approx(planned, rel=share)


def test_a_first_word_of_more_tokens_is_no_words_cost() -> None:
    """The word that every text begins with takes three tokens: blocks take more, and words one."""
    server = Templated(weight=lambda word: 3 if word == WORDS[0].decode() else 1, keeps=False)
    costs = calibrated(server, "messages")
    assert costs.word == 1.0
    prompts = [large((Piece(1, 50, "user"), Piece(2, 50, "answer"), Piece(3, 60, "user")))]
    assert prompt_tokens(server, "messages", costs, prompts) == [160 + 3 * LEAST]


def test_what_does_not_add_up_is_told() -> None:
    """A template that says a long prompt's number of turns takes more than its probes say: by how much is known."""

    class Counting(Templated):
        def tokens(self, dialect: str, body: Any) -> list[str]:
            found = super().tokens(dialect, body)
            return found + ["more"] * max(len(body["messages"]) - 6, 0)

    server = Counting(keeps=False)
    costs = calibrated(server, "messages")
    assert 0 < (costs.off or 0) < 0.1
    assert calibrated(Templated(keeps=False), "messages").off == 0


def test_costs_come_back_from_run_json() -> None:
    """What is written is read again as the same, by way of JSON."""
    costs = calibrated(Templated("with_ids", weight=lambda word: 2 if word in BAD else 1), "chat")
    again = Costs.read(orjson.loads(orjson.dumps(costs.told())))
    assert again == costs._replace(words=list(costs.words))
    assert Costs.read(orjson.loads(orjson.dumps(Costs(tools=False).told()))) == Costs(tools=False)
