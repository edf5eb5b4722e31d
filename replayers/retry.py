"""Whether and when a call is tried again: as the official SDKs of the recorded agents do."""

from random import Random

from keepwarm.replayers.endpoint import Answer

RETRIES = 2
"""How often those SDKs try again."""
STATUSES = (408, 409, 429)
PASSING = ("reset", "timeout", "overloaded", "rate_limit")
"""Errors that may pass, told by a status or in a stream; a stream that was dropped, or took too long, is begun anew."""
FIRST_S, MOST_S, LONGEST_TOLD_S = 0.5, 8.0, 60.0


def wait_s(answer: Answer, tries: int, random: Random) -> float | None:
    """How long to wait before the next try of a call that got this answer in its so many-th; None: it is final. The
    server's own Retry-After holds up to a minute; else half a second, doubled by each try, less up to a quarter.
    """
    status = answer.status or 0
    if answer.error is None or not (answer.error in PASSING or status in STATUSES or status >= 500):
        return None
    told = answer.retry_after_s
    if told is not None and 0 < told <= LONGEST_TOLD_S:
        return told
    return min(FIRST_S * 2.0 ** (tries - 1), MOST_S) * (1 - random.random() / 4)
