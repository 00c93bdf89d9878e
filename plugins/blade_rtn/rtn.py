"""Which tensors are rounded, and to what: contracts.Quantization of ``--quantize int8`` and ``--quantize int4``."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

from blade.nn import GroupedQuantization, Matrix
from blade_rtn.int4 import quantize_int4
from blade_rtn.symmetric import quantize_symmetric

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade import GroupedWeight
    from blade.contracts import Linear, Ops, Weights

log = logging.getLogger("blade.rtn")

INT4_GROUP = 32
GROUPS = (64, 32)  # of symmetric integers: the first that divides a row
TABLE_BITS = 6  # beside matrices of 4
TABLES = {"lm_head", "embed_tokens", "wte"}  # whose errors reach every logit
# Small, and they decide.
GATES = {
    "gate", "router", "shared_expert_gate", "in_proj_a", "in_proj_b", "in_proj_ba", "block_inject_weight",
    "index_qk_proj",
}  # fmt: skip


class Int8(GroupedQuantization):
    """8 bits for every matrix whose rows divide into groups of 64 or 32 numbers."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def matrix(self, prefix: str, weights: Weights) -> Matrix | None:
        shape = weights.shape(f"{prefix}.weight")
        if len(shape) != 2 or prefix.rpartition(".")[2] in GATES:
            return None
        if shape[1] % GROUPS[-1]:
            self._tell(prefix, shape[1])
            return None
        return Matrix(shape, self._bytes(prefix, *shape))

    def num_params(self, name: str, weights: Weights) -> None:
        """Tensors are plain: nothing has to be known of them, and nothing is told of those that no model reads."""

    def weight(self, prefix: str, weights: Weights) -> GroupedWeight:
        return self.rounded(prefix, weights, None)

    def stack(self, prefixes: Seq[str], weights: Weights, ops: Ops, bias: Tensor | None) -> Linear:
        return ops.quantized_linear([self.rounded(prefix, weights, ops) for prefix in prefixes], bias)

    def rounded(self, prefix: str, weights: Weights, ops: Ops | None) -> GroupedWeight:
        """By the op set's kernel, where it has one, or else on its device."""
        return self._symmetric(prefix, weights, ops, 8)

    def _symmetric(self, prefix: str, weights: Weights, ops: Ops | None, bits: int) -> GroupedWeight:
        weight = self._numbers(prefix, weights, ops)
        group = group_of(weight.shape[1])
        return (ops and ops.round_weight(weight, bits, group)) or quantize_symmetric(weight, bits, group)

    def _numbers(self, prefix: str, weights: Weights, ops: Ops | None) -> Tensor:
        weight = weights.get(f"{prefix}.weight")
        return weight if ops is None else weight.to(ops.device)

    def _bytes(self, prefix: str, n: int, k: int) -> int:
        return symmetric_bytes(n, k, 8)

    def _tell(self, prefix: str, k: int) -> None:
        """Once for the same matrix of all layers."""
        pattern = re.sub(r"\.\d+\.", ".*.", prefix)
        if pattern not in self._told:
            self._told.add(pattern)
            log.warning("%s stays plain: its rows of %d numbers do not divide into groups of 32", pattern, k)


class Int4(Int8):
    """4 bits; 6 for the output head and the embedding."""

    def rounded(self, prefix: str, weights: Weights, ops: Ops | None) -> GroupedWeight:
        if is_table(prefix):
            return self._symmetric(prefix, weights, ops, TABLE_BITS)
        weight = self._numbers(prefix, weights, ops)
        return (ops and ops.round_weight(weight, 4, INT4_GROUP)) or quantize_int4(weight, INT4_GROUP)

    def _bytes(self, prefix: str, n: int, k: int) -> int:
        if is_table(prefix):
            return symmetric_bytes(n, k, TABLE_BITS)
        return n * k // 2 + 2 * n * k // INT4_GROUP + 4 * n


def group_of(k: int) -> int:
    return next(group for group in GROUPS if k % group == 0)


def symmetric_bytes(n: int, k: int, bits: int) -> int:
    return n * k * bits // 8 + 2 * n * k // group_of(k)


def is_table(prefix: str) -> bool:
    """ "model.embed_tokens"."""
    return prefix.rpartition(".")[2] in TABLES
