"""Prompt text made from pieces: a piece's ident alone decides its words, on any machine, for ever.

Words are common English ones of four letters, with the space before them one token to all tokenizers that we know of.
A piece's words are chosen by the output of an extendable hash, so a cut piece is a byte-for-byte prefix of the whole
one. No word needs escaping in JSON, so a piece's text is also its JSON fragment, and a grown prompt costs only its new
pieces.
"""

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import shake_128

from keepwarm.traces.shipped import shipped

WORDS: list[bytes] = shipped("keepwarm.replayers", "text.toml")["words"].encode().split()
"""The most common first. Every text begins with the very first, so that what it costs to begin one does not depend on
the text.
"""

IDS = [b"%d" % ident for ident in range(1000, 1256)]
"""Token ids in place of words, that all vocabularies have and none uses for control."""

WORD = 5
"""Bytes a word takes, with the space after it."""


def _columns(words: Sequence[bytes]) -> list[bytes]:
    """For each letter of a word the table from a byte to it; fewer than 256 words are gone through again."""
    return [bytes(words[byte % len(words)][at] for byte in range(256)) for at in range(WORD - 1)]


_COLUMNS = _columns(WORDS)


def words(seed: bytes, count: int, columns: Sequence[bytes] = _COLUMNS, gap: bytes = b" ") -> bytes:
    """The first ``count`` words of a seed, a space between two; more words of the same seed begin with the same."""
    digest = shake_128(seed).digest(count)
    text = bytearray(gap) * (WORD * count)
    for column, letters in enumerate(columns):
        text[column::WORD] = digest.translate(letters)
    return bytes(text[:-1])


class PromptText:
    """The texts of pieces, those used last kept up to ``limit_bytes``; of some of the words, or of token ids.

    With a ``salt`` every text is another one, of as many words: a run under a salt of its own starts cold, and its
    prompts are as long as planned.
    """

    def __init__(
        self, *, salt: str = "", words: Sequence[bytes] = WORDS, ids: bool = False, limit_bytes: int = 16 << 20
    ) -> None:
        self._salt = b"keepwarm.text.2\0" + salt.encode() + b"\0"
        self._columns = _columns(IDS if ids else words)
        self._gap, self._first = (b",", b"") if ids else (b" ", WORDS[0])
        self._limit = limit_bytes
        self._held = 0
        self._texts: OrderedDict[int, bytes] = OrderedDict()

    def fragment(self, ident: int, count: int) -> bytes:
        """The first ``count`` words of a text, at least one, without a space at either end."""
        need = WORD * count - 1
        if need == len(self._first):
            return self._first
        text = self._texts.pop(ident, b"")
        if len(text) < need:
            self._held -= len(text)
            seed = self._salt + ident.to_bytes(32, "big", signed=True)
            text = self._first + words(seed, count, self._columns, self._gap)[len(self._first) :]
            self._held += len(text)
            while self._held > self._limit and self._texts:
                self._held -= len(self._texts.popitem(last=False)[1])
        self._texts[ident] = text
        return text if len(text) == need else text[:need]
