"""Asking is an endpoint that is to be asked: what it is, what one must know of it, and how its cache is made cold."""

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple, Self

import orjson

from keepwarm.replayers.address import Address, shown_url
from keepwarm.replayers.clock import RunClock
from keepwarm.replayers.hints import TELL_WORKER
from keepwarm.replayers.http import HttpEndpoint
from keepwarm.replayers.run import ABOUT
from keepwarm.replayers.server import Learned, client, identify, isolates, known_words, learn
from keepwarm.replayers.tokens import Costs
from keepwarm.traces.errors import InputError

REPORTING = {"vllm": "--enable-prompt-tokens-details", "sglang": "--enable-cache-report"}
"""What makes a server tell cached tokens."""


class Asking(NamedTuple):
    """What is asked, and how: the address, what ``identify`` said of it, the dialect and model, and what preflight
    learned, None without it. ``frozen`` are the costs that prompts are written by where not by the endpoint's own.
    """

    address: Address
    server: dict[str, Any]
    dialect: str
    model: str
    learned: Learned | None = None
    frozen: Costs | None = None

    def endpoint(self, **options: Any) -> HttpEndpoint:
        """It, ready to be asked."""
        known, costs = self.learned, self.costs
        if known is not None:
            options |= {"accepts": known.accepts, "writes_told": known.writes != "inferred"}
        if self.server["server"] == "dynamo":
            options["extra"] = {"nvext": TELL_WORKER}
        if self.frozen is None and "tools" not in options.get("accepts", {"tools"}):
            costs = costs._replace(tools=False)
        return HttpEndpoint(self.address, dialect=self.dialect, model=self.model, costs=costs, **options)

    @property
    def costs(self) -> Costs:
        """What prompts are written by."""
        return self.frozen or (self.learned.costs if self.learned else Costs())

    def at(self, costs: Costs) -> Self:
        """The same with prompts written by these costs, where they are not by frozen ones."""
        known = self.learned
        return self if known is None or self.frozen else self._replace(learned=known._replace(costs=costs))


def model_of(address: Address, server: dict[str, Any], wanted: str | None) -> str:
    """The model to ask for: the wanted one, or else the only one that is served. InputError where there are more."""
    if name := wanted or server["model"]:
        return str(name)
    raise InputError(f"endpoint {shown_url(address.url)}: does not say which one model it serves: give --model")


def asked_endpoint(
    address: Address,
    dialect: str = "messages",
    model: str | None = None,
    *,
    preflight: bool = True,
    tokenizer: str | None = None,
    frozen: Costs | None = None,
    stream: bool = True,
) -> Asking:
    """What listens at an address, and what one must know of it to measure. InputError where nothing could be."""
    server, words = identify(address), known_words(tokenizer)
    asking = Asking(address, server, dialect, model_of(address, server, model), frozen=frozen)
    if not preflight:
        return asking
    endpoint = asking.endpoint(clock=RunClock(), accepts=frozenset(), timeout_s=60.0, stream=stream)
    learned: Learned = asyncio.run(_then_close(learn(endpoint, words=words), endpoint))
    if learned.reads == "absent":
        flag = REPORTING.get(server["server"] or "")
        how = f"start it with {flag}" if flag else "no hit rate could be measured"
        why = f"does not tell cached tokens in the {dialect} dialect: {how} (--no-preflight replays all the same)"
        raise InputError(f"endpoint {shown_url(address.url)}: {why}")
    if frozen is not None and frozen.tools and "tools" not in learned.accepts:
        raise InputError(f"endpoint {shown_url(address.url)}: refuses tools, which the prompts to repeat have")
    return asking._replace(learned=learned)


async def _then_close(asked: Any, endpoint: HttpEndpoint) -> Any:
    async with aclosing(endpoint):
        return await asked


def replayed(run: Path) -> tuple[dict[str, Any], Costs]:
    """A replay's run.json, and the costs that its texts were written by. InputError where it is none."""
    try:
        about = orjson.loads((run / ABOUT).read_bytes())
        return about, Costs.read(about["fidelity"]["costs"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{run / ABOUT}: expected the run.json of a replay, with fidelity.costs") from error


def frozen_costs(run: Path | None, start: str, **same: Any) -> tuple[Costs, str | None]:
    """The costs and the salt that another run's texts were written by, so that these have the same bytes. ``same`` is
    what must be the same in it, by names of run.json.
    """
    if run is None:
        return Costs(), None
    about, costs = replayed(run)
    told, how = {"trace": about["trace"]["digest"], **about["options"]}, about["cache"]["how"]
    for name, value in same.items():
        if told.get(name) != value:
            raise InputError(f"{run}: has the bytes of another {name}: {told.get(name)}, not {value}")
    if (how == "salt") != (start == "salt"):
        raise InputError(f"{run}: has the bytes of --start {how}, which a run of --start {start} has not")
    return costs, about["cache"]["salt"] if how == "salt" else None


def make_cold(asking: Asking, start: str) -> None:
    """Make the cache cold where that is asked of the server, and see that it is."""
    where = f"endpoint {shown_url(asking.address.url)}"
    if start == "reset":
        with client(asking.address) as asked:
            status = asked.post("reset_prefix_cache").status_code
        if status != 200:
            hint = " (vLLM resets only with VLLM_SERVER_DEV_MODE=1)" if asking.server["server"] == "vllm" else ""
            raise InputError(f"{where}: POST /reset_prefix_cache gave status {status}, expected 200{hint}")
    if start == "cache-salt" and asking.learned is not None:
        endpoint = asking.endpoint(clock=RunClock())
        if not asyncio.run(_then_close(isolates(endpoint, asking.learned.costs), endpoint)):
            raise InputError(f"{where}: its cache is not cold under another cache_salt: use --start salt")
