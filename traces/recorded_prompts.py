"""RecordedPrompt follows one agent's prompt as its pieces were seen on the wire, and gives them tokens that add up."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from keepwarm.traces.breaks import change, common
from keepwarm.traces.identity import Identity
from keepwarm.traces.model import Breakpoint, PrefixBreak, Segment
from keepwarm.traces.steps import Piece, Prompt, Step, Stream, Turn, Wire
from keepwarm.traces.thread import Block, Growth, filled

SHARED = ("tools", "system", "user")
"""Kinds whose size, once told by a call's account, is the same wherever they stand: so that prompts share them."""


class _Seen(NamedTuple):
    """A call whose prompt another may grow from."""

    call: str
    model: str
    pieces: Sequence[Piece]
    sizes: Sequence[int]


class RecordedPrompt:
    """One agent's prompt. What its pieces have in common with the last ones is kept; the rest of what the provider
    counted is spread over the new pieces by weight. ``sizes`` are those of all prompts' shared pieces, by model and
    identity, as they come to be known.
    """

    def __init__(self, identity: Identity, sizes: dict[tuple[str, int], int], stream: Stream) -> None:
        self._identity = identity
        self._sizes = sizes
        self._last: _Seen | None = None
        self._seen: dict[str, _Seen] = {}
        self._answers: dict[int, tuple[int, str]] = {}
        self.given: dict[str, int] = {}

    def follow(self, origin: Prompt, turns: Sequence[Turn]) -> None:
        """Go on from where another agent's last turn left its prompt."""
        assert isinstance(origin, RecordedPrompt)
        self._last, self._answers = origin._last, dict(origin._answers)

    def next(self, step: Step, start_ns: int, end_ns: int) -> Turn:
        """The turn that a step is."""
        wire = step.wire
        assert wire is not None
        pieces = wire.request.rest
        parent, switched = self._parent(step)
        at = common(parent.pieces, pieces) if parent else 0
        growth, sizes = self._grown(step, parent.sizes[:at] if parent else [], pieces[at:])
        broke = _broken(parent, pieces, sizes, at, growth.keep) if parent and not switched else None
        cause = "model_switch" if switched else _cause(step, broke)
        self._tell_answer(step, wire)
        marks = _marks(step, wire, sizes)
        model = step.model or (self._last.model if self._last else "")
        self._last = self._seen[model] = _Seen(step.id, model, pieces, sizes)
        results = [sizes[i] for i in range(at, len(pieces)) if pieces[i].kind == "tool_result"]
        uses = [given.tool_use for given in step.inputs if given.tool_use is not None]
        self.given |= dict(zip(uses, results, strict=False))
        return Turn(step, start_ns, end_ns, *growth, parent.call if parent else None, cause, marks, broke)

    def _parent(self, step: Step) -> tuple[_Seen | None, bool]:
        """The call whose prompt this one grows from, and whether that is not the last one, but one of another model."""
        last = self._last
        if last is None or last.model == step.model or not step.model:  # a request that could not be read tells none
            return last, False
        return self._seen.get(step.model, last._replace(pieces=[], sizes=[])), True

    def _grown(self, step: Step, kept: Sequence[int], new: Sequence[Piece]) -> tuple[Growth, list[int]]:
        """How the prompt came about, and the size of each piece in it."""
        blocks = [self._block(step.model, piece) for piece in new]
        size = step.usage.prompt if step.usage else sum(kept) + sum(round(block.weight) for block in blocks)
        keep = min(sum(kept), size)
        starts = accumulate(kept, initial=0)
        left = [max(0, min(tokens, keep - start)) for tokens, start in zip(kept, starts, strict=False)]
        sizes = filled(size - keep, blocks)
        append = []
        for piece, block, tokens in zip(new, blocks, sizes, strict=True):
            if piece.kind in SHARED and step.usage:
                self._sizes.setdefault((step.model, piece.hash), tokens)
            if tokens:
                append.append(Segment(block.hash, tokens, block.kind, block.answer_of, piece.text))
        surplus = size - keep - sum(sizes)
        if surplus:
            append.append(Segment(self._identity.hash(f"hidden\0{step.id}".encode()), surplus, "hidden"))
        return Growth(keep, tuple(append)), left + sizes

    def _block(self, model: str, piece: Piece) -> Block:
        """A piece with what is known of its size."""
        size = self._sizes.get((model, piece.hash)) if piece.kind in SHARED else None
        answer_of = None
        if piece.kind == "answer" and piece.hash in self._answers:
            size, answer_of = self._answers[piece.hash]
        weight = piece.weight if size is None else size
        return Block(piece.hash, weight, piece.kind, answer_of, exact=size is not None)

    def _tell_answer(self, step: Step, wire: Wire) -> None:
        """Note how large the answer's pieces are, for the prompts that will hold them."""
        blocks = [Block(piece.hash, piece.weight, "answer") for piece in wire.answer.said]
        sizes = [round(b.weight) for b in blocks] if step.output is None else filled(step.output, blocks)
        self._answers |= {block.hash: (size, step.id) for block, size in zip(blocks, sizes, strict=True)}


def _broken(before: _Seen, pieces: Sequence[Piece], sizes: Sequence[int], at: int, keep: int) -> PrefixBreak | None:
    """Where and how a prompt leaves the one that it grows from, if it does."""
    if at >= len(before.pieces):
        return None
    how = change(before.pieces, pieces, at)
    pieces, sizes = (pieces, sizes) if how == "added" else (before.pieces, before.sizes)
    return PrefixBreak(keep, at, pieces[at].kind, sizes[at], how)


def _cause(step: Step, broke: PrefixBreak | None) -> str | None:
    """Why the prompt kept less than all of its parent's, where that has a name."""
    if broke is None:
        return None
    return step.reset or ("microcompaction" if broke.change == "cleared" else None)


def _marks(step: Step, wire: Wire, sizes: Sequence[int]) -> tuple[Breakpoint, ...]:
    """The cache marks in tokens. None lies past what the provider counted as cacheable."""
    most = None
    if step.usage and step.usage.read_told and step.usage.uncached < step.usage.prompt:
        most = step.usage.prompt - step.usage.uncached
    marks: dict[int, int] = {}
    for pieces, ttl_s in wire.request.marks:
        at = sum(sizes[:pieces]) if most is None else min(sum(sizes[:pieces]), most)
        marks[at] = max(ttl_s, marks.get(at, 0))
    return tuple(Breakpoint(at, ttl_s) for at, ttl_s in sorted(marks.items()) if at)
