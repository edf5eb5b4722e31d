"""Decoding is the part of an engine's batch that generates: one token a step for each call."""

from bisect import bisect_right
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

W = TypeVar("W")


class Decoding(Generic[W]):
    """``count`` are the steps made so far, ``kv`` the tokens in all its calls' caches. Between two steps nothing is
    done for a call alone: when it ends and when it needs a block follow from the count.
    """

    def __init__(self, block: int) -> None:
        self.count = self.kv = 0
        self._block = block
        self._ends: list[tuple[int, int, W]] = []
        self._added = 0
        self._needs = [0] * block

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, work: W, tokens: int, left: int) -> int:
        """A call with ``tokens`` computed has so many left to generate; the count at which it begins."""
        self._added += 1
        heappush(self._ends, (self.count + left, self._added, work))
        self._needs[(self.count - tokens) % self._block] += 1
        self.kv += tokens + 1
        return self.count

    def remove(self, work: W, tokens: int, base: int) -> int:
        """A call that began at a count with ``tokens`` computed is done; the steps it took part in."""
        if self._ends[0][2] is work:
            heappop(self._ends)
        else:
            self._ends = [entry for entry in self._ends if entry[2] is not work]
            heapify(self._ends)
        self._needs[(base - tokens) % self._block] -= 1
        self.kv -= tokens + 1 + self.count - base
        return self.count - base

    def need(self, steps: int) -> int:
        """Blocks that its next steps take."""
        cycles, rest = divmod(steps, self._block)
        need = cycles * len(self._ends)
        for step in range(self.count, self.count + rest):
            need += self._needs[step % self._block]
        return need

    def steps_within(self, blocks: int, most: int) -> int:
        """How many steps take no more than so many blocks: at least one, which may, at most ``most``."""
        if self.need(most) <= blocks:
            return most
        return max(bisect_right(range(1, most), blocks, key=self.need), 1)

    def go(self, steps: int) -> None:
        """So many steps are made."""
        self.count += steps
        self.kv += steps * len(self._ends)

    def left(self) -> int:
        """Steps until the first call ends."""
        return self._ends[0][0] - self.count

    def ended(self) -> W | None:
        """A call that has nothing left to generate."""
        return self._ends[0][2] if self._ends and self._ends[0][0] <= self.count else None
