"""Where a prompt leaves the one before it, and how the two differ there."""

from collections.abc import Sequence

from keepwarm.traces.shipped import shipped
from keepwarm.traces.steps import Piece

CLEARED = 0.5
"""A tool's result of less than this share of its old length was cleared."""

TOLD = shipped("keepwarm.traces", "breaks.toml")


def common(old: Sequence[Piece], new: Sequence[Piece]) -> int:
    """How many pieces two prompts begin with alike."""
    for at, (one, other) in enumerate(zip(old, new, strict=False)):
        if one is not other and (one.hash != other.hash or one.kind != other.kind):
            return at
    return min(len(old), len(new))


def change(old: Sequence[Piece], new: Sequence[Piece], at: int) -> str:
    """How ``new`` differs from ``old`` at piece ``at``, where their common beginning ends; a key of breaks.toml."""
    if at >= len(new):
        return "cut"
    was, now = old[at], new[at]
    if now.kind == was.kind and now.shape == was.shape:
        return "numbers"
    if was.kind == "tools" and tool_hashes(old) == tool_hashes(new):
        return "reordered"
    if _same(now, old, at + 1):
        return "removed"
    if _same(was, new, at + 1):
        return "added"
    if not (_same_rest(old, new, at + 1)):
        return "rewritten"
    return "cleared" if was.kind == "tool_result" == now.kind and now.weight < was.weight * CLEARED else "changed"


def tool_hashes(pieces: Sequence[Piece]) -> set[int]:
    """The identities of the tools that a prompt offers."""
    return {piece.hash for piece in pieces if piece.kind == "tools"}


def _same(piece: Piece, others: Sequence[Piece], at: int) -> bool:
    return any(other.hash == piece.hash and other.kind == piece.kind for other in others[at : at + 8])


def _same_rest(old: Sequence[Piece], new: Sequence[Piece], at: int) -> bool:
    """Whether the piece after the one in question is the same in both, or there is none."""
    return at >= len(old) or (at < len(new) and old[at].hash == new[at].hash)


def words(kind: str, first: int, last: int, how: str) -> str:
    """A difference in words, at one position or in a range of them."""
    where = f"position {first}" if first == last else f"positions {first} to {last}"
    return f"{kind} at {where}: {TOLD[how]}"
