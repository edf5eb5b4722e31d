"""Routes say which upstream a request goes to."""

from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from keepwarm.traces.errors import InputError


class Route(NamedTuple):
    """Where requests go: those whose path begins with ``prefix`` (it is replaced by the URL's own path), or that have a
    ``header`` of that ``value``.
    """

    prefix: str
    header: str
    value: str
    host: str
    port: int
    tls: bool
    path: str

    @property
    def netloc(self) -> str:
        """The upstream's host as a request names it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


def route(told: str) -> Route:
    """A route as a user writes it: URL, /prefix=URL, or header:value=URL. InputError if it is none."""
    match, _, url = ("/", "", told) if told.startswith(("http://", "https://")) else told.partition("=")
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise InputError(f"upstream {told!r}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise InputError(f"upstream {told!r}: expected an http or https URL, /prefix=URL or header:value=URL")
    if parts.username is not None:
        raise InputError("upstream: credentials in a URL are not taken: the client sends its own")
    prefix, header, value = match.rstrip("/"), "", ""
    if not match.startswith("/"):
        prefix, (header, colon, value) = "", match.partition(":")
        if not (header and colon):
            raise InputError(f"upstream {told!r}: expected a path that begins with /, or header:value, before the =")
    tls, path = parts.scheme == "https", parts.path.rstrip("/")
    return Route(prefix, header.lower(), value.strip(), parts.hostname, port, tls, path)


def all_routes(told: Sequence[str]) -> list[Route]:
    """All routes; InputError where two are for the same requests."""
    routes = [route(one) for one in told]
    if len({one[:3] for one in routes}) < len(routes):
        raise InputError("--upstream: two take the same requests: give one of them a /prefix= or header:value=")
    return routes


def choose(routes: Sequence[Route], path: str, headers: dict[str, str]) -> Route | None:
    """The route of a request: a header's before a path's, the longest path's first."""
    for one in routes:
        if one.header and headers.get(one.header) == one.value:
            return one
    bare = path.partition("?")[0] + "/"
    fitting = [one for one in routes if not one.header and bare.startswith(one.prefix + "/")]
    return max(fitting, key=lambda one: len(one.prefix), default=None)
