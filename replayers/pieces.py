"""PieceIndex gives prompts that arrive as text the pieces that a cache knows them by.

It is a radix tree over the texts themselves, whose runs end between words: two prompts share pieces for exactly the
words they share, whatever the cache's block, and a grown prompt costs one comparison of what it grew from.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import count

from keepwarm.replayers.endpoint import Piece


class _Run:
    """Words of one ident and kind, the last of them its ``end``-th; ``text`` ends with a space."""

    __slots__ = ("children", "end", "ident", "kind", "parent", "text")

    def __init__(self, parent: _Run | None, ident: int, kind: str, text: bytes, end: int) -> None:
        self.parent = self if parent is None else parent
        self.ident = ident
        self.kind = kind
        self.text = text
        self.end = end
        self.children: dict[bytes, _Run] = {}


class PieceIndex:
    """Texts seen, those used last kept up to ``limit_bytes``; a text that was let go comes back under new idents, so
    the limit must be above what the cache it serves can hold.
    """

    def __init__(self, *, limit_bytes: int = 1 << 30) -> None:
        self._limit = limit_bytes
        self._held = 0
        self._root = _Run(None, -1, "user", b"", 0)
        self._runs: OrderedDict[_Run, None] = OrderedDict()  # used longest ago first, a run before its parent
        self._idents = count()

    def pieces(self, text: bytes) -> tuple[Piece, ...]:
        """The pieces of a text: words, each with one space behind it and none before it; a word is a token. A word with
        a NUL before it begins a new piece, of the kind that stands before the NUL.
        """
        run, at = self._root, 0
        found: dict[int, Piece] = {}
        while at < len(text):
            word = text[at : text.index(b" ", at)]
            child = run.children.get(word)
            if child is None:
                child = self._grow(run, word, _turn(text, at))
            elif not text.startswith(child.text, at):
                child = self._split(child, _common(child.text, text, at))
            found[child.ident] = Piece(child.ident, child.end, child.kind)
            at += len(child.text)
            run = child
        self._use(run)
        return tuple(found.values())

    def _grow(self, parent: _Run, word: bytes, text: bytes) -> _Run:
        kind = word.split(b"\0")[-2].decode() if b"\0" in word else parent.kind
        run = parent.children[word] = _Run(parent, next(self._idents), kind, text, text.count(b" "))
        self._held += len(text)
        return run

    def _split(self, run: _Run, length: int) -> _Run:
        """Cut a run in two and return the upper half, which is new; both keep the ident."""
        head, tail = run.text[:length], run.text[length:]
        upper = _Run(run.parent, run.ident, run.kind, head, run.end - tail.count(b" "))
        run.parent.children[_word(head)] = upper
        run.parent, run.text = upper, tail
        upper.children[_word(tail)] = run
        return upper

    def _use(self, run: _Run) -> None:
        while run is not self._root:
            self._runs[run] = None
            self._runs.move_to_end(run)
            run = run.parent
        while self._held > self._limit and self._runs:
            gone, _ = self._runs.popitem(last=False)
            del gone.parent.children[_word(gone.text)]
            self._held -= len(gone.text)


def _turn(text: bytes, at: int) -> bytes:
    """A text from some word on up to the next that names a role before a NUL, so that no piece has two roles."""
    named = text.find(b"\0", text.index(b" ", at))
    return text[at : None if named < 0 else text.rindex(b" ", 0, named) + 1]


def _word(text: bytes) -> bytes:
    return text[: text.index(b" ")]


def _common(run: bytes, text: bytes, at: int) -> int:
    """How many bytes of a run a text repeats from ``at`` on, whole words only; the first word is known to be one."""
    low, high = 0, min(len(run), len(text) - at)
    while low < high:
        middle = (low + high + 1) // 2
        if text.startswith(run[low:middle], at + low):
            low = middle
        else:
            high = middle - 1
    return run.rfind(b" ", 0, low) + 1
