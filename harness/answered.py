"""Answers of the simulated endpoint: streams, whole answers, errors. How each API has them is in ``answered.toml``."""

import time
from itertools import count
from string import Template
from typing import Any

import orjson

from keepwarm.harness.script import Said
from keepwarm.traces.shipped import shipped

FORMS = shipped("keepwarm.harness", "answered.toml")
Account = dict[str, Any]
"""A token account in outcome columns."""


def error(dialect: str, status: int, message: str) -> bytes:
    """An error in the API's shape."""
    forms = FORMS[dialect]
    kind = forms["kinds"].get(str(status), "invalid_request_error")
    return Template(forms["error"]).substitute(kind=kind, status=status, message=_json(message)).encode()


class Speech(dict[str, Any]):
    """An answer as a dialect tells it to one client: what is known of it by name, and forms that are filled with that.

    ``writes`` is what chat completions and completions call tokens newly cached.
    """

    def __init__(self, dialect: str, said: Said, model: str, *, tell_usage: bool, writes: str) -> None:
        forms = FORMS[dialect]
        self._forms = forms | forms["tool" if said.tool else "text"]
        self._numbers = count()
        super().__init__(id=said.ident, created=int(time.time()), model=_json(model), **forms["ends"][said.stop])
        self.update(text=_json(said.text), tool=_json(said.tool), arguments=said.text, named=writes)
        if not tell_usage:
            self["account"] = ""

    def __missing__(self, name: str) -> Any:
        """A form filled in, or the next number."""
        return next(self._numbers) if name == "number" else Template(self._forms[name]).substitute(self)

    def told(self, name: str, account: Account) -> bytes:
        """A form that tells of an account: a stream's ``opening``, its first events up to the text, or its ``closing``,
        or a ``whole`` answer. Writes that have neither of Anthropic's TTLs stand in the sum alone.
        """
        short, long, other = (account[f"cache_write_{ttl}"] or 0 for ttl in ("5m", "1h", "other"))
        told = {key: _json(account[key]) for key in ("prompt", "uncached", "cache_read", "output")}
        self.update(told, short=short, long=long, written=short + long + other)
        self["total"] = account["prompt"] + account["output"]
        if account["cache_write_other"] is None:
            self["writes"] = ""
        return str(self[name]).encode()

    def delta(self, text: str) -> bytes:
        """An event with some of the text."""
        self["some"] = _json(text)
        return str(self["delta"]).encode()


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()
