"""PromptTree knows prompts by their prefixes: a radix tree of pieces, shared by all caches of a simulated cluster.

A node is a place in prompts: all that stands on the way to it from the root. Its run is what it adds to its parent, as
many pieces as one call brought; where a prompt leaves a run in its middle, the run is split. A prompt that grows from
another is made from that one's node, so its cost is what is new in it. What a cache keeps of a node stands in the
node's ``held``, in the cache's own slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol

from keepwarm.replayers.endpoint import Piece


class Node:
    """The prompt of ``end`` tokens that ends here. ``ends`` are the tokens up to and with each piece of its run,
    ``offset`` how much of the first piece stands above it. The root's parent is the root.
    """

    __slots__ = ("children", "end", "ends", "held", "idents", "kinds", "linked", "offset", "parent")

    def __init__(self, parent: Node | None, offset: int, idents: tuple[int, ...], ends: tuple[int, ...], slots: int):
        self.parent = self if parent is None else parent
        self.offset = offset
        self.idents = idents
        self.ends = ends
        self.end = ends[-1] if ends else 0
        self.kinds: tuple[str, ...] = ()
        self.held: list[Any] = [None] * slots
        self.children: dict[Any, Node] = {}
        self.linked = True

    @property
    def start(self) -> int:
        """The tokens above it."""
        return self.parent.end

    def key(self) -> Any:
        """What its parent knows it by."""
        return (self.idents[0], self.offset) if self.offset else self.idents[0]

    def pieces(self) -> list[Piece]:
        """The pieces of its run; the first begins at its ``offset``, and tells its tokens from its own begin."""
        tokens = (end - begin for begin, end in pairwise((self.start - self.offset, *self.ends)))
        return list(map(Piece, self.idents, tokens, self.kinds))


class Keeper(Protocol):
    """A cache of the tree's prompts."""

    def split(self, upper: Node, lower: Node) -> None:
        """A node was cut in two: ``lower`` is the object it was, ``upper`` is new and its parent."""


class PromptTree:
    """All prompts that a cache knows or a running call has."""

    def __init__(self) -> None:
        self.root = Node(None, 0, (), (), 0)
        self._keepers: list[Keeper] = []
        self._kinds: dict[tuple[str, ...], tuple[str, ...]] = {}

    def join(self, keeper: Keeper) -> int:
        """A cache's slot in the nodes' ``held``. All caches join before the first prompt."""
        if self.root.children:
            raise ValueError("a cache must join its tree before the first prompt")
        self._keepers.append(keeper)
        self.root.held.append(None)
        return len(self._keepers) - 1

    def extend(self, node: Node, pieces: Sequence[Piece], offset: int = 0) -> Node:
        """The prompt that goes on from a node with these pieces, the first of them from its token ``offset`` on."""
        if not node.linked:
            node = self._relinked(node)
        at = 0
        while at < len(pieces):
            ident, tokens = pieces[at][:2]
            child = node.children.get((ident, offset) if offset else ident)
            if child is None:
                return self._add(node, pieces[at:] if at else pieces, offset)
            if not offset and len(child.ends) == 1 and child.end - node.end == tokens:
                node, at = child, at + 1  # one whole piece, as an answer mostly is
            else:
                node, at, offset = self._follow(child, pieces, at, offset)
        return node

    def at(self, node: Node, tokens: int) -> Node:
        """A prompt's first tokens; all of it where it has fewer."""
        if not node.linked:
            node = self._relinked(node)
        while node.parent.end >= tokens and node is not self.root:
            node = node.parent
        return self._split(node, tokens) if node.end > tokens else node

    def prune(self, node: Node) -> None:
        """Forget a prompt that no cache holds and none goes on from, and what of its prefix is as idle."""
        while node is not self.root and node.linked and not node.children and not any(node.held):
            del node.parent.children[node.key()]
            node.linked = False
            node = node.parent

    def _add(self, parent: Node, pieces: Sequence[Piece], offset: int) -> Node:
        idents, tokens, kinds, *_ = zip(*pieces, strict=True)
        ends = tuple(accumulate(tokens, initial=parent.end - offset))[1:]
        node = Node(parent, offset, idents, ends, len(self._keepers))
        node.kinds = self._kinds.setdefault(kinds, kinds)  # few differ, and a node is made a call
        parent.children[(idents[0], offset) if offset else idents[0]] = node
        return node

    def _follow(self, child: Node, pieces: Sequence[Piece], at: int, offset: int) -> tuple[Node, int, int]:
        """Go down a run as far as the pieces agree with it: the node there, and what of the pieces comes next."""
        tokens, first = child.start, True
        for ident, end in zip(child.idents, child.ends, strict=True):
            if at == len(pieces) or pieces[at].ident != ident or (offset and not first):
                break
            first = False
            left = pieces[at].tokens - offset
            take = min(end - tokens, left)
            tokens += take
            at, offset = (at + 1, 0) if take == left else (at, offset + take)
            if tokens < end:
                break
        return (self._split(child, tokens) if tokens < child.end else child), at, offset

    def _split(self, lower: Node, tokens: int) -> Node:
        """Cut a node after so many tokens and return the upper half; whoever has the node has its lower half."""
        parent = lower.parent
        index = next(i for i, end in enumerate(lower.ends) if end > tokens)
        begun = lower.ends[index - 1] if index else parent.end - lower.offset
        cut = tokens > begun
        upto = index + 1 if cut else index
        ends = lower.ends[:index] + ((tokens,) if cut else ())
        upper = Node(parent, lower.offset, lower.idents[:upto], ends, len(self._keepers))
        upper.kinds = lower.kinds[:upto]
        parent.children[lower.key()] = upper
        lower.offset = tokens - begun
        lower.idents, lower.ends, lower.kinds = lower.idents[index:], lower.ends[index:], lower.kinds[index:]
        lower.parent = upper
        upper.children[lower.key()] = lower
        for slot, held in enumerate(lower.held):
            if held is not None:
                self._keepers[slot].split(upper, lower)
        return upper

    def _relinked(self, node: Node) -> Node:
        """The node that stands for one which was forgotten."""
        gone = []
        while not node.linked:
            gone.append(node)
            node = node.parent
        pieces: list[Piece] = []
        for one in reversed(gone):
            if one.offset and pieces:
                pieces.pop()  # the same piece, which the next run tells whole
            pieces += one.pieces()
        return self.extend(node, pieces, gone[-1].offset)
