"""Replay in virtual time against a simulated worker: the same plan as over the wire, no sockets, no waiting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from heapq import heappop, heappush
from typing import NamedTuple

from keepwarm.replayers.endpoint import Request
from keepwarm.replayers.plan import Planned, Schedule
from keepwarm.replayers.worker import Service, Worker, account
from keepwarm.traces.model import Outcome

_FIRST_TOKEN, _END = 0, 1
"""At one instant first tokens come before calls end (an answer may be one token), and both before new calls begin."""


class Simulated(NamedTuple):
    """A call's outcome, and what it could have read from each of the shadows' caches at the same times."""

    outcome: Outcome
    bounds: dict[str, int]


class _Running(NamedTuple):
    planned: Planned
    sent_ns: int
    service: Service
    shadows: dict[str, Service]


def simulate(schedule: Schedule, worker: Worker, *, shadows: Mapping[str, Worker] | None = None) -> Iterator[Simulated]:
    """Every planned call's outcome, in the order in which they end. Virtual time never runs back.

    ``shadows`` are workers with other caches that see the same calls at the same times, to tell what was attainable.
    """
    shadows = shadows or {}
    events: list[tuple[int, int, int, _Running]] = []
    now_ns = count = 0
    while True:
        due_ns = schedule.next_due(now_ns)
        if events and (due_ns is None or events[0][0] <= due_ns):
            now_ns, kind, _, running = heappop(events)
            if kind == _FIRST_TOKEN:
                worker.first_token(running.service, now_ns)
                for name, service in running.shadows.items():
                    shadows[name].first_token(service, now_ns)
                continue
            worker.end(running.service, now_ns)
            for name, service in running.shadows.items():
                shadows[name].end(service, now_ns)
            schedule.ended(running.planned.request.call, now_ns)
            bounds = {name: service.read for name, service in running.shadows.items()}
            yield Simulated(_outcome(running), bounds)
        elif due_ns is not None:
            now_ns = max(now_ns, due_ns)
            planned = schedule.pop()
            schedule.started(planned.request.call, now_ns)
            service = _begin(worker, planned.request, now_ns)
            others = {name: _begin(shadow, planned.request, now_ns) for name, shadow in shadows.items()}
            count += 1
            running = _Running(planned, now_ns, service, others)
            heappush(events, (service.first_token_ns, _FIRST_TOKEN, count, running))
            heappush(events, (service.done_ns, _END, count, running))
        else:
            return


def _begin(worker: Worker, request: Request, now_ns: int) -> Service:
    marks = request.call.breakpoints
    return worker.begin(request.prompt, request.output or 1, now_ns, marks=marks, answer=request.answer)


def _outcome(running: _Running) -> Outcome:
    """Nothing fails here, so every session is completed."""
    planned, service = running.planned, running.service
    return Outcome(
        call=planned.request.call,
        copy=planned.request.copy,
        due_ns=planned.due_ns,
        sent_ns=running.sent_ns,
        first_byte_ns=service.first_token_ns,
        first_token_ns=service.first_token_ns,
        last_token_ns=service.done_ns,
        done_ns=service.done_ns,
        status=200,
        completed=True,
        endpoint="simulated",
        worker="0",
        **account(service),
    )
