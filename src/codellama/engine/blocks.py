"""Blocks of the key-value cache: who uses which, and which tokens a full one holds.

Plain Python over integers; the tensors that the numbers stand for are in `cache`. A block holds the
keys and values of a fixed number of consecutive positions. Once full it is known by a digest of all
tokens up to its end, so that a sequence that begins alike uses it too instead of computing it. A
block that nobody uses any more stays known until its room is needed, the longest unused first.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from hashlib import blake2b

BLOCK_TOKENS = 16  # what is lost where two texts part; smaller ones make tables and digests longer


class BlockPool:
    """Blocks 0 .. n_blocks - 1, each free, used by one or more sequences, or idle but known."""

    def __init__(self, n_blocks: int, block_tokens: int = BLOCK_TOKENS) -> None:
        self.n_blocks, self.block_tokens = n_blocks, block_tokens
        self._n_users = [0] * n_blocks
        # The lowest number first: neighbours in a sequence are then mostly neighbours in memory.
        self._free = list(range(n_blocks))
        self._idle: dict[int, None] = {}  # known and without users; the longest unused first
        self._known: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}

    @property
    def n_available(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free) + len(self._idle)

    @property
    def n_used(self) -> int:
        """Blocks that a sequence holds."""
        return self.n_blocks - self.n_available

    def allocate(self) -> int:
        """Hand out a block with one user; what an idle one held is forgotten.

        Raises:
            IndexError: none is available.
        """
        if self._free:
            block = heapq.heappop(self._free)
        elif self._idle:
            block = next(iter(self._idle))
            del self._idle[block], self._known[self._digests.pop(block)]
        else:
            raise IndexError("no block is available")
        self._n_users[block] = 1
        return block

    def share(self, digests: Sequence[bytes]) -> list[int]:
        """The known blocks of the longest beginning of these digests, each with one user more."""
        blocks: list[int] = []
        for digest in digests:
            block = self._known.get(digest)
            if block is None:
                break
            self._idle.pop(block, None)
            self._n_users[block] += 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, digest: bytes) -> None:
        """Make a full block known; where another holds the same tokens, that one stays known."""
        if digest not in self._known:
            self._known[digest] = block
            self._digests[block] = digest

    def release(self, blocks: Sequence[int]) -> None:
        """Take one user from each block of a sequence, in the sequence's order."""
        for block in reversed(blocks):  # its end is the first to be forgotten
            self._n_users[block] -= 1
            if self._n_users[block] == 0:
                if block in self._digests:
                    self._idle[block] = None
                else:
                    heapq.heappush(self._free, block)

    def forget(self) -> None:
        """Make every idle block free."""
        for block in self._idle:
            del self._known[self._digests.pop(block)]
            heapq.heappush(self._free, block)
        self._idle.clear()


def extend_digests(digests: list[bytes], tokens: Sequence[int], block_tokens: int) -> None:
    """Append the digests of all full blocks of `tokens` that `digests` does not have yet.

    A digest covers everything before it. It is a cryptographic one: a prompt made to collide would
    otherwise be answered from somebody else's text.
    """
    for begin in range(len(digests) * block_tokens, len(tokens) - block_tokens + 1, block_tokens):
        content = array("q", tokens[begin : begin + block_tokens]).tobytes()
        before = digests[-1] if digests else b""
        digests.append(blake2b(before + content, digest_size=16).digest())
