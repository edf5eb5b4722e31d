"""Replay in virtual time against a simulated worker: the same plan as over the wire, no sockets, no waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heappop, heappush

from keepwarm.replayers.plan import Planned, Schedule
from keepwarm.replayers.worker import Service, Worker, account
from keepwarm.traces.model import Outcome

_FIRST_TOKEN, _END = 0, 1
"""At one instant first tokens come before calls end (an answer may be one token), and both before new calls begin."""


def simulate(
    schedule: Schedule,
    worker: Worker,
    *,
    service_of: Callable[[Planned, Service], Service] = lambda planned, service: service,
) -> Iterator[Outcome]:
    """Every planned call's outcome, in the order in which they end. Virtual time never runs back.

    ``service_of`` may give a call other times than the worker's model does.
    """
    events: list[tuple[int, int, int, Planned, Service]] = []
    now_ns = count = 0
    while True:
        due_ns = schedule.next_due(now_ns)
        if events and (due_ns is None or events[0][0] <= due_ns):
            now_ns, kind, _, planned, service = heappop(events)
            if kind == _FIRST_TOKEN:
                worker.first_token(service, now_ns)
                continue
            worker.end(service, now_ns)
            schedule.ended(planned.request.call, now_ns)
            yield outcome_of(planned, service)
        elif due_ns is not None:
            now_ns = max(now_ns, due_ns)
            planned = schedule.pop()
            service = service_of(planned, _begin(worker, planned, now_ns))
            schedule.started(planned.request.call, now_ns)
            count += 1
            heappush(events, (service.first_token_ns, _FIRST_TOKEN, count, planned, service))
            heappush(events, (service.done_ns, _END, count, planned, service))
        else:
            return


def _begin(worker: Worker, planned: Planned, now_ns: int) -> Service:
    request = planned.request
    marks = request.call.breakpoints
    return worker.begin(request.prompt, request.output or 1, now_ns, marks=marks, answer=request.answer)


def outcome_of(planned: Planned, service: Service) -> Outcome:
    """The outcome of a simulated call. Nothing fails here, so every session is completed."""
    return Outcome(
        call=planned.request.call,
        due_ns=planned.due_ns,
        sent_ns=planned.due_ns,
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
