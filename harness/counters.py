"""What a server counted itself: its Prometheus counters, read before a run and after it."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from keepwarm.replayers.address import Address, shown_url
from keepwarm.replayers.server import client
from keepwarm.traces.errors import InputError
from keepwarm.traces.shipped import shipped

_NAMES = shipped("keepwarm.harness", "counters.toml")


def read_counters(address: Address, more: Sequence[str] = (), *, must: bool = False) -> dict[str, Any] | None:
    """The counters of the server at an address, and of those at ``more`` URLs, added up over all of their labels; its
    ``kind`` with them, how many ``workers`` it has, and the ``block`` and ``blocks`` of their caches, where it tells.
    None where it tells nothing; InputError where others ``must`` tell something and do not.
    """
    samples: dict[str, float] = {}
    shape: dict[str, int] = {}
    workers = set()
    for where in (address, *(Address(url, {}, address.tls) for url in more)):
        told = _samples(where)
        if must and where is not address and not told:
            raise InputError(f"--metrics {shown_url(where.url)}: tells no counters at /metrics")
        for name, labels, value in told:
            samples[name] = samples.get(name, 0.0) + value
            shape |= _shape(name, labels, value)
            if name in _NAMES["workers"]:
                workers.add((where.url, *(labels.get(label) for label in _NAMES["workers"][name])))
    for kind, names in _NAMES["counters"].items():
        if names["prompt_tokens"] in samples:
            found = {figure: round(samples[name], 6) for figure, name in names.items() if name in samples}
            return {"kind": kind, "workers": len(workers) or None, **shape, "counters": found}
    return None


def _samples(where: Address) -> Sequence[tuple[str, dict[str, str], float]]:
    with suppress(httpx.RequestError, ValueError), client(where) as asking:
        response = asking.get("metrics")
        if response.is_success:
            families = text_string_to_metric_families(response.text)
            return [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]
    return []


def _shape(name: str, labels: dict[str, str], value: float) -> dict[str, int]:
    """What of a cache's shape a sample tells."""
    shapes = _NAMES["shapes"].get(name, {})
    told = {figure: labels.get(label, "") if label else f"{value:.0f}" for figure, label in shapes.items()}
    return {figure: int(text) for figure, text in told.items() if text.isdecimal() and int(text)}
