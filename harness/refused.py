"""Refused is a request that cannot be answered."""

from __future__ import annotations


class Refused(Exception):
    """The HTTP status, and what to tell the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
