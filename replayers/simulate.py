"""Replay in virtual time against the simulated cluster: the same plan as over the wire, no sockets, no waiting."""

from collections.abc import Iterator
from typing import NamedTuple

from keepwarm.replayers.cluster import Cluster
from keepwarm.replayers.job import FIRST_TOKEN, Job, Running, account
from keepwarm.replayers.plan import Planned, Schedule
from keepwarm.replayers.sent import Sent
from keepwarm.replayers.tree import Node
from keepwarm.traces.model import NOT_ANSWERED, Outcome

NOT_SENT = NOT_ANSWERED[0]


class Simulated(NamedTuple):
    """A call's outcome, and what it could have read from each of the cluster's shadows at the same times."""

    outcome: Outcome
    bounds: dict[str, int]


def simulate(schedule: Schedule[Node] | Sent[Node], cluster: Cluster, *, live: bool = True) -> Iterator[Simulated]:
    """Every planned call's outcome, in the order in which they end. Virtual time never runs back.

    The schedule makes its prompts in the cluster's tree. ``live``: later prompts repeat the answers that the cluster
    gave, so that what it generated is found again; else they repeat the recorded ones, as a replay does.
    """
    running: dict[Running, Planned[Node]] = {}
    now_ns = 0
    while True:
        due_ns = schedule.next_due(now_ns)
        next_ns = cluster.next_ns()
        if next_ns is not None and (due_ns is None or next_ns <= due_ns):
            now_ns = next_ns
            for event in cluster.advance(now_ns):
                if event.kind != FIRST_TOKEN:
                    yield from _ended(schedule, event.running, running.pop(event.running))
        elif due_ns is not None:
            now_ns = max(now_ns, due_ns)
            planned = schedule.pop()
            schedule.started(planned, now_ns)
            asked = job(planned) if live else job(planned)._replace(answer=())
            running[cluster.submit(asked, now_ns)] = planned
        else:
            return


def job(planned: Planned[Node]) -> Job:
    """A planned call as the cluster takes it."""
    call = planned.call
    output = planned.output or sum(part.tokens for part in planned.answer) or 1
    marks, hints = call.breakpoints, call.hints
    return Job(planned.prompt, output, planned.answer, marks, hints, call.flow, call.session, call.model, planned.took)


def _ended(schedule: Schedule[Node] | Sent[Node], running: Running, planned: Planned[Node]) -> Iterator[Simulated]:
    """A call is over; where it failed, so is its session."""
    assert running.done_ns is not None
    yield Simulated(_outcome(running, planned), running.bounds)
    if running.error is None:
        schedule.ended(planned, running.done_ns)
        return
    for skipped in schedule.failed(planned):
        yield Simulated(Outcome(skipped, planned.copy, endpoint="simulated", error=NOT_SENT, completed=False), {})


def _outcome(running: Running, planned: Planned[Node]) -> Outcome:
    """A call that no worker can hold has no answer and no account."""
    whole = running.error is None
    return Outcome(
        call=planned.call,
        copy=planned.copy,
        due_ns=planned.due_ns,
        sent_ns=running.arrived_ns,
        first_byte_ns=running.first_token_ns,
        first_token_ns=running.first_token_ns,
        last_token_ns=running.done_ns if whole else None,
        done_ns=running.done_ns,
        status=200 if whole else 400,
        error=running.error,
        completed=whole,
        endpoint="simulated",
        worker=running.worker,
        planned_output=running.job.output,
        **(account(running) if whole else {}),
    )
