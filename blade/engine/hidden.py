"""The way of hidden states from the model to the drafters that read them: after each step, of the tokens that stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blade.engine.trees import num_in_place
from blade.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as Seq

    from blade.contracts import Model
    from blade.engine.drafting import GuardedDrafter
    from blade.types import Sampled, Sequence, Step


class HiddenStates:
    """What a model shows of the step that it has just run, and who reads it."""

    def __init__(
        self, model: Model, readers: Iterable[GuardedDrafter], max_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`readers`: those with hidden_states. `max_tokens`: of a step. `dtype`: of the run."""
        self._readers = []
        for reader in readers:
            show = getattr(model, "show_hidden", None)
            if show is None:
                raise ConfigError(
                    f"--drafter {reader.name} reads hidden states, which {model.config.architecture} does not show.",
                    "Choose another drafter, such as suffix.",
                )
            width = len(reader.hidden_states) * model.hidden_size  # type: ignore[attr-defined]
            hidden = torch.zeros(max_tokens, width, dtype=dtype, device=device)
            show(reader.hidden_states, hidden)
            self._readers.append((reader, hidden))

    def hand_over(self, step: Step, results: Seq[list[Sampled] | Exception]) -> None:
        """The model has run the step with these results."""
        seqs, spans, rows, start = [], [], [], 0
        for seq, num_tokens, result in zip(step.seqs, step.num_tokens, results, strict=True):
            if not isinstance(result, Exception):
                seqs.append(seq)
                spans.append(range(seq.computed, seq.computed + num_staying(seq, num_tokens, result)))
                rows.append(start)
            start += num_tokens
        for reader, hidden in self._readers:
            reader.observe(seqs, spans, rows, hidden[:start])

    def pretend(self, reader: GuardedDrafter, seq: Sequence, span: range) -> None:
        """Let the reader believe that a step has computed these tokens; what it is shown is of no meaning."""
        for other, hidden in self._readers:
            if other is reader:
                for start in range(span.start, span.stop, len(hidden)):
                    reader.observe([seq], [range(start, min(span.stop, start + len(hidden)))], [0], hidden)


def num_staying(seq: Sequence, num_tokens: int, sampled: list[Sampled]) -> int:
    """How many of the step's num_tokens of the sequence are no draft, or accepted and where they belong."""
    num_accepted = num_in_place(seq, [token.token_id for token in sampled])
    return min(num_tokens, seq.num_owed - len(seq.draft_ids)) + num_accepted
