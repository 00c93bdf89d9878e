"""Drafters that read the hidden states of the model they draft for, and heads that go on from them. See
blade.contracts.

A hidden state is named by the number of layers that have added to it: 0 is the embedding, config.num_layers what the
last layer leaves, NORMED the same after the last norm, as the output matrix sees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from blade.contracts.models import Model
from blade.contracts.policies import Drafter

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    import torch
    from torch import Tensor

    from blade.contracts.models import Linear, Loader
    from blade.contracts.policies import Blocks
    from blade.types import Batch, KVCache, ModelConfig, Sequence, Step

NORMED = -1


class ReadableModel(Model, Protocol):
    """A model that shows its hidden states, and shares its embedding and output matrix with heads. blade.nn.Decoder is
    one."""

    hidden_size: int
    lm_head: Linear  # [vocab_size, hidden_size]

    def embed(self, ids: Tensor) -> Tensor:
        """ids [T] int64 -> [T, hidden_size]."""
        ...

    def show_hidden(self, states: Seq[int], out: Tensor) -> None:
        """From now on every forward of T tokens also leaves their hidden `states` in out[:T], side by side in this
        order: out [max_tokens, len(states) * hidden_size] in the run's dtype. It may be called several times, before
        the first forward. Raises ConfigError for a state that there is not."""
        ...


class HiddenReader(Drafter, Protocol):
    """A drafter that reads hidden states: what `--drafter` names may have these two members as well."""

    hidden_states: Seq[int]  # which ones

    def observe(self, seqs: Seq[Sequence], spans: Seq[range], rows: Seq[int], hidden: Tensor) -> None:
        """A step has computed tokens of `seqs`, and those at the positions spans[i] of seqs[i] are sure to stay; the
        hidden states of the first of them are hidden[rows[i]], those of the others follow. The last of them may be
        drafts, which are output only after this call. It is the runner that calls, in its own process and thread.

        hidden [T, len(hidden_states) * hidden_size] is overwritten by the next step. Positions may come again, with the
        same tokens (a preempted sequence), and a sequence may begin late (its prefix was cached: nobody computed it; or
        reading did not pay, until a draft was asked for)."""
        ...


class Head(Protocol):
    """A few layers that guess how the text goes on from hidden states of a model. At place i it is given the hidden
    state of token i and the id of token i + 1, and says what token i + 2 may be; what it leaves there stands in for the
    hidden state of token i + 1, which nobody has computed yet."""

    config: ModelConfig  # of its own layers, with the vocabulary of the model
    hidden_states: Seq[int]  # of the model, that it reads
    width: int  # of the states that it works on
    dtype: torch.dtype
    target_ids: Tensor | None  # [its own vocabulary] int64: the model's ids of its logits; None: they are the same

    def enter(self, hidden: Tensor) -> Tensor:
        """hidden [T, len(hidden_states) * hidden_size] as the model shows it -> states [T, width], in new memory."""
        ...

    def forward(self, batch: Batch, states: Tensor, kv: KVCache) -> tuple[Tensor, Tensor]:
        """batch.input_ids are those of the tokens after `states` [T, width]. Store the KV of all T places; of
        batch.logits_rows return the logits, [R, its own vocabulary] float32, and the states left there, [R, width]."""
        ...


class HeadArchitecture(Protocol):
    """How a head is read, in the place of contracts.Architecture: for a draft model whose `architectures` name it, or
    out of the model's own checkpoint. It may have a method `weights` as that one may."""

    drafter: str  # the name of the drafter that the head is for

    def configure(self, config: Any, target: ModelConfig) -> ModelConfig:
        """Read config.json's content; raise CheckpointError naming what cannot be served, or not with this target."""
        ...

    def build(self, config: Any, loader: Loader, target: ReadableModel) -> Head:
        """Load the weights through `loader`; `config` is what `configure` returned, with max_context as it was asked
        for."""
        ...


class HeadRunner(Protocol):
    """Runs a head and samples from it, with the very random numbers the target will use."""

    hidden_states: Seq[int]

    def run(self, step: Step, hidden: Seq[Tensor]) -> None:
        """Compute the step's places: its sequences' tokens are those *after* the `hidden` states, which are given in
        parts, [T, len(hidden_states) * hidden_size] all together."""
        ...

    def draft(self, step: Step, hidden: Seq[Tensor], texts: Seq[Sequence], limits: Seq[int]) -> list[list[int]]:
        """The same, and go on from the states that are left and what is drawn: limits[i] ids that may follow texts[i],
        whose tokens end where those of the step's i-th sequence do. All else is as DraftRunner.draft has it."""
        ...

    def forget(self, text: Sequence) -> None:
        """Drop what is kept for it."""
        ...


@dataclass(frozen=True)
class DraftHead:
    """A head, loaded, in the place of a DraftModel: with a KV cache of its own, of as many blocks as the model's."""

    runner: HeadRunner
    blocks: Blocks
    max_context: int  # tokens
