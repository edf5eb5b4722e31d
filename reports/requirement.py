"""Requirement is one required figure as a user writes it: ``metric[.statistic][selectors] operator value``.

``warm_hit_rate >= 90%``, ``ttft.p99[flow=interactive,role=main] <= 2s``, ``cost_per_completed_task <= $1.20``. The
value may be relative to a baseline run: ``baseline``, ``baseline*1.05``, ``baseline+5%`` (of the baseline's figure),
``baseline-1pt`` (points of a rate), ``baseline+50ms``.
"""

import re
from typing import Any, NamedTuple

from keepwarm.reports import latency, metrics
from keepwarm.traces.errors import InputError
from keepwarm.traces.shipped import shipped

_DATA = shipped("keepwarm.reports", "requirement.toml")
UNITS: dict[str, dict[str, float]] = _DATA["units"]
WHOLE: dict[str, dict[str, Any]] = _DATA["whole"]
RATES = ("hit_rate", "warm_hit_rate", "hit_rate_excluding_writes")
COUNTS = {*metrics.AGENTS, *metrics.FIGURES} - {*RATES, "read_write_ratio", "write_source"}
KINDS = {
    **dict.fromkeys(RATES, "rate"),
    "read_write_ratio": "ratio",
    **dict.fromkeys(latency.NAMES, "time"),
    **{name: told["kind"] for name, told in WHOLE.items()},
    **dict.fromkeys(COUNTS, "count"),
}
FORM = re.compile(
    r"\s*(?P<metric>[a-z_]+)(?:\.(?P<stat>[a-z][a-z0-9_]*(?:\.\d+)?))?\s*(?:\[(?P<where>[^\]]*)\])?"
    r"\s*(?P<op>>=|<=|==|>|<)\s*(?P<value>\S.*?)\s*"
)
NUMBER = re.compile(r"(\$?)\s*(\d+(?:\.\d+)?)\s*(%|s|ms|us|x|\$|)")
RELATIVE = re.compile(
    r"baseline\s*(?:\*\s*(?P<times>\d+(?:\.\d+)?)|(?P<sign>[+-])\s*"
    r"(?P<by>(?P<share>\d+(?:\.\d+)?)\s*%|(?P<points>\d+(?:\.\d+)?)\s*pt|\d.*))?"
)
EXPECTED = "expected 'metric[.statistic][selectors] operator value', such as 'ttft.p99[role=main] <= 2s'"


class Requirement(NamedTuple):
    """One required figure, parsed. ``times`` and ``plus`` apply to the baseline's figure where ``relative``."""

    text: str
    metric: str
    stat: str | None
    where: tuple[tuple[str, str], ...]
    op: str
    value: float
    relative: bool = False
    times: float = 1.0

    @property
    def subject(self) -> str:
        """The figure's name as the user wrote it."""
        chosen = ",".join(f"{key}={value}" for key, value in self.where)
        return self.metric + (f".{self.stat}" if self.stat else "") + (f"[{chosen}]" if chosen else "")


def parse(text: str) -> Requirement:
    """A requirement; InputError names the text and what is wrong in it."""
    found = FORM.fullmatch(text)
    if not found:
        raise InputError(f"--require {text!r}: {EXPECTED}")
    metric, stat = found["metric"], found["stat"]
    if metric not in KINDS:
        raise InputError(f"--require {text!r}: no figure {metric!r}, expected one of {', '.join(sorted(KINDS))}")
    _check_stat(text, metric, stat)
    where = _selectors(text, metric, found["where"] or "")
    return Requirement(text, metric, stat, where, found["op"], *_value(text, metric, found["value"]))


def _check_stat(text: str, metric: str, stat: str | None) -> None:
    known = WHOLE.get(metric, {}).get("stats")
    if metric in latency.NAMES:
        if stat != "max" and not (stat and percent(stat)):
            raise InputError(f"--require {text!r}: {metric} needs a percentile or max, such as {metric}.p99")
    elif known is not None:
        if stat is None or (known and stat not in known):
            some = f"one of {', '.join(known)}" if known else f"the name of a bound, as in {metric}.endless"
            raise InputError(f"--require {text!r}: {metric} needs a statistic: {some}")
    elif stat is not None:
        raise InputError(f"--require {text!r}: {metric} is one figure and has no {stat!r}")


def percent(stat: str) -> float | None:
    """99.9 of ``p99.9``; None if it is no percentile."""
    found = re.fullmatch(r"p(\d+(?:\.\d+)?)", stat)
    return float(found[1]) if found and 0 < float(found[1]) <= 100 else None


def _selectors(text: str, metric: str, where: str) -> tuple[tuple[str, str], ...]:
    pairs = []
    for part in filter(None, (part.strip() for part in where.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in metrics.GROUPS:
            raise InputError(f"--require {text!r}: selector {part!r}: expected {'|'.join(metrics.GROUPS)}=value")
        pairs.append((key, value))
    if pairs and metric in WHOLE:
        raise InputError(f"--require {text!r}: {metric} is a whole run's and takes no selector")
    return tuple(pairs)


def _value(text: str, metric: str, value: str) -> tuple[float, bool, float]:
    """(number, whether relative to the baseline, factor of the baseline) of the right-hand side."""
    relative = RELATIVE.fullmatch(value)
    if relative is None:
        return _number(text, metric, value), False, 1.0
    sign = -1.0 if relative["sign"] == "-" else 1.0
    if relative["share"]:
        return 0.0, True, 1.0 + sign * float(relative["share"]) / 100
    if relative["points"] and KINDS[metric] == "rate":
        return sign * float(relative["points"]) / 100, True, 1.0
    plus = sign * _number(text, metric, relative["by"]) if relative["by"] else 0.0
    return plus, True, float(relative["times"] or 1)


def _number(text: str, metric: str, value: str) -> float:
    kind = KINDS[metric]
    found = NUMBER.fullmatch(value)
    unit = found[1] + found[3] if found else None
    if found is None or unit not in UNITS[kind]:
        units = " or ".join(repr(u) if u else "none" for u in UNITS[kind])
        raise InputError(
            f"--require {text!r}: value {value!r}: {metric} is a {kind}, expected a number with unit {units}"
        )
    number = float(found[2]) / UNITS[kind][unit]
    if kind == "rate" and number > 1:
        raise InputError(f"--require {text!r}: value {value!r} is over 100 %: a rate is a fraction, or has a %")
    return number
