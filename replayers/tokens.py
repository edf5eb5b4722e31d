"""Costs are what an endpoint's tokenizer and chat template make of a prompt's blocks, found out by asking it.

A block takes an overhead, by its role and that of the block before it, and a token, or so many, for each word after its
first. Probes are small prompts that differ by one block: what each takes is what the endpoint's own account says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from keepwarm.replayers.text import WORDS

GROUP = 16
"""Words that are asked about together; those of a group that takes more tokens than it has words are not used."""
FEWEST = 4
"""Groups that must be good, for a vocabulary of 64 words."""

ROLES = {"T": "tool", "S": "system", "U": "user", "A": "answer", "X": "use", "R": "result"}
PROBES = ("U", "UU", "SU", "SSU", "UAU", "UAAU", "UXR", "UXXRR", "UAXR", "UXRU", "UXRAU", "UXRXR", "TU", "TTU", "TSU")
"""Prompts by their blocks' roles. Each shows one overhead that none before it has shown; of two that only come together
the last has their sum.
"""
PLAIN_PROBES = ("U", "UU", "SU", "SSU", "UAU", "UAAU")
CHECK = "SUAXRUXXRRAUXRU"
"""A prompt that no overhead was taken from: how far off it is shows how well they add up."""

Spelled = Sequence[tuple[str, Sequence[bytes]]]
"""A probe: each block's role, and its words after the first."""
Counts = Callable[[Spelled], Awaitable[int]]
"""Asks an endpoint how many tokens a prompt has."""


class Costs(NamedTuple):
    """``words`` to write prompts with, each of which takes ``word`` tokens; ``overheads`` by the roles of the block
    before ("" for none) and of the block itself, its first word's tokens with them; whether prompts have ``tools``.
    ``off`` is by how much of itself a prompt that was no probe differed from what they say, None if none was tried.
    """

    words: Sequence[bytes] = WORDS
    word: float = 1.0
    overheads: Mapping[tuple[str, str], float] = {}
    tools: bool = True
    off: float | None = None

    def overhead(self, before: str, role: str) -> float:
        """What a block takes beyond the words after its first; where no probe had the two, as after other blocks."""
        known = self.overheads.get((before, role))
        if known is not None:
            return known
        others = [tokens for (_, after), tokens in self.overheads.items() if after == role]
        return sum(others) / len(others) if others else 1.0

    def step(self, uses: int) -> float:
        """The fewest tokens of an answer and what follows it: so many uses and results, or a user's word."""
        if not uses:
            return self.overhead("user", "answer") + self.overhead("answer", "user")
        more = self.overhead("use", "use") + self.overhead("result", "result")
        return self.overhead("user", "use") + self.overhead("use", "result") + (uses - 1) * more

    def told(self) -> dict[str, Any]:
        """It as run.json has it."""
        overheads = {f"{before}>{role}": tokens for (before, role), tokens in self.overheads.items()}
        words = [word.decode() for word in self.words]
        return {"words": words, "word": self.word, "overheads": overheads, "tools": self.tools, "off": self.off}

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Costs:
        """What a run.json has of it."""
        overheads = {tuple(name.split(">")): float(tokens) for name, tokens in told["overheads"].items()}
        words = [word.encode() for word in told["words"]]
        return cls(words, float(told["word"]), overheads, bool(told["tools"]), told.get("off"))


async def calibrate(count: Counts, *, tools: bool = True, words: Sequence[bytes] = WORDS) -> Costs:
    """The costs of an endpoint. ``words`` are those to choose from."""
    probes = PROBES if tools else PLAIN_PROBES
    totals = await asyncio.gather(*(count(_spelled(probe)) for probe in probes))
    overheads = _solved(probes, totals)
    chosen, word = await _words(count, totals[0], words)
    costs = Costs(chosen, word, overheads, tools)
    check = _spelled(CHECK if tools else PLAIN_PROBES[-1], chosen[:GROUP])
    really = await count(check)
    return costs._replace(off=abs(_expected(costs, check) - really) / really)


def _spelled(probe: str, words: Sequence[bytes] = ()) -> Spelled:
    return [(ROLES[letter], words) for letter in probe]


def _expected(costs: Costs, probe: Spelled) -> float:
    before = ["", *(role for role, _ in probe)]
    pairs = zip(before, probe, strict=False)
    return sum(costs.overhead(last, role) + costs.word * len(words) for last, (role, words) in pairs)


def _solved(probes: Sequence[str], totals: Sequence[int]) -> dict[tuple[str, str], float]:
    """Overheads from what the probes took."""
    known: dict[tuple[str, str], float] = {}
    for probe, total in zip(probes, totals, strict=True):
        pairs = list(pairwise(["", *(ROLES[letter] for letter in probe)]))
        new = list(dict.fromkeys(pair for pair in pairs if pair not in known))
        known |= dict.fromkeys(new, 1.0)  # a first word's, at least
        if new:
            known[new[-1]] = 0.0
            known[new[-1]] = total - sum(known[pair] for pair in pairs)
    return known


async def _words(count: Counts, least: int, words: Sequence[bytes]) -> tuple[Sequence[bytes], float]:
    """The words that are one token each, if there are enough of them, or else all and what they take on average.
    ``least`` is what a user's block of one word takes.
    """
    taken = await count([("user", words)]) - least
    if taken == len(words):
        return words, 1.0
    groups = [words[at : at + GROUP] for at in range(0, len(words), GROUP)]
    totals = await asyncio.gather(*(count([("user", group)]) for group in groups))
    good = [group for group, total in zip(groups, totals, strict=True) if total - least == len(group)]
    if len(good) < FEWEST:
        return words, taken / len(words)
    return [word for group in good for word in group], 1.0
