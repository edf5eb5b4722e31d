"""Whose a recorded call is where no client says it: by what its prompt repeats, in cases that are easily mistaken."""

from __future__ import annotations

import asyncio
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from dialects import DIALECTS, Said, Tokens, Turn, assistant, request, user
from recording import Asked, Reply, Talk, recording, says
from wire import PATIENCE_S, Stage, asking, staged, streamed

from keepwarm.harness.bodies import piece
from keepwarm.traces.identity import Identity
from keepwarm.traces.records import AnswerRecord
from keepwarm.traces.threads import MOST_THREADS, Placed, Threads, Who


def test_of_very_many_conversations_the_oldest_is_forgotten() -> None:
    """Each of one message. The first is no longer known when it goes on, the last is."""
    threads, identity = Threads(Identity(b"x" * 32).name), Identity(b"y" * 32)

    def place(*said: str, answer: str = "") -> Placed:
        pieces = [piece(identity, ("user", "answer")[at % 2], text) for at, text in enumerate(said)]
        placed = threads.place(Who(), pieces)
        threads.answered(placed.thread, AnswerRecord(0, 0, status=200, said=(piece(identity, "answer", answer),)))
        return placed

    long = "first", "word 1", "second", "word 2", "third", "word 3", "fourth"
    assert place(*long[:5], answer=long[5]).thread == place(*long[2:]).thread  # its beginning slid out of the window
    begun = [place(f"ask {number}", answer=f"answer {number}") for number in range(MOST_THREADS + 100)]
    assert len(threads._begun) == MOST_THREADS  # nothing else shows that a forgotten one holds no memory
    assert len({placed.thread for placed in begun}) == len(begun)
    assert place("ask 0", "word", "go on").session not in {placed.session for placed in begun}
    last = begun[-1]
    assert place(f"ask {len(begun) - 1}", "word", "go on")[:4] == (last.thread, last.thread, 1, last.session)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("at_once", [False, True])
def test_runs_of_one_prompt_are_told_apart_by_their_answers(dialect: str, at_once: bool, tmp_path: Path) -> None:
    """Without names: conversations begun alike, in turns or all at once, go on with the answers that they got."""
    runs, lock = 4, threading.Lock()
    answers = iter(range(1, 100))

    def script(asked: Asked) -> Reply:
        with lock:
            number = next(answers)
        return says(dialect, Said((f"Answer {number}.",), Tokens(len(asked.body), number), id=f"id{number}"))

    with recording(tmp_path, script) as made:
        said: list[list[Turn]] = [[user("Do it.")] for _ in range(runs)]

        def ask(run: int) -> int:
            told = made.ask(dialect, request(dialect, said[run]))
            number = int(re.search(rb"Answer (\d+)", told.content)[1])  # type: ignore[index]
            said[run] += [assistant(f"Answer {number}."), user(f"And {number}?")]
            return number

        with ThreadPoolExecutor(runs) as pool:
            asked = [list((pool.map if at_once else map)(ask, range(runs))) for _ in range(3)]
    agents = {call.output: call.agent for call in made.calls}
    assert [len({agents[number] for number in run}) for run in zip(*asked, strict=True)] == [1] * runs
    assert len(set(agents.values())) == runs
    assert {call.prefix_break for call in made.calls} == {None}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_questions_that_share_their_examples_are_no_conversation(dialect: str, tmp_path: Path) -> None:
    """The same question asked again, and others after the same examples, are sessions of their own."""
    talk = Talk(dialect)
    examples = [user("2+2?"), assistant("4"), user("3+3?"), assistant("6")]
    with recording(tmp_path, talk.script) as made:
        for question in ("4+4?", "5+5?", "5+5?"):
            talk.ask(made, [*examples, user(question)])
    assert [call.turn for call in made.calls] == [0, 0, 0]
    assert len({call.session for call in made.calls}) == 3


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_window_that_slides_is_one_conversation_whose_prefix_breaks(dialect: str, tmp_path: Path) -> None:
    """A client that drops its oldest messages goes on with its conversation."""
    talk = Talk(dialect)
    said = [turn for at in range(8) for turn in (user(f"Question {at}."), assistant(f"It is {at}."))]
    with recording(tmp_path, talk.script) as made:
        for at in range(5):
            talk.ask(made, said[max(0, 2 * at - 4) : 2 * at + 1], f"It is {at}.")
    assert {call.agent for call in made.calls} == {made.calls[0].agent}
    assert [call.prefix_break is None for call in made.calls] == [True, True, True, False, False]


def test_a_request_that_came_before_an_answer_does_not_go_on_from_it(tmp_path: Path) -> None:
    """Of two conversations that begin alike, the longer is asked while the shorter one's answer is still to come."""
    longer = [{"role": "user", "content": "hi"}, {"role": "user", "content": "there"}]

    async def play(stage: Stage) -> None:
        first, second = await stage.line(), await stage.line()
        await first.ask(asking())
        while not stage.records():
            await asyncio.sleep(0.01)
        await second.ask(asking(messages=longer))
        await second.got()
        for line in (first, second):
            await line.tell(streamed())
            await line.heard(len(streamed()))

    with staged(tmp_path) as stage:
        stage.run(asyncio.wait_for(play(stage), PATIENCE_S))
        assert [asked.thread for asked, _ in stage.records()] == [0, 1]
