"""Prompt text: the same piece is the same words for ever, a cut is a prefix, a salt changes all of it."""

from __future__ import annotations

import re

import orjson
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.replayers.pieces import PieceIndex
from keepwarm.replayers.text import IDS, WORDS, PromptText, words

IDENTS = st.integers(0, 2**96 - 1)
IN_WORDS, IN_IDS = re.compile(rb"note( [a-z]{4})*"), re.compile(rb"1\d{3}(,1\d{3})*")


def test_text_of_an_ident_is_fixed_for_ever() -> None:
    """The words of an ident are those that were first given to it: runs of different versions send the same bytes."""
    assert PromptText().fragment(1, 6) == b"note than code rock long next"
    assert PromptText(salt="run 7").fragment(1, 6) == b"note some full your load type"
    assert PromptText(ids=True).fragment(1, 4) == b"1043,1150,1038,1219"
    assert words(b"x", 4) == b"bird come town fish"


@given(IDENTS, st.integers(1, 400), st.booleans(), st.data())
def test_cut_piece_is_a_prefix_of_as_many_words(ident: int, count: int, ids: bool, data: st.DataObject) -> None:
    """Whichever of the two is asked for first, a cut piece's text is a prefix of the whole one's, word for word, in
    words or in token ids.
    """
    cut = data.draw(st.integers(1, count))
    text = PromptText(ids=ids)
    sizes = [cut, count] if data.draw(st.booleans()) else [count, cut]
    found = {size: text.fragment(ident, size) for size in sizes}
    assert found[count].startswith(found[cut])
    for size, made in found.items():
        assert (IN_IDS if ids else IN_WORDS).fullmatch(made)
        assert len(made.split(b"," if ids else b" ")) == size


@given(IDENTS, IDENTS, st.booleans())
def test_different_idents_differ_in_their_first_words(one: int, other: int, ids: bool) -> None:
    """Two idents have the same first 16 words only if they are the same ident."""
    text = PromptText(ids=ids)
    assert (text.fragment(one, 16) == text.fragment(other, 16)) == (one == other)


def test_vocabulary_is_256_words_that_all_come_up() -> None:
    """All words are four letters that JSON does not escape, and all come up: so a word carries eight bits."""
    assert len(WORDS) == len(set(WORDS)) == len(set(IDS)) == 256
    assert all(len(word) == 4 and word.isalpha() and word.islower() for word in WORDS)
    assert set(words(b"all of them", 100_000).split()) == set(WORDS)


def test_only_the_words_given_are_used() -> None:
    """Of a vocabulary of 64 words all come up and no others, and texts begin with the usual first word all the same."""
    few = WORDS[100:164]
    said = PromptText(words=few).fragment(7, 10_000).split()
    assert said[0] == WORDS[0] not in few
    assert set(said[1:]) == set(few)


def test_salt_changes_every_word_and_no_length() -> None:
    """Under a run salt texts are of the same length and share next to nothing; the same salt gives the same text."""
    plain, salted = PromptText().fragment(5, 1000), PromptText(salt="a").fragment(5, 1000)
    assert len(plain) == len(salted) == 4999
    assert sum(a == b for a, b in zip(plain.split(), salted.split(), strict=True)) < 20
    assert PromptText(salt="a").fragment(5, 1000) == salted != PromptText(salt="b").fragment(5, 1000)


def test_forgotten_text_comes_back_the_same() -> None:
    """Texts beyond the memory's limit are made again, byte for byte."""
    small = PromptText(limit_bytes=1000)
    first = [small.fragment(ident, 150) for ident in range(5)]
    assert [small.fragment(ident, 150) for ident in range(5)] == first


def test_a_text_that_grows_past_the_limit_is_kept_and_the_others_are_not() -> None:
    """The text used longest ago is asked for at more words than there is room for beside the others."""
    small, roomy = PromptText(limit_bytes=1000), PromptText()
    asked = [(1, 100), (2, 90), (1, 150), (2, 90), (1, 100), (3, 120), (1, 199)]
    assert [small.fragment(*each) for each in asked] == [roomy.fragment(*each) for each in asked]


def test_a_text_is_its_own_json() -> None:
    """Nothing of a text is escaped in JSON, and a list of ids in brackets is a list of numbers."""
    text = PromptText().fragment(9, 300)
    assert orjson.loads(b'"' + text + b'"').encode() == text
    assert orjson.loads(b"[" + PromptText(ids=True).fragment(9, 3) + b"]") == [1026, 1016, 1251]


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
