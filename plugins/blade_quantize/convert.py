"""A model's linears rounded in one forward pass, into files of a checkpoint.

Every linear sees what the rounded ones before it make of the texts, and is rounded with that. Of the weights one stack
is in memory at a time, of the activations one layer's.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from blade import ConfigError
from blade_quantize.layout import planned
from blade_quantize.passes import PassLoader, build, run
from blade_quantize.rounder import Rounder, RoundingLinear, stays_plain
from blade_quantize.shards import Planned, ShardWriter
from blade_quantize.stack import StreamedLinear

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq
    from pathlib import Path

    from torch import Tensor

    from blade.contracts import Linear, OpenedModel, Weights
    from blade_quantize.scheme import Scheme
    from blade_quantize.stack import Stack

EMBEDDINGS = ("embed_tokens", "ngram_embedding")


@dataclass(slots=True)
class Conversion:
    """What became of the matrices."""

    quantized: list[str] = field(default_factory=list)  # modules
    plain: dict[str, str] = field(default_factory=dict)  # module -> why it stayed as it was
    uncalibrated: list[str] = field(default_factory=list)  # rounded without activations, for none came by
    num_bytes: int = 0  # of all tensors
    ignore: list[str] = field(default_factory=list)  # all linears that config.json has to except


class Converter:
    """Rounds one model by one scheme."""

    def __init__(self, opened: OpenedModel, scheme: Scheme, longest: int) -> None:
        """Builds the model, for samples of at most `longest` tokens; nothing is rounded yet. Raises CheckpointError and
        ConfigError as the architecture does, and for a scheme that does not fit it."""
        self.opened, self.scheme = opened, scheme
        self.result = Conversion()
        self._rounder = Rounder(scheme, opened, scale_dtype(opened))
        self._linears: list[RoundingLinear] = []
        self._num_plain = 0
        self._told: Callable[[], None] = lambda: None
        self._model = build(opened, PassLoader(opened, opened.weights, self._linear), longest)
        self._check_ignore()
        if not self.result.quantized:
            raise ConfigError(f"Nothing in {opened.name} can be rounded so: {describe_plain(self.result)}.")
        self._tensors = all_tensors(opened)
        self._plan = self._planned()

    @property
    def activations(self) -> Callable[[Tensor], Tensor] | None:
        """What becomes of the activations of rounded modules."""
        return self._rounder.activations

    @property
    def num_rounded(self) -> int:
        """Stacks of linears."""
        return len(self._linears)

    @property
    def num_stacks(self) -> int:
        """Those that stay plain too."""
        return len(self._linears) + self._num_plain

    @property
    def num_bytes(self) -> int:
        """That the result's tensors will take."""
        return sum(tensor.num_bytes for tensor in self._plan.values())

    def write(self, folder: Path, samples: Seq[Seq[int]], told: Callable[[], None]) -> Conversion:
        """Write the weights into `folder`; `told` is called as each stack is done. Without samples every number is
        rounded for itself."""
        self._told = told
        writer = ShardWriter(folder, self._plan)
        self._rounder.put = writer.put
        with torch.no_grad():
            if samples:
                run(self._model, samples, self.opened.ops)
            for linear in self._linears:
                linear.finish()
            self._copy(writer, self._rounder.finish(writer))
        writer.close()
        self.result.uncalibrated = self._rounder.uncalibrated
        self.result.num_bytes = writer.num_bytes
        self.result.ignore = self._ignored()
        return self.result

    def _linear(self, stack: Stack) -> Linear:
        reason = stays_plain(stack, self.scheme)
        if reason is not None:
            self.result.plain |= dict.fromkeys(stack.prefixes, reason)
            self._num_plain += 1
            return StreamedLinear(stack)
        self.result.quantized += stack.prefixes
        self._linears.append(RoundingLinear(stack, self._rounder, lambda: self._told()))
        return self._linears[-1]

    def _check_ignore(self) -> None:
        """A pattern that matches nothing would be ignored in silence."""
        linears = [*self.result.quantized, *self.result.plain]
        for pattern in self.scheme.ignore:
            if not fnmatch.filter(linears, pattern):
                raise ConfigError(
                    f"--ignore {pattern} matches no linear of {self.opened.name}.", f"There is {linears[0]}."
                )

    def _planned(self) -> dict[str, Planned]:
        """All tensors, in the checkpoint's order."""
        plan = {}
        quantized = {f"{prefix}.weight": prefix for prefix in self.result.quantized}
        for name, weights in self._tensors.items():
            if name not in quantized:
                plan[name] = Planned(weights.get(name).dtype, tuple(weights.shape(name)))
                continue
            n, k = weights.shape(name)
            for end, tensor in planned(self.scheme, n, k, scale_dtype(self.opened)).items():
                plan[f"{quantized[name]}.{end}"] = tensor
        return plan

    def _copy(self, writer: ShardWriter, factors: dict[str, Tensor]) -> None:
        """The tensors that stay, times the factors of their module."""
        for name, weights in self._tensors.items():
            module, _, end = name.rpartition(".")
            if end == "weight" and module in self.result.quantized:
                continue
            tensor, factor = weights.get(name), factors.get(module)
            if factor is not None:
                rows = factor.cpu().view(-1, *[1] * (tensor.dim() - 1))
                tensor = (tensor.float() * rows).to(tensor.dtype)
            writer.put(name, tensor)
            weights.release([name])

    def _ignored(self) -> list[str]:
        """Every matrix that stays, the output head's even where it is the embedding's."""
        there = {name.removesuffix(".weight"): len(tensor.shape) for name, tensor in self._plan.items()}
        plain = [name for name, dims in there.items() if f"{name}.weight" in self._plan and dims == 2]
        rounded = set(self.result.quantized)
        kept = [name for name in plain if name not in rounded and not name.endswith(EMBEDDINGS)]
        return list(dict.fromkeys([*kept, "lm_head"]))


def all_tensors(opened: OpenedModel) -> dict[str, Weights]:
    """Where each tensor of the new checkpoint comes from: the model's, and what else the files hold, as the other half
    of a model for images. A tensor that the model sees in parts, as experts in one, is written in parts, and one that
    it sees put together of what lies below its module, as a table of n-grams, as a whole."""
    tensors = dict.fromkeys(opened.weights.names(), opened.weights)
    made = set(tensors).difference(opened.stored.names())
    split = {match[1] for name in made if (match := re.fullmatch(r"(.+)\.\d+\.\w+\.weight", name))}
    for name in opened.stored.names():
        module = name.rpartition(".")[0]
        if module not in split and f"{module.rpartition('.')[0]}.weight" not in made:
            tensors.setdefault(name, opened.stored)
    return tensors


def scale_dtype(opened: OpenedModel) -> torch.dtype:
    """Scales are kept in the dtype of the checkpoint's own numbers."""
    name = next(name for name in opened.weights.names() if name.endswith(".weight"))
    return opened.weights.get(name).dtype


def describe_plain(result: Conversion) -> str:
    """Which modules stayed plain and why; layers alike are named once."""
    patterns = {(re.sub(r"\.\d+(?=\.)", ".*", name), reason) for name, reason in result.plain.items()}
    return "; ".join(f"{name} stays plain, {reason}" for name, reason in sorted(patterns))
