"""The kits for op sets and attention catch what is subtly wrong."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from blade import DualChunks
from blade.testing import check_attention, check_ops
from blade_native.attention import PagedAttention
from blade_native.reference import TorchOps

# ------------------------------------------------------------------------------------------ op sets


class NoBias(TorchOps):
    def linear(self, weight: Any, bias: Any) -> Any:
        return super().linear(weight, None)


class HalfLinear(TorchOps):
    def linear(self, weight: Any, bias: Any) -> Any:
        inner = super().linear(weight.bfloat16(), None if bias is None else bias.bfloat16())
        return lambda x, out_dtype=None: inner(x.bfloat16()).to(out_dtype or x.dtype)


class WrongEps(TorchOps):
    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        return super().rms_norm(x, weight, 0.0)


class NarrowNorm(TorchOps):
    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        x = x.half()
        return (x * (x * x).mean(-1, keepdim=True).add(eps).rsqrt()).to(weight.dtype) * weight


class InPlaceNorm(TorchOps):
    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        return x.copy_(super().rms_norm(x, weight, eps))


class OldResidual(TorchOps):
    def add_rms_norm(self, x: Any, residual: Any, weight: Any, eps: float) -> Any:
        return super().rms_norm(x + residual, weight, eps), residual


class SwappedGate(TorchOps):
    def silu_mul(self, gate_up: Any) -> Any:
        return super().silu_mul(torch.cat(gate_up.chunk(2, dim=-1)[::-1], dim=-1))


class WidenedEmbedding(TorchOps):
    def embedding(self, weight: Any) -> Any:
        return super().embedding(weight.double())


class ForgetfulConv(TorchOps):
    def short_conv(self, x: Any, weight: Any, batch: Any, state: Any) -> Any:
        return super().short_conv(x, weight, replace(batch, state_in=torch.full_like(batch.state_in, -1)), state)


class InPlaceConv(TorchOps):
    """Leaves the new state where the old one was."""

    def short_conv(self, x: Any, weight: Any, batch: Any, state: Any) -> Any:
        return super().short_conv(x, weight, replace(batch, state_out=batch.state_in), state)


class InPlaceDelta(TorchOps):
    def gated_delta(self, q: Any, k: Any, v: Any, a: Any, b: Any, decay: Any, dt: Any, batch: Any, state: Any) -> Any:
        batch = replace(batch, state_out=batch.state_in)
        return super().gated_delta(q, k, v, a, b, decay, dt, batch, state)


class InterleavedHeads(TorchOps):
    """Head h of v goes with head h % HK of k."""

    def gated_delta(self, q: Any, k: Any, v: Any, a: Any, b: Any, decay: Any, dt: Any, batch: Any, state: Any) -> Any:
        q, k = (x.repeat(1, v.shape[1] // x.shape[1], 1) for x in (q, k))
        return super().gated_delta(q, k, v, a, b, decay, dt, batch, state)


class UngatedNorm(TorchOps):
    def gated_rms_norm(self, x: Any, gate: Any, weight: Any, eps: float) -> Any:
        return super().gated_rms_norm(x, gate.sigmoid(), weight, eps)


class NarrowLogprobs(TorchOps):
    def logprobs(self, logits: Any, k: int) -> Any:
        return super().logprobs(logits.bfloat16().float(), k)


class UnshiftedLogprobs(TorchOps):
    def logprobs(self, logits: Any, k: int) -> Any:
        values, ids = logits.topk(k)
        log_sums = logits.exp().sum(-1).log()
        return log_sums, values - log_sums[:, None], ids


class KeepsRawKeys(TorchOps):
    """Forgets that a group's last token stands for all of it."""

    def keep_index_keys(self, k: Any, weight: Any, eps: Any, cos_sin: Any, batch: Any, kept: Any, group: int) -> None:
        kept.flatten(0, 1).index_copy_(0, batch.slots, k)


class TurnsByTheLast(TorchOps):
    """Rotates a group by its last position instead of its first."""

    def keep_index_keys(self, k: Any, weight: Any, eps: Any, cos_sin: Any, batch: Any, kept: Any, group: int) -> None:
        super().keep_index_keys(k, weight, eps, cos_sin.roll(1 - group, 0), batch, kept, group)


class UnturnedQueries(TorchOps):
    def select_keys(self, q: Any, cos_sin: Any, batch: Any, kept: Any, selection: Any) -> Any:
        return super().select_keys(q, cos_sin[:1].expand_as(cos_sin), batch, kept, selection)


class LastKeys(TorchOps):
    """Chooses those that fit worst."""

    def select_keys(self, q: Any, cos_sin: Any, batch: Any, kept: Any, selection: Any) -> Any:
        return super().select_keys(-q, cos_sin, batch, kept, selection)


def test_the_torch_ops_pass() -> None:
    check_ops(TorchOps(), [torch.float32, torch.bfloat16])


@pytest.mark.parametrize(
    "ops",
    [
        NoBias,
        HalfLinear,
        WrongEps,
        NarrowNorm,
        InPlaceNorm,
        OldResidual,
        SwappedGate,
        WidenedEmbedding,
        ForgetfulConv,
        InPlaceConv,
        InPlaceDelta,
        InterleavedHeads,
        UngatedNorm,
        NarrowLogprobs,
        UnshiftedLogprobs,
        KeepsRawKeys,
        TurnsByTheLast,
        UnturnedQueries,
        LastKeys,
    ],
)
def test_a_broken_op_is_caught(ops: type[TorchOps]) -> None:
    with pytest.raises(AssertionError):
        check_ops(ops())


# ------------------------------------------------------------------------------------------ attention


class NoScale(PagedAttention):
    def attend(self, q: Any, k: Any, v: Any, batch: Any, layer_kv: Any, scale: float, window: int | None) -> Any:
        return super().attend(q, k, v, batch, layer_kv, 1.0, window)


class NoWindow(PagedAttention):
    def attend(self, q: Any, k: Any, v: Any, batch: Any, layer_kv: Any, scale: float, window: int | None) -> Any:
        return super().attend(q, k, v, batch, layer_kv, scale, None)


class WindowOffByOne(PagedAttention):
    def attend(self, q: Any, k: Any, v: Any, batch: Any, layer_kv: Any, scale: float, window: int | None) -> Any:
        return super().attend(q, k, v, batch, layer_kv, scale, window and window + 1)


class NoChunks(PagedAttention):
    def attend(
        self, q: Any, k: Any, v: Any, batch: Any, layer_kv: Any, scale: float, window: int | None, chunk: Any = None
    ) -> Any:
        return super().attend(q, k, v, batch, layer_kv, scale, window)


class NoDualChunks(PagedAttention):
    """Positions go on."""

    def attend_dual_chunks(
        self, q: Any, k: Any, v: Any, cos_sin: Any, batch: Any, layer_kv: Any, scale: float, chunks: Any
    ) -> Any:
        q, k = self.rope_and_store(q, k, v, cos_sin, batch, layer_kv)
        return self.attend(q, k, v, batch, layer_kv, scale, None)


class NothingClamped(PagedAttention):
    def attend_dual_chunks(
        self, q: Any, k: Any, v: Any, cos_sin: Any, batch: Any, layer_kv: Any, scale: float, chunks: Any
    ) -> Any:
        chunks = DualChunks(chunks.length, 2 * chunks.length - 1)
        return super().attend_dual_chunks(q, k, v, cos_sin, batch, layer_kv, scale, chunks)


class SlotsOfAnother(PagedAttention):
    """Takes what lies in a slot behind the last for seen."""

    def attend_slots(self, q: Any, batch: Any, layer_kv: Any, scale: float, slots: Any) -> Any:
        return super().attend_slots(q, batch, layer_kv, scale, slots.clamp(min=0))


class MissesTheLastSlot(PagedAttention):
    def attend_slots(self, q: Any, batch: Any, layer_kv: Any, scale: float, slots: Any) -> Any:
        return super().attend_slots(q, batch, layer_kv, scale, slots[:, :-3])


class OwnTokensOnly(PagedAttention):
    def attend(self, q: Any, k: Any, v: Any, batch: Any, layer_kv: Any, scale: float, window: int | None) -> Any:
        groups = q.shape[1] // k.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(groups, 1)) * scale
        weights = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(groups, 1)).flatten(1)


class Contiguous(PagedAttention):
    """Believes that a sequence's blocks follow each other."""

    def attend(self, q: Any, k: Any, v: Any, batch: Any, layer_kv: Any, scale: float, window: int | None) -> Any:
        tables = batch.block_tables
        batch.block_tables = (tables[:, :1] + torch.arange(tables.shape[1])) % layer_kv.num_blocks
        return super().attend(q, k, v, batch, layer_kv, scale, window)


class OneLayer(PagedAttention):
    def allocate(self, spec: Any, num_blocks: int) -> Any:
        return super().allocate(spec, num_blocks)[:1] * spec.num_layers


class WrongPairs(PagedAttention):
    """Rotates neighbouring channels, as in RoFormer, instead of halves."""

    def rope_and_store(self, q: Any, k: Any, v: Any, cos_sin: Any, batch: Any, layer_kv: Any) -> Any:
        order = torch.arange(q.shape[-1]).view(2, -1).T.flatten()
        q, k = super().rope_and_store(q[..., order], k[..., order], v, cos_sin, batch, layer_kv)
        return q[..., order.argsort()], k[..., order.argsort()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_attention_passes(dtype: torch.dtype) -> None:
    check_attention(lambda ops: PagedAttention(ops.device), TorchOps(), [dtype])


@pytest.mark.parametrize(
    "attention",
    [
        NoScale,
        NoWindow,
        WindowOffByOne,
        NoChunks,
        NoDualChunks,
        NothingClamped,
        SlotsOfAnother,
        MissesTheLastSlot,
        OwnTokensOnly,
        Contiguous,
        OneLayer,
        WrongPairs,
    ],
)
def test_broken_attention_is_caught(attention: type[PagedAttention]) -> None:
    with pytest.raises(AssertionError):
        check_attention(lambda ops: attention(ops.device), TorchOps())
