"""Refused is a request that cannot be answered."""

from __future__ import annotations

from starlette.exceptions import HTTPException


class Refused(HTTPException):
    """The HTTP status, and what to tell the client."""
