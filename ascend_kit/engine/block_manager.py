"""Who owns which KV block. Ints and lists only: the cache itself lives in the runner.

Block 0 is never handed out: padding rows of captured graphs write there. A full block whose tokens are known stays
findable after its owner is gone, until its room is needed (least recently used first).
"""

from __future__ import annotations

import itertools
from collections import OrderedDict

from ascend_kit.engine.sequence import Sequence

ROOT = 0  # prefix key before the first block


class BlockManager:
    """Hands blocks of `block_size` token slots to sequences.

    With `on_demand` blocks are taken as a sequence grows and full ones are shared by their content. Without it, each
    sequence reserves room for `max_seq_length` tokens when it starts, and nothing is shared.
    """

    def __init__(self, num_blocks: int, block_size: int, *, on_demand: bool = True, max_seq_length: int = 0):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.on_demand, self.max_seq_length = on_demand, max_seq_length
        self.free = list(range(num_blocks - 1, 0, -1))
        self.references = [0] * num_blocks
        # A prefix key stands for one exact run of tokens from the start; its content: key of the run before, tokens.
        self.known: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # content -> its key, and the block with it
        self.content_of: dict[int, tuple[int, tuple[int, ...]]] = {}  # block -> content
        self.idle: OrderedDict[int, None] = OrderedDict()  # reusable blocks nobody owns, oldest first
        self._keys = itertools.count(ROOT + 1)

    @property
    def total(self) -> int:
        """Blocks that can be handed out."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        return len(self.free) + len(self.idle)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def fits_ever(self, num_tokens: int) -> bool:
        """Whether a sequence of this length could run with the whole pool to itself."""
        return self.blocks_for(num_tokens if self.on_demand else self.max_seq_length) <= self.total

    def match_prefix(self, sequence: Sequence) -> int:
        """Give a sequence the computed blocks of its longest known prefix, beyond those that it has; their tokens.

        Sequences that compute the same long prefix at the same time share the work in this way: each goes on where the
        other ended. Only at the start of a block: what was begun is finished.
        """
        if not self.on_demand or sequence.num_computed != len(sequence.blocks) * self.block_size:
            return 0
        key = sequence.prefix_keys[-1] if sequence.prefix_keys else ROOT
        for number in range(len(sequence.blocks), sequence.reusable_limit // self.block_size):
            found = self.known.get((key, self._tokens(sequence, number)))
            if found is None:
                break
            key, block = found
            self.idle.pop(block, None)
            self.references[block] += 1
            sequence.blocks.append(block)
            sequence.prefix_keys.append(key)
        num_tokens = len(sequence.blocks) * self.block_size - sequence.num_computed
        sequence.num_computed += num_tokens
        return num_tokens

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make room for the first `num_tokens` tokens; False, with nothing changed, when blocks are missing."""
        wanted = num_tokens if self.on_demand else self.max_seq_length
        missing = self.blocks_for(wanted) - len(sequence.blocks)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            sequence.blocks.append(self._take())
        return True

    def register(self, sequence: Sequence, num_tokens: int) -> None:
        """Make the full blocks among the first `num_tokens` tokens findable for later sequences.

        Called when a step is planned: every layer stores the step's keys before any sequence attends, so that even
        a sequence of the same step may read them.
        """
        if not self.on_demand:
            return
        for number in range(len(sequence.prefix_keys), num_tokens // self.block_size):
            parent = sequence.prefix_keys[-1] if sequence.prefix_keys else ROOT
            content = (parent, self._tokens(sequence, number))
            if content not in self.known:
                block = sequence.blocks[number]
                self.known[content], self.content_of[block] = (next(self._keys), block), content
            sequence.prefix_keys.append(self.known[content][0])

    def release(self, sequence: Sequence) -> None:
        """Take all blocks of a sequence back."""
        # Last block first: the end of a prefix is less often shared than its start, so it should go first.
        for block in reversed(sequence.blocks):
            self.references[block] -= 1
            if self.references[block] == 0:
                if block in self.content_of:
                    self.idle[block] = None
                else:
                    self.free.append(block)
        sequence.blocks, sequence.prefix_keys, sequence.num_computed = [], [], 0

    def check(self, sequences: list[Sequence]) -> None:
        """Raise RuntimeError when the books do not balance: free + owned must be the whole pool."""
        owners = [0] * self.num_blocks
        for sequence in sequences:
            for block in sequence.blocks:
                owners[block] += 1
        owned = sum(count > 0 for count in owners)
        if owners != self.references or owned + self.num_free != self.total:
            raise RuntimeError(
                f"KV block books do not balance: {len(self.free)} free + {len(self.idle)} idle + "
                f"{owned} owned, {self.total} in all"
            )

    def _take(self) -> int:
        if self.free:
            block = self.free.pop()
        else:
            block, _ = self.idle.popitem(last=False)
            del self.known[self.content_of.pop(block)]
        self.references[block] = 1
        return block

    def _tokens(self, sequence: Sequence, number: int) -> tuple[int, ...]:
        start = number * self.block_size
        return tuple(sequence.token_ids[start : start + self.block_size])
