"""Prompt text: the same piece is the same words for ever, a cut is a prefix, a salt changes all of it."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.replayers.endpoint import Piece
from keepwarm.replayers.pieces import PieceIndex
from keepwarm.replayers.text import PromptText, roles, words

IDENTS = st.integers(0, 2**96 - 1)


def test_text_of_an_ident_is_fixed_for_ever() -> None:
    """The words of an ident are those that were first given to it: runs of different versions send the same bytes."""
    assert PromptText().fragment(Piece(1, 6, "user")) == b"nito joye siyo vose vaho noho"
    assert PromptText(salt="run 7").fragment(Piece(1, 6, "user")) == b"lehe meya bano leva gera sowe"
    assert words(b"x", 4) == b"pati ceno jato fowa"


@given(IDENTS, st.integers(1, 400), st.data())
def test_cut_piece_is_a_prefix_and_a_token_is_a_word(ident: int, tokens: int, data: st.DataObject) -> None:
    """Whichever of the two is asked for first, a cut piece's text is a prefix of the whole one's, word for token."""
    cut = data.draw(st.integers(1, tokens))
    text = PromptText()
    sizes = [cut, tokens] if data.draw(st.booleans()) else [tokens, cut]
    found = {size: text.fragment(Piece(ident, size, "user")) for size in sizes}
    assert found[tokens].startswith(found[cut])
    assert [len(found[size].split(b" ")) for size in sizes] == sizes
    assert all(len(word) == 4 and word.isalpha() and word.isascii() for word in found[tokens].split(b" "))


@given(IDENTS, IDENTS)
def test_different_idents_differ_in_their_first_words(one: int, other: int) -> None:
    """Two idents have the same first eight words only if they are the same ident."""
    text = PromptText()
    first, second = (text.fragment(Piece(ident, 8, "user")) for ident in (one, other))
    assert (first == second) == (one == other)


def test_vocabulary_has_4096_words() -> None:
    """All 4,096 words come up, so a word carries twelve bits."""
    assert len(set(words(b"all of them", 100_000).split())) == 4096


def test_salt_changes_every_word_and_no_length() -> None:
    """Under a run salt texts are of the same length and share next to nothing; the same salt gives the same text."""
    piece = Piece(5, 1000, "user")
    plain, salted = PromptText().fragment(piece), PromptText(salt="a").fragment(piece)
    assert len(plain) == len(salted) == 4999
    assert sum(a == b for a, b in zip(plain.split(), salted.split(), strict=True)) < 10
    assert PromptText(salt="a").fragment(piece) == salted != PromptText(salt="b").fragment(piece)


def test_forgotten_text_comes_back_the_same() -> None:
    """Texts beyond the memory's limit are made again, byte for byte."""
    small = PromptText(limit_bytes=1000)
    pieces = [Piece(ident, 150, "user") for ident in range(5)]
    first = [small.fragment(piece) for piece in pieces]
    assert [small.fragment(piece) for piece in pieces] == first


def test_kept_text_is_not_what_is_sent() -> None:
    """A piece that kept its text is synthesised all the same, for the text need not have the piece's token count."""
    text = PromptText()
    assert text.fragment(Piece(9, 3, "user", text="hello")) == text.fragment(Piece(9, 3, "user"))
    assert orjson.loads(b'"' + text.fragment(Piece(9, 3, "user")) + b'"').count(" ") == 2


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("lead tools system user", "system system system user"),
        ("lead user answer tool_result", "system user assistant user"),
        ("user answer answer hidden user", "user assistant assistant user user"),
        ("system user system user", "system user user user"),
        ("lead answer answer user", "system user assistant user"),
        ("user answer", "user user"),
        ("lead", "user"),
        ("", ""),
    ],
)
def test_roles_follow_kinds(kinds: str, expected: str) -> None:
    """System text stands at the start, answers are the assistant's, and the user opens and closes."""
    assert " ".join(roles([Piece(i, 1, kind) for i, kind in enumerate(kinds.split())])) == expected


SENTENCES = st.lists(st.lists(st.sampled_from(["aa", "ab", "b", "ba", "bb"]), max_size=12), max_size=12)


@given(SENTENCES, st.sampled_from([1 << 30, 40]))
def test_texts_share_pieces_for_exactly_the_words_they_share(sentences: list[list[str]], limit: int) -> None:
    """Any two texts known at once have the same pieces for their common words, and different ones from there on."""
    index = PieceIndex(limit_bytes=limit)
    texts = ["".join(word + " " for word in sentence).encode() for sentence in sentences]
    for text in texts:
        assert sum(piece.tokens for piece in index.pieces(text)) == text.count(b" ")
    if limit < 1000:
        return
    known = [[(p.ident, n) for p in index.pieces(text) for n in range(p.tokens)] for text in texts]
    for one, left in zip(sentences, known, strict=True):
        for other, right in zip(sentences, known, strict=True):
            shared = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
            common = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), None)
            assert shared == common
