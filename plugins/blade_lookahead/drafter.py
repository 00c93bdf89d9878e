"""Lookahead decoding (Fu et al. 2024, "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding").

In the step that verifies a few n-grams the model also guesses, at several places ahead at once; guesses that followed
each other become the n-grams of later steps. Those of the prompt and of the output are n-grams as well.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from blade import ConfigError, Draft, EngineConfig, Sequence
from blade_lookahead.pool import Pool
from blade_lookahead.window import Tree, Window

MOST_IDS = 63  # of a tree
MOST_EVIDENCE = 15
TOKENS_PER_CALL = 4096  # taken in before a step, some 1 us each: a long prompt is taken in over several steps


class Lookahead:
    """What is kept of one sequence."""

    def __init__(self, pool: Pool, window: Window) -> None:
        self.pool, self.window = pool, window
        self.num_taken_in = 0  # tokens of the sequence
        self.drafted: list[int] = []  # ids of the last tree
        self.ends: list[int | None] = []  # in it, of the window's columns


class LookaheadDrafter:
    """contracts.TreeDrafter."""

    trees = True

    def __init__(self, config: EngineConfig, draft_model: object) -> None:
        self._num_columns, self._ngram_size = config.lookahead_window_size, config.lookahead_ngram_size
        self._num_guesses, self.tree_size = config.lookahead_guess_set_size, _tree_size(config)
        self._known: dict[int, Lookahead] = {}  # by id of the sequence

    @staticmethod
    def check_options(config: EngineConfig) -> None:
        """Raises ConfigError for sizes of which no step could verify all; see hookspecs.register_drafters."""
        size = _tree_size(config)
        if size > MOST_IDS:
            raise ConfigError(
                f"--drafter lookahead would have {size} tokens verified in a step, of at most {MOST_IDS}.",
                "Make --lookahead-window-size, --lookahead-ngram-size or --lookahead-guess-set-size smaller.",
            )

    def propose(self, seqs: Seq[Sequence], limits: Seq[int]) -> list[Draft]:
        budget = TOKENS_PER_CALL
        drafts = []
        for seq, limit in zip(seqs, limits, strict=True):
            known = self._known.get(seq.id)
            if known is None:
                window = Window(seq.prompt_ids, self._num_columns, self._ngram_size - 1)
                known = self._known[seq.id] = Lookahead(Pool(self._num_guesses), window)
            budget -= self._take_in(known, seq, budget)
            drafts.append(self._draft(known, seq, limit) if limit else Draft())
        return drafts

    def sampled(self, seq: Sequence, ids: Seq[int]) -> None:
        known = self._known.get(seq.id)
        num = len(ids) - 1
        if known is None or not num or known.drafted[:num] != seq.draft_ids:
            return  # it is another's tree
        (root,) = seq.tokens(seq.num_tokens - num - 1, seq.num_tokens - num)
        said = [None if end is None or end >= num else ids[end + 1] for end in known.ends]
        for ngram in known.window.advance(root, said, _num_new(seq, ids)):
            known.pool.add(ngram)
        known.drafted = []

    def forget(self, seq: Sequence) -> None:
        self._known.pop(seq.id, None)

    def _take_in(self, known: Lookahead, seq: Sequence, budget: int) -> int:
        """Add the n-grams that end in new tokens, at most `budget`; how many tokens those are."""
        size = self._ngram_size
        start, stop = known.num_taken_in, min(seq.num_tokens, known.num_taken_in + max(budget, 0))
        first = max(0, start - size + 1)
        ids = seq.tokens(first, stop)
        for end in range(max(start, size - 1) + 1, stop + 1):
            known.pool.add(ids[end - size - first : end - first])
        known.num_taken_in = max(start, stop)
        return known.num_taken_in - start

    def _draft(self, known: Lookahead, seq: Sequence, limit: int) -> Draft:
        if known.num_taken_in < seq.num_tokens:
            return Draft()  # its prompt is still being taken in
        tree = Tree(min(limit, self.tree_size))
        (root,) = seq.tokens(seq.num_tokens - 1, seq.num_tokens)
        guesses = known.pool.after(root)
        for guess in guesses:
            tree.add_path(-1, guess)
        known.ends = known.window.plant(tree)
        known.drafted = tree.ids
        return Draft(tree.ids, min(len(guesses), MOST_EVIDENCE), parents=tree.parents)


def _tree_size(config: EngineConfig) -> int:
    """Of the window, whose column 0 begins with a token that is sure, and of the n-grams."""
    num_columns, num_after_first = config.lookahead_window_size, config.lookahead_ngram_size - 1
    window = num_columns - 1 + num_columns * (num_after_first - 1)
    return window + config.lookahead_guess_set_size * num_after_first


def _num_new(seq: Sequence, ids: Seq[int]) -> int:
    """Tokens that the sequence will have more, once what was sampled on the right path is output."""
    num, node = 1, -1
    for place, (token_id, parent) in enumerate(zip(seq.draft_ids, seq.draft_parents or (), strict=False)):
        if parent == node and token_id == ids[node + 1]:
            num, node = num + 1, place
    return num
