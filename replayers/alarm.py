"""Alarm wakes a replay when a call is due: a Linux timerfd, because an event loop's own timers are up to a millisecond
late; elsewhere those.
"""

import asyncio
import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from time import monotonic_ns

CLOCK_MONOTONIC, TFD_NONBLOCK, TFD_CLOEXEC, TFD_TIMER_ABSTIME = 1, os.O_NONBLOCK, os.O_CLOEXEC, 1


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Setting(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Alarm:
    """Calls ``ring`` once at the time it was last set to, in the running loop."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._ring = ring
        self._timer: asyncio.TimerHandle | None = None
        self._fd = -1
        with suppress(OSError, AttributeError):
            self._libc = ctypes.CDLL(None)
            self._fd = self._libc.timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)
        if self._fd >= 0:
            self._loop.add_reader(self._fd, self._rang)

    def set(self, in_ns: int) -> None:
        """Ring in so many ns, not at any time set before."""
        if self._fd >= 0:
            seconds, rest = divmod(max(monotonic_ns() + in_ns, 1), 10**9)
            setting = _Setting(value=_Timespec(seconds, rest))
            self._libc.timerfd_settime(self._fd, TFD_TIMER_ABSTIME, ctypes.byref(setting), None)
            return
        self.unset()
        self._timer = self._loop.call_later(in_ns / 1e9, self._ring)

    def unset(self) -> None:
        """Do not ring."""
        if self._fd >= 0:
            self._libc.timerfd_settime(self._fd, 0, ctypes.byref(_Setting()), None)
        elif self._timer is not None:
            self._timer.cancel()

    def close(self) -> None:
        """It rings no more."""
        self.unset()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _rang(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._fd, 8)
        self._ring()
