"""Who runs next, what is drafted, what logits become. See blade.contracts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts.devices import DraftRunner
    from blade.types import Draft, Sequence, Step


class Blocks(Protocol):
    """What a scheduler may ask of the paged KV pool."""

    block_size: int

    def attach_prefix(self, seq: Sequence) -> bool:
        """Give a sequence that holds no blocks those of its longest cached prefix (seq.computed grows). False: the
        next block of its prefix is being computed by another sequence right now; try again next step."""
        ...

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Make room for tokens[:computed + num_tokens], all or nothing. False: not enough free blocks."""
        ...

    def commit(self, seq: Sequence) -> None:
        """Make the full blocks of tokens[:computed] findable as a prefix. Nothing that is not sure to stay may count as
        computed; of the target's sequences the engine sees to that, schedulers need not."""
        ...

    def release(self, seq: Sequence) -> None:
        """Take all blocks from the sequence (computed becomes 0); full ones stay cached while there is room."""
        ...

    @property
    def num_free(self) -> int:
        """Blocks that grow could hand out: empty ones and cached ones nobody holds."""
        ...


class Scheduler(Protocol):
    """Who runs next. It owns the order and the admission of sequences, never their tokens."""

    waiting: Seq[Sequence]
    running: Seq[Sequence]
    max_prompt_tokens: int  # the engine sets it before each step: more of prompts would take longer than is wanted

    def add(self, seq: Sequence) -> None: ...

    def schedule(self) -> Step:
        """The next step, within the token budget; every seq in it has its blocks. Empty: nothing can run."""
        ...

    def remove(self, seq: Sequence) -> None:
        """Forget a finished or aborted sequence, wherever it is; its blocks are released by the engine."""
        ...


class Drafter(Protocol):
    """Proposes tokens that the model then verifies in one step (speculative decoding, Leviathan et al. 2023). Whatever
    it proposes, the output stays the same; only the speed depends on it."""

    def propose(self, seqs: Seq[Sequence], limits: Seq[int]) -> list[Draft]:
        """For each sequence up to limits[i] ids likely to follow it; Draft([]) proposes nothing. A sequence's prompt
        never changes, its output only grows; it must be left as it is."""
        ...

    def forget(self, seq: Sequence) -> None:
        """The sequence has ended: drop what is kept for it, if anything is."""
        ...


class TreeDrafter(Drafter, Protocol):
    """A drafter whose drafts are trees (Draft.parents). It says so in an attribute `trees`, True, as does the factory
    that is registered: where attention knows no trees, or the model has recurrent layers, it is refused at start.

    A tree is verified whole or not at all, but for what a full batch cuts off its end. Accepted tokens are computed
    again unless they come first, in order: so the likeliest path should."""

    trees: bool
    tree_size: int  # ids of its largest tree, at most 63: what bounds `propose` in place of --num-draft-tokens

    def sampled(self, seq: Sequence, ids: Seq[int]) -> None:
        """The model has computed seq.draft_ids, a tree by seq.draft_parents, which may have been cut, or be another
        drafter's where there are several. ids[0] is what was sampled after the sequence, ids[i + 1] what was sampled
        after the path to draft_ids[i]. It is output only after this call; the sequence must be left as it is."""
        ...


@dataclass(frozen=True)
class DraftModel:
    """The model of ``--draft.model``, loaded: it runs steps of sequences of its own, over a KV cache of its own. A
    sequence with the id and params of one of the target's is sampled with the very random numbers the target will use.
    """

    runner: DraftRunner
    blocks: Blocks
    max_context: int  # tokens


class LogitsProcessor(Protocol):
    """Made for one request by a registered factory; sees one row at a time, before temperature."""

    def __call__(self, output_ids: Seq[int], logits: Tensor) -> None:
        """Change logits [vocab_size] float32 in place. What it does must follow from output_ids alone, and what it
        keeps may only be a cache of them: a position may come again, and with other tokens before it."""
        ...
