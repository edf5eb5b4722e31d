"""A replay over HTTP into a run's directory: what is said before, what is sent, what is said after."""

import secrets
import sys
from pathlib import Path
from typing import Any

from keepwarm.harness.asking import Asking, make_cold
from keepwarm.harness.bounds import bound
from keepwarm.harness.counters import read_counters
from keepwarm.harness.planned import Planned
from keepwarm.harness.resumed import Resumed, keep, same
from keepwarm.harness.sending import Came, Sending, send_all
from keepwarm.replayers import run as runs
from keepwarm.replayers.address import shown_url
from keepwarm.replayers.caps import CAPS
from keepwarm.replayers.times import SECOND
from keepwarm.traces.errors import InputError


def replay_to(
    path: Path, planned: Planned, asking: Asking, *, start: str, salt: str | None, resumed: Resumed | None, **how: Any
) -> Came:
    """Replay into a run's directory, or go on with one that was ``resumed``, and say what came of it. ``how`` are the
    command's options of how to send, by their names, and its ``caps``.

    What can be said beforehand is written first: a run that is killed can be reported from its journal.
    """
    live, caps, idle_cap = how["assistant"] == "live", how["caps"], how["idle_cap"]
    stream, timeout_s, ray = not how["no_stream"], how["timeout"], how["ray"]
    if live and asking.dialect == "completions":
        raise InputError("--assistant live: the completions dialect sends token ids, and gets text: use another")
    planned.check()
    run_salt = (salt or secrets.token_hex(4)) if start in ("salt", "cache-salt") else ""
    if resumed is not None:
        run_salt, asking = resumed.about["cache"]["salt"] or "", asking.at(resumed.costs)
        planned.go_on(resumed.over, resumed.last_ns, len(resumed.about.get("resumed") or ()) + 1)
    started = runs.now()
    about = _about_endpoint(planned, asking, start, run_salt, repeated=salt is not None)
    about["options"] = planned.options | {option: list(caps.get(name, ())) or None for name, option in CAPS.items()}
    about["options"] |= {name: how[name] for name in ("max_retries", "assistant", "hints", "processes")}
    about["options"] |= {"idle_cap_s": idle_cap, "timeout_s": timeout_s, "stream": stream, "ray": ray is not None}
    about["fidelity"] = {"match": "bytes" if asking.frozen else "tokens", "costs": asking.costs.told()}
    if resumed is None:
        make_cold(asking, start)
        before = read_counters(asking.address, how["metrics"], must=True)
    else:
        same(resumed, about)
        keep(path, resumed)
        started, before = resumed.about["started"], resumed.about["counters"]["before"]
        about["resumed"] = [*(resumed.about.get("resumed") or ()), runs.now()]
    about["counters"] = {"before": before, "after": None}
    runs.write_about(path, planned.about("replay", started, ended=None, interrupted=True, **about))
    endpoint = {"stream": stream, "timeout_s": timeout_s, "salt": run_salt if start == "salt" else ""}
    endpoint |= {"cache_salt": run_salt if start == "cache-salt" else None, "live": live, "hints": how["hints"]}
    idle_ns = None if idle_cap is None else round(idle_cap * SECOND)
    sending = Sending(endpoint, caps, how["max_retries"], idle_ns, resumed.last_ns if resumed else 0)
    came = _send(path, planned, asking, sending, how["processes"], ray, how["ca"])
    about["counters"]["after"] = read_counters(asking.address, how["metrics"])
    about |= _after(came, about["clock"], resumed.about if resumed else {"clock": {"skipped_s": 0.0}})
    about |= {"planned_calls": came.measured()} if planned.window else {}
    runs.write_about(path, planned.about("replay", started, ended=runs.now(), **about))
    bound(path, planned, before or about["counters"]["after"], live=live)
    return came


def _after(came: Came, clock: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """What is known in the end, with what an earlier part of the run knew."""
    skipped_s = earlier["clock"].get("skipped_s")
    clock |= {"skipped_s": None if skipped_s is None else skipped_s + came.skipped_ns / SECOND}
    clients = [*(earlier.get("client") or ()), *came.clients]
    return {"clock": clock, "client": clients, "interrupted": came.interrupted or came.lost > 0}


def _send(
    path: Path, planned: Planned, asking: Asking, sending: Sending, processes: int, ray: str | None, ca: str | None
) -> Came:
    """Send in this process, in many, or as Ray's actors."""
    if processes == 1 and ray is None:
        return send_all(path, planned, asking, sending)
    from keepwarm.harness.shards import gather, in_processes, in_ray, parts

    made_of = parts(planned, asking, sending, ca, processes)
    came = in_processes(path, made_of) if ray is None else in_ray(path, made_of, ray)
    return gather(path, planned, asking.model, came)


def _about_endpoint(planned: Planned, asking: Asking, start: str, salt: str, *, repeated: bool) -> dict[str, Any]:
    server = asking.server
    driven = server["speed"] is not None and server["speed"] == planned.speed
    has_ttl = None if server["ttl"] is None else server["ttl"] != "none"
    learned = asking.learned and {name: told for name, told in asking.learned.told().items() if name != "costs"}
    endpoint: dict[str, Any] = {"name": "http", "url": shown_url(asking.address.url), "dialect": asking.dialect}
    endpoint |= {"server": server | {"model": asking.model}, "preflight": learned}
    state = "warm" if start == "warm" else "as the same bytes left it" if repeated else "cold"
    plain = asking.address.url.startswith("http:") and asking.address.transport == "own" and sys.platform == "linux"
    return {
        "endpoint": endpoint | {"clock_driven": driven, "has_ttl": has_ttl},
        "cache": {"state_at_start": state, "how": start, "salt": salt or None},
        "clock": {"kind": "monotonic", "anchor": None, "received": "kernel" if plain else "process"},
        "seed": None,
    }
