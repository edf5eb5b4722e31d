"""Where an endpoint is and what opens it: its address, the headers with its key, its certificate's authority."""

import os
import re
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

import httpx

from keepwarm.traces.errors import InputError

SHORT = 3
"""Characters that are no secret, but may be in any word."""


HEADER = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)
OURS = ("host", "content-length", "transfer-encoding", "connection")


class Address(NamedTuple):
    """An endpoint's URL, the headers of every request with its key, what its certificate is held against, and whose
    transport is used: the ``own`` or ``httpx``'s.
    """

    url: str
    headers: dict[str, str]
    tls: ssl.SSLContext | None = None
    transport: str = "own"


def base_url(url: str) -> httpx.URL:
    """An endpoint's address without its ``/v1``; InputError if it is not http or https."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise InputError(f"endpoint {_opened(url)!r}: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.userinfo:
        expected = "expected http[s]://HOST[:PORT][/PATH] alone; a key goes with --key-env, --key-file or --header"
        raise InputError(f"endpoint {_opened(url)!r}: {expected}")
    path = parsed.path.rstrip("/").removesuffix("/v1")
    return parsed.copy_with(path=path + "/", query=None, fragment=None)


def _opened(url: str) -> str:
    """A URL that may not be one without what may be secret in it."""
    return re.sub("//.*@", "//", url.partition("?")[0])


def shown_url(url: str) -> str:
    """A URL without what may be secret in it: user, password, query."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    return urlunsplit((parts.scheme, host if parts.port is None else f"{host}:{parts.port}", parts.path, "", ""))


def secret(what: str, env: str | None, file: str | None, *, must: bool = True) -> str | None:
    """A secret from an environment variable or a file's first line. InputError where it must be there and is not."""
    where = f"environment variable {env}" if env else file
    try:
        told = os.environ.get(env) if env else Path(file).read_text().split("\n")[0].strip() if file else None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: expected {what}, cannot be read as text") from error
    if must and not told:
        raise InputError(f"{where}: expected {what}, found nothing")
    if told and not (told.isascii() and told.isprintable()):
        raise InputError(f"{where}: expected {what} in plain ASCII")
    return told or None


def more_headers(given: Sequence[str]) -> dict[str, str]:
    """Headers given as NAME=VARIABLE, their values from the environment."""
    found = {}
    for each in given:
        name, _, variable = each.partition("=")
        if not (HEADER.fullmatch(name) and variable) or name.lower() in OURS:
            raise InputError(f"header {each!r}: expected NAME=VARIABLE, an environment variable that holds its value")
        found[name.lower()] = secret(f"a value for the header {name}", variable, None) or ""
    return found


def hushed(text: str, headers: Mapping[str, str]) -> str:
    """A server's words without the values of the headers that were sent to it: it may echo a key."""
    for value in headers.values():
        for told in (value, value.rpartition(" ")[2]):
            text = text.replace(told, "***") if len(told) > SHORT else text
    return text


def trusting(ca: str | None) -> ssl.SSLContext | None:
    """A TLS context that trusts an authority's certificates besides the usual ones; None for the usual ones alone."""
    if ca is None:
        return None
    context = httpx.create_ssl_context()
    try:
        context.load_verify_locations(ca)
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"{ca}: expected certificates in PEM form") from error
    return context
