"""Prompt text made from pieces: a piece's ident alone decides its words, on any machine, for ever.

A word is one token to the simulated cluster, four letters and a space. The words of an ident are the output of an
extendable hash, so a cut piece is a byte-for-byte prefix of the whole one. No word needs escaping in JSON, so a piece's
text is also its JSON fragment, and a grown prompt costs only its new pieces.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import shake_128

from keepwarm.replayers.endpoint import Piece

WORD = 5
"""Bytes a word takes, with the space after it."""


def _letters(letters: bytes, shift: int) -> bytes:
    """A table from a byte to a letter, chosen by the byte's bits from ``shift`` on."""
    return bytes(letters[(byte >> shift) % len(letters)] for byte in range(256))


# Consonant, vowel, consonant, vowel: 4,096 words. The consonants are chosen so that no word offends.
_COLUMNS = (
    (0, _letters(b"bcdfgjlmnprstvwz", 2)),
    (0, _letters(b"aeio", 0)),
    (1, _letters(b"bcfhjklmnqrstvwy", 2)),
    (1, _letters(b"aeio", 0)),
)


def words(seed: bytes, count: int) -> bytes:
    """The first ``count`` words of a seed, a space between two; more words of the same seed begin with the same."""
    digest = shake_128(seed).digest(2 * count)
    text = bytearray(b" ") * (WORD * count)
    for column, (byte, letters) in enumerate(_COLUMNS):
        text[column::WORD] = digest[byte::2].translate(letters)
    return bytes(text[:-1])


class PromptText:
    """The texts of pieces, those used last kept up to ``limit_bytes``.

    With a ``salt`` every text is another one, of as many words: a run under a salt of its own starts cold, and its
    prompts are as long as planned.
    """

    def __init__(self, *, salt: str = "", limit_bytes: int = 128 << 20) -> None:
        self._salt = b"keepwarm.text.1\0" + salt.encode() + b"\0"
        self._limit = limit_bytes
        self._held = 0
        self._texts: OrderedDict[int, bytes] = OrderedDict()

    def fragment(self, piece: Piece) -> bytes:
        """A piece's text, ``piece.tokens`` words without a space at either end; what ``piece.text`` keeps is not used,
        for its length in tokens is not the piece's.
        """
        need = max(WORD * piece.tokens - 1, 0)
        text = self._texts.get(piece.ident)
        if text is None or len(text) < need:
            text = words(self._salt + piece.ident.to_bytes(32, "big", signed=True), piece.tokens)
            self._hold(piece.ident, text)
        self._texts.move_to_end(piece.ident)
        return text if len(text) == need else text[:need]

    def _hold(self, ident: int, text: bytes) -> None:
        self._held += len(text) - len(self._texts.get(ident, b""))
        self._texts[ident] = text
        while self._held > self._limit and len(self._texts) > 1:
            self._held -= len(self._texts.popitem(last=False)[1])


_SYSTEM = ("lead", "tools", "system")


def roles(prompt: Sequence[Piece]) -> list[str]:
    """Who says each piece: ``system`` for the leads, tools and system blocks a prompt starts with, ``assistant`` for
    answers, ``user`` for all else, the first and the last thing said among them, because endpoints refuse a
    conversation that an assistant opens or closes.
    """
    names: list[str] = []
    for piece in prompt:
        opening = not names or names[-1] == "system"
        if opening and piece.kind in _SYSTEM:
            names.append("system")
        else:
            names.append("assistant" if piece.kind == "answer" and not opening else "user")
    if names:
        names[-1] = "user"
    return names
