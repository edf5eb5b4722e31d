"""PromptTree against explicit lists of tokens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.replayers.endpoint import Piece
from keepwarm.replayers.tree import Node, PromptTree

Tokens = tuple[tuple[int, int], ...]

PIECES = st.lists(st.builds(Piece, st.integers(1, 3), st.integers(1, 6), st.just("user")), max_size=4)


def tokens(pieces: list[Piece]) -> Tokens:
    """Pieces as explicit tokens: a piece is its segment's first tokens."""
    return tuple((piece.ident, at) for piece in pieces for at in range(piece.tokens))


def told(node: Node) -> Tokens:
    """The tokens of a prompt as the nodes on the way to it tell them."""
    runs: list[Tokens] = []
    while node.parent is not node:
        runs.append(tokens(node.pieces())[node.offset :])
        node = node.parent
    return tuple(token for run in reversed(runs) for token in run)


def nodes_of(node: Node) -> list[Node]:
    """A node, and all that it goes on from."""
    found = [node]
    while found[-1].parent is not found[-1]:
        found.append(found[-1].parent)
    return found


def common(one: Tokens, other: Tokens) -> int:
    """How many tokens two prompts begin with alike."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class Notes:
    """A keeper that knows of a node how many tokens of its prompt it keeps."""

    def __init__(self, tree: PromptTree) -> None:
        self.slot = tree.join(self)

    def split(self, upper: Node, lower: Node) -> None:
        """Both halves are kept."""
        upper.held[self.slot] = upper.end
        assert lower.held[self.slot] == lower.end


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), st.integers(0, 9), PIECES),
        st.tuples(st.just("at"), st.integers(0, 9), st.integers(0, 25)),
        st.tuples(st.just("keep"), st.integers(0, 9)),
        st.tuples(st.just("forget"), st.integers(0, 9)),
    ),
    max_size=25,
)


@settings(max_examples=500, deadline=None)
@given(steps=STEPS)
def test_a_tree_is_a_set_of_token_lists(steps: list[tuple[Any, ...]]) -> None:
    """Prompts grown, cut, forked inside pieces, kept and forgotten in any order: every handle goes on telling its own
    tokens, two prompts meet at exactly the last token they share, and what is kept stays in the tree.
    """
    tree = PromptTree()
    notes = Notes(tree)
    prompts: list[tuple[Node, Tokens]] = [(tree.root, ())]
    for name, which, *what in steps:
        node, list_ = prompts[which % len(prompts)]
        if name == "extend":
            prompts.append((tree.extend(node, what[0]), list_ + tokens(what[0])))
        elif name == "at":
            prompts.append((tree.at(node, what[0]), list_[: what[0]]))
        elif node.linked and node.parent is not None:
            for each in nodes_of(node)[:-1] if name == "keep" else [node]:
                each.held[notes.slot] = each.end if name == "keep" else None
            if name == "forget":
                tree.prune(node)
        for each, expected in prompts:
            assert told(each) == expected
            assert each.end == len(expected)
            assert each.linked or not any(each.held)
    fresh = [(tree.extend(node, []), list_) for node, list_ in prompts]
    assert [tree.extend(node, []) for node, _ in fresh] == [node for node, _ in fresh]
    for one, first in fresh:
        for other, second in fresh:
            shared = max(node.end for node in set(nodes_of(one)) & set(nodes_of(other)))
            assert shared == common(first, second)


@settings(max_examples=200, deadline=None)
@given(prompts=st.lists(PIECES, max_size=8), order=st.randoms(use_true_random=False))
def test_a_tree_of_forgotten_prompts_is_empty(prompts: list[list[Piece]], order: Any) -> None:
    """However they fork, once all prompts are forgotten in any order the root has nothing below it."""
    tree = PromptTree()
    nodes = [tree.extend(tree.root, pieces) for pieces in prompts]
    order.shuffle(nodes)
    for node in nodes:
        tree.prune(node)
    assert tree.root.children == {}


def test_pieces_keep_their_kinds_through_splits() -> None:
    """A prompt of three kinds, left by two others inside its first and its last piece, tells them as before."""
    tree = PromptTree()
    pieces = [Piece(1, 5, "tools"), Piece(2, 4, "system"), Piece(3, 6, "user")]
    node = tree.extend(tree.root, pieces)
    tree.at(node, 3)
    tree.extend(tree.at(node, 12), [Piece(4, 2, "answer")])
    kinds = [kind for each in reversed(nodes_of(node)) for kind in each.kinds]
    assert kinds == ["tools", "tools", "system", "user", "user"]
    assert told(node) == tokens(pieces)


def test_a_forgotten_prompt_comes_back_whole() -> None:
    """A piece cut into three runs, all of them forgotten: what goes on from its end goes on from all its tokens."""
    tree = PromptTree()
    node = tree.extend(tree.root, [Piece(1, 9, "user")])
    tree.at(tree.at(node, 6), 3)
    tree.prune(node)
    assert tree.root.children == {}
    again = tree.extend(node, [Piece(2, 4, "answer")])
    assert told(again) == tokens([Piece(1, 9, "user"), Piece(2, 4, "answer")])
    assert tree.at(again, 9) is tree.extend(tree.root, [Piece(1, 9, "user")])


def test_a_prompt_that_grows_does_not_walk_what_it_grew_from() -> None:
    """The handle of the prompt before is all that is needed: what was appended is one node more."""
    tree = PromptTree()
    node = tree.root
    for turn in range(50):
        node = tree.extend(node, [Piece(turn, 10, "user"), Piece(1000 + turn, 3, "answer")])
    assert len(nodes_of(node)) == 51
    assert node.end == 650


def test_caches_join_before_the_first_prompt() -> None:
    """Nodes have a place for each cache from the beginning."""
    tree = PromptTree()
    tree.extend(tree.root, [Piece(1, 5, "user")])
    with pytest.raises(ValueError, match="must join its tree before the first prompt"):
        Notes(tree)
