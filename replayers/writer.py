"""Writer makes prompts into the blocks and bytes of a body. A grown prompt costs what is new in it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from keepwarm.replayers.blocks import Block, Role, label, opening, run
from keepwarm.replayers.dialect import Dialect
from keepwarm.replayers.endpoint import Piece, Said
from keepwarm.replayers.text import PromptText
from keepwarm.replayers.tokens import Costs
from keepwarm.traces.model import Breakpoint

Buffer = bytes | memoryview

MARKS = 4
"""How many cache marks an API takes."""


@dataclass(slots=True)
class _Account:
    """Where writing has got to: the role of the last block, tokens planned and spent, names given, answers heard."""

    before: str = ""
    planned: int = 0
    spent: float = 0.0
    live: str | None = None
    names: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("tool", "use", "result"), 0))

    def copy(self) -> _Account:
        return _Account(self.before, self.planned, self.spent, self.live, dict(self.names))


@dataclass(slots=True)
class Written:
    """A prompt as it was written: ``chunks`` and, after them, ``fragments`` are its bytes, ``cuts`` where in them each
    block ends, and its role; ``blocks`` are those that are not among them yet. ``ends`` are the planned tokens up to a
    block's end and its index. From ``again`` on (pieces, blocks, ends), with the account ``then``, a grown prompt is
    written anew where its ``roles`` there are others: what its last run says may depend on what follows.
    """

    prompt: Sequence[Piece]
    front: int
    account: _Account
    blocks: list[Block] = field(default_factory=list)
    ends: list[tuple[int, int]] = field(default_factory=list)
    chunks: list[bytes] = field(default_factory=list)
    fragments: list[bytes] = field(default_factory=list)
    cuts: list[tuple[int, str]] = field(default_factory=list)
    again: tuple[int, int, int] = (0, 0, 0)
    then: _Account = field(default_factory=_Account)
    roles: list[Role] = field(default_factory=list)

    def mark(self, at: int) -> None:
        """From the piece ``at`` on it may be written anew."""
        self.again = at, len(self.cuts) + len(self.blocks), len(self.ends)
        self.then, self.roles = self.account.copy(), []

    def cut(self) -> None:
        """Take back what is to be written anew, which are its fragments."""
        _, blocks, ends = self.again
        self.fragments.clear()
        del self.cuts[blocks:], self.ends[ends:]
        self.account, self.roles = self.then.copy(), []

    def shape(self, dialect: Dialect) -> str:
        """Put the blocks among the bytes, those that stay into a few large chunks; the last one's role."""
        at, before = self.cuts[-1] if self.cuts else (0, "")
        for block in self.blocks:
            self.fragments.append(dialect.fragment(before, block))
            at, before = at + len(self.fragments[-1]), block.role
            self.cuts.append((at, before))
        self.blocks.clear()
        stay = self.again[1] - (len(self.cuts) - len(self.fragments))
        if stay > 0:
            data = b"".join(self.fragments[:stay])
            del self.fragments[:stay]
            while self.chunks and len(self.chunks[-1]) <= len(data):
                data = self.chunks.pop() + data
            self.chunks.append(data)
        return before


class Writer:
    """Writes prompts of as many tokens as planned, as far as ``costs`` tell; with ``ids`` as token ids."""

    def __init__(self, costs: Costs, *, salt: str = "", ids: bool = False) -> None:
        self._costs = costs
        self._text = PromptText(salt=salt, words=costs.words, ids=ids)
        self._least = self._text.fragment(0, 1)

    def write(
        self, prompt: Sequence[Piece], said: Mapping[str, Said] | None = None, known: Written | None = None
    ) -> Written:
        """A prompt as blocks. ``known`` is one that it may have grown from, and becomes it then."""
        at, last = known.again[0] if known else 0, 0
        if known and at and len(prompt) > at and prompt[: at + 1] == known.prompt[: at + 1]:
            written = known
            written.prompt = prompt
            end, told, looked = run(prompt, at, written.front, self._costs)
            if told == written.roles and not said:
                at, last = end, looked
            else:
                written.cut()
        else:
            written = self._open(prompt, said)
            at = written.front
        while at < len(prompt):
            if last <= at:
                written.mark(at)
            at, told, looked = run(prompt, at, written.front, self._costs)
            last = max(last, looked)
            written.roles += told
            self._say(written, told, said)
        return written

    def _open(self, prompt: Sequence[Piece], said: Mapping[str, Said] | None) -> Written:
        front, told = opening(prompt, self._costs)
        written = Written(prompt, front, _Account())
        if self._costs.tools and prompt and prompt[0].kind != "tools":
            written.blocks.append(Block("tool", self._least, label(0)))
        self._say(written, told, said)
        return written

    def _say(self, written: Written, told: Sequence[Role], said: Mapping[str, Said] | None) -> None:
        """Write what is said. What blocks take beyond words, or one word too many, the next one has less."""
        account, costs = written.account, self._costs
        for role, piece in told:
            account.planned += piece.tokens if piece else 0
            heard = said.get(piece.answer_of or "") if said and piece and role in ("answer", "use") else None
            if piece and heard:
                if piece.answer_of != account.live and account.before != "use":
                    written.blocks.append(Block("answer", heard.text))
                    account.spent += costs.overhead(account.before, "answer") - 1 + heard.tokens
                    account.before, account.live = "answer", piece.answer_of
                if role == "answer":
                    continue
                piece = None
            account.spent += costs.overhead(account.before, role)
            more = max(round((account.planned - account.spent) / costs.word), 0) if piece else 0
            account.spent += more * costs.word
            text = self._text.fragment(piece.ident, 1 + more) if piece else self._least
            name = ""
            if role in account.names:
                name = label(account.names[role])
                account.names[role] += 1
            written.ends.append((account.planned, len(written.cuts) + len(written.blocks)))
            written.blocks.append(Block(role, text, name))
            account.before = role


def buffers(dialect: Dialect, head: bytes, written: Written, marks: Sequence[Breakpoint] = ()) -> list[Buffer]:
    """A body in some pieces: the parameters in ``head``, a JSON object, then the prompt as a dialect shapes it."""
    before, at = written.shape(dialect), 0
    ttls = sorted(marked(written.ends, marks).items(), reverse=True)
    places = [(written.cuts[index][0], dialect.mark(ttl_s)) for index, ttl_s in ttls]
    out: list[Buffer] = [head[:-1]]
    for chunk in (*written.chunks, b"".join(written.fragments)):
        rest = memoryview(chunk)
        while places and places[-1][0] <= at + len(rest):
            place, mark = places.pop()
            out += [rest[: place - at], mark]
            rest, at = rest[place - at :], place
        out.append(rest)
        at += len(rest)
    return [*out, dialect.end(before)]


def body(dialect: Dialect, head: bytes, blocks: Sequence[Block]) -> bytes:
    """A body of blocks, some of them marked."""
    out, before = [head[:-1]], ""
    for block in blocks:
        out.append(dialect.fragment(before, block))
        if block.ttl_s is not None:
            out.append(dialect.mark(block.ttl_s))
        before = block.role
    return b"".join((*out, dialect.end(before)))


def marked(ends: Sequence[tuple[int, int]], marks: Sequence[Breakpoint]) -> dict[int, int]:
    """The TTL of each marked block: that in which a mark's last token lies, or else the last; the last four count."""
    ttls: dict[int, int] = {}
    for mark in sorted(marks) if ends else ():
        if mark.at > 0:
            _, index = ends[min(bisect_left(ends, mark.at, key=itemgetter(0)), len(ends) - 1)]
            ttls[index] = max(mark.ttl_s, ttls.get(index, 0))
    return dict(list(ttls.items())[-MARKS:])
