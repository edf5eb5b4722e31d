"""vLLM's block pool told as plainly as its sources allow, as an oracle: one list, tail-first frees, copies of a hash.

Rules as in vLLM 0.32.0, ``v1/core``: block_pool.py, kv_cache_manager.py, single_type_kv_cache_manager.py.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

Key = tuple[int, tuple[Hashable, ...]]
"""A full block's identity: the number of the chain before it, and its tokens."""


@dataclass(eq=False, slots=True)
class Block:
    """A place for ``block`` tokens: how many calls hold it, and what it was filled with once it is full."""

    refs: int = 0
    key: int | None = None


@dataclass(eq=False, slots=True)
class Held:
    """A call that runs: its tokens so far, its blocks in the prompt's order, and the tokens it was spared."""

    tokens: list[Hashable]
    keys: list[int]
    blocks: list[Block] = field(default_factory=list)
    cached: int = 0


class Pool:
    """The blocks of one worker. ``blocks`` is what vLLM calls num_gpu_blocks; the first of them is never used."""

    def __init__(self, block: int, blocks: int) -> None:
        self.block = block
        self.free = [Block() for _ in range(blocks - 1)]
        self.cached: dict[int, list[Block]] = {}
        self.evicted = 0
        self._chains: dict[Key, int] = {}

    def serve(self, prompt: Sequence[Hashable], answer: Sequence[Hashable]) -> int:
        """A call from beginning to end; how many tokens it was spared."""
        held = self.begin(prompt)
        assert held is not None and self.grow(held, answer), "the call does not fit"
        self.end(held)
        return held.cached

    def begin(self, prompt: Sequence[Hashable]) -> Held | None:
        """Admit a call and take blocks for its whole prompt, findable at once; None if there is no room for it."""
        held = Held(list(prompt), self._keys([], prompt))
        for key in held.keys[: (len(prompt) - 1) // self.block]:  # the last token is always computed
            if key not in self.cached:
                break
            held.blocks.append(self.cached[key][0])
        missing = -(-len(prompt) // self.block) - len(held.blocks)
        if missing + sum(not block.refs for block in held.blocks) > len(self.free):
            return None
        for block in held.blocks:
            block.refs += 1
        self.free = [block for block in self.free if not block.refs]
        held.cached = len(held.blocks) * self.block
        self._fill(held, len(prompt))
        return held

    def grow(self, held: Held, answer: Sequence[Hashable]) -> bool:
        """Generate these tokens. The last one is not computed, so it takes no place. False if the room is not there."""
        held.tokens.extend(answer)
        held.keys = self._keys(held.keys, held.tokens[: len(held.tokens) - 1])
        if -(-(len(held.tokens) - 1) // self.block) - len(held.blocks) > len(self.free):
            return False
        self._fill(held, len(held.tokens) - 1)
        return True

    def end(self, held: Held) -> None:
        """Let go of a call's blocks, tail first: full ones become the last to be taken, others the first."""
        gone = []
        for block in reversed(held.blocks):
            block.refs -= 1
            if not block.refs:
                gone.append(block)
        self.free[:0] = [block for block in gone if block.key is None]
        self.free += [block for block in gone if block.key is not None]

    def _fill(self, held: Held, tokens: int) -> None:
        """Give a call blocks for so many tokens, and full ones their keys. A key may have several blocks."""
        while len(held.blocks) * self.block < tokens:
            held.blocks.append(self._take())
        for block, key in zip(held.blocks, held.keys, strict=False):
            if block.key is None:
                block.key = key
                self.cached.setdefault(key, []).append(block)

    def _take(self) -> Block:
        """The first free block, emptied."""
        block = self.free.pop(0)
        if block.key is not None:
            self.evicted += 1
            copies = self.cached[block.key]
            copies.remove(block)
            if not copies:
                del self.cached[block.key]
            block.key = None
        block.refs = 1
        return block

    def _keys(self, known: list[int], tokens: Sequence[Hashable]) -> list[int]:
        """The chained identities of all full blocks of these tokens, of which the first are known."""
        keys = list(known)
        for at in range(len(known) * self.block, len(tokens) - self.block + 1, self.block):
            link = (keys[-1] if keys else -1, tuple(tokens[at : at + self.block]))
            keys.append(self._chains.setdefault(link, len(self._chains)))
        return keys
