"""Sequences over a paged cache of CudaAttention on the emulator, and the attention they should get."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from native_cpu.batches import attended, ragged, rotated
from torch import Tensor

from blade import Batch, KVSpec
from blade.engine.trees import ancestors, depths
from blade_native import kv_codes
from blade_native.attention import PagedAttention
from blade_native.cuda.attention import CudaAttention, LayerKV
from blade_native.cuda.attention_kernels import AttentionKernels, Shape
from blade_native.kv_cache import RoundedHeads
from blade_native.kv_codes import Kept, hadamard

BF16, F16, F32, INT8, FP8 = torch.bfloat16, torch.float16, torch.float32, "int8", "fp8_e4m3"
ATOL = {F32: 2e-6, BF16: 0.02, F16: 0.003}  # of results of order 1
NUM_SMS = 2


def cos_sin(length: int, rotary_dim: int) -> Tensor:
    angles = torch.outer(torch.arange(length).float(), 100.0 ** -torch.linspace(0, 1, rotary_dim // 2))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def attention(kernels: AttentionKernels, num_sms: int = NUM_SMS) -> CudaAttention:
    return CudaAttention(PagedAttention(torch.device("cpu")), kernels, num_sms)


def kv_spec(shape: Shape, num_layers: int, heads: tuple[int, int], block_size: int) -> KVSpec:
    dtype = str(shape.dtype).removeprefix("torch.")
    return KVSpec(num_layers, *heads, shape.head_dim, dtype, block_size, shape.storage)


@dataclass
class World:
    """The q, k and v of whole sequences, and a cache of which every slot holds NaN until it is stored to."""

    attention: CudaAttention
    shape: Shape
    heads: tuple[int, int]  # (H, KV)
    kv_lens: list[int]
    block_size: int = 16
    rotary_dim: int = 0
    trees: dict[int, list[int]] = field(default_factory=dict)  # of sequences whose owed tokens are one: Draft.parents
    batch: Batch = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(len(self.kv_lens) + sum(self.kv_lens))
        num_heads, num_kv_heads = self.heads
        dtype, head_dim = self.shape.dtype, self.shape.head_dim
        self.spec = kv_spec(self.shape, 1, self.heads, self.block_size)
        self.q = [torch.randn(n, num_heads, head_dim).to(dtype) for n in self.kv_lens]
        self.k = [torch.randn(n, num_kv_heads, head_dim).to(dtype) for n in self.kv_lens]
        self.v = [torch.randn(n, num_kv_heads, head_dim).to(dtype) for n in self.kv_lens]
        self.cos_sin = cos_sin(max(self.kv_lens) + 1, self.rotary_dim or head_dim)
        self.whole = ragged(self.kv_lens, self.kv_lens, self.block_size)
        (self.layer_kv,) = self.attention.allocate(self.spec, int(self.whole.block_tables.max()) + 1)
        spoil(self.layer_kv)

    def owed(self, query_lens: list[int]) -> Batch:
        """The batch in which each sequence owes its last tokens."""
        batch = ragged(query_lens, self.kv_lens, self.block_size)
        batch.block_tables = self.whole.block_tables
        slots = self.whole.slots.split(self.kv_lens)
        batch.slots = torch.cat([s[len(s) - n :] for s, n in zip(slots, query_lens, strict=True)])
        if not self.trees:
            return batch
        owed = enumerate(zip(self.kv_lens, query_lens, strict=True))
        positions = torch.cat([self.positions(i)[length - n :] for i, (length, n) in owed])
        seen = [ancestors(self.trees[i]) if i in self.trees else [0] * n for i, n in enumerate(query_lens)]
        return replace(batch, positions=positions, ancestors=torch.tensor([bits for part in seen for bits in part]))

    def positions(self, seq: int) -> Tensor:
        """Of all its tokens, [L]."""
        if seq not in self.trees:
            return torch.arange(self.kv_lens[seq])
        depth = torch.tensor(depths(self.trees[seq]))
        start = self.kv_lens[seq] - len(depth)
        return torch.cat((torch.arange(start), start + depth))

    def tree(self, seq: int) -> tuple[Tensor, Tensor] | None:
        """See `attended`."""
        if seq not in self.trees:
            return None
        bits = torch.tensor(ancestors(self.trees[seq]))
        return self.positions(seq), (bits[:, None] >> torch.arange(len(bits)) & 1).bool()

    def last(self, xs: list[Tensor], query_lens: list[int]) -> Tensor:
        return torch.cat([x[len(x) - n :] for x, n in zip(xs, query_lens, strict=True)])

    def store_past(self, query_lens: list[int]) -> None:
        """Put what earlier steps stored, all but the owed tokens, into the cache."""
        for k, v, slots, n in zip(self.k, self.v, self.whole.slots.split(self.kv_lens), query_lens, strict=True):
            past = len(k) - n
            if past == 0:
                continue
            keys = rotated(k[:past], self.cos_sin, torch.arange(past)).to(k.dtype)
            put(self.layer_kv, 0, related(self.layer_kv, keys, slots[0]), slots[:past])
            put(self.layer_kv, 1, v[:past], slots[:past])

    def step(
        self,
        query_lens: list[int],
        window: int | None = None,
        batch: Batch | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Store the owed tokens and attend with them."""
        batch = batch or self.owed(query_lens)
        q, k, v = (self.last(xs, query_lens) for xs in (self.q, self.k, self.v))
        q, k = self.attention.rope_and_store(q, k, v, self.cos_sin, batch, self.layer_kv)
        return self.attention.attend(q, k, v, batch, self.layer_kv, self.scale, window, chunk)

    @property
    def scale(self) -> float:
        return float(self.shape.head_dim**-0.5)

    def want(self, query_lens: list[int], window: int | None = None, chunk: int | None = None) -> Tensor:
        """In float64 over the keys and values as the cache holds them."""
        parts = []
        for seq, (q, k, v, n) in enumerate(zip(self.q, self.k, self.v, query_lens, strict=True)):
            at = self.positions(seq)
            q, k = (rotated(x, self.cos_sin, at).to(self.shape.dtype) for x in (q, k))
            k, v = keys_as_stored(k, self.shape), values_as_stored(v, self.shape)
            parts.append(attended(q[len(q) - n :], k, v, n, self.scale, window, chunk, self.tree(seq)))
        return torch.cat(parts)


def kept(shape: Shape, kind: int) -> Kept | None:
    """How keys (kind 0) or values (1) are rounded to codes with scales, where they are."""
    return shape.mode[kind] if shape.mode else kv_codes.INT8 if shape.storage == INT8 else None


def stored(x: Tensor, shape: Shape, kind: int) -> Tensor:
    """x [L, KV, D] as it comes back from the cache."""
    code = kept(shape, kind)
    return kv_codes.round_heads(x, code).widened() if code else x.to(shape.numbers).float()


def origin(k: Tensor, shape: Shape) -> Tensor:
    """What the keys of a sequence are relative to, of k [L, KV, D] after the transform."""
    if shape.origins is not torch.int8:
        return k[:1].to(shape.origins).float()
    return kv_codes.round_heads(k[:1], kv_codes.INT8).widened()


def keys_as_stored(k: Tensor, shape: Shape) -> Tensor:
    """Of a whole sequence, k [L, KV, D], but for what all keys have in common."""
    if not shape.related:
        return stored(k, shape, 0)
    k = hadamard(k)
    return hadamard(stored(k - origin(k, shape), shape, 0))


def values_as_stored(v: Tensor, shape: Shape) -> Tensor:
    return hadamard(stored(hadamard(v), shape, 1)) if shape.transforms_values else stored(v, shape, 1)


def related(layer_kv: LayerKV, k: Tensor, first_slot: Tensor) -> Tensor:
    """The keys of a sequence, from its first one on, as they are rounded; puts their origin into its place."""
    if layer_kv.origins is None:
        return k
    k, block, shape = hadamard(k), int(first_slot) // layer_kv.spec.block_size, layer_kv.shape
    if layer_kv.origin_scales is None:
        layer_kv.origins.view(torch.uint8)[block] = k[0].to(shape.origins).view(torch.uint8)
    else:
        layer_kv.origins[block], scales, _ = kv_codes.round_heads(k[0], kv_codes.INT8)
        layer_kv.origin_scales[block] = scales.squeeze(-1)
    return k - origin(k, shape)


def put(layer_kv: LayerKV, kind: int, x: Tensor, slots: Tensor) -> None:
    """The store of keys (kind 0) or values (1) x [L, KV, D], in torch."""
    block, offset, shape = slots // layer_kv.spec.block_size, slots % layer_kv.spec.block_size, layer_kv.shape
    code = kept(shape, kind)
    if code is None:
        layer_kv.kv.view(torch.uint8)[block, kind, :, offset] = x.to(shape.numbers).contiguous().view(torch.uint8)
        return
    rounded = RoundedHeads(code, x.shape[:2], shape.head_dim, x.device)
    rounded.store(torch.arange(len(x)), hadamard(x) if kind and shape.transforms_values else x)
    if layer_kv.scales is None:
        codes, numbers = pages(layer_kv, kind)
        codes[block, :, offset], numbers[block, :, :, offset] = rounded.codes, rounded.numbers
    else:
        layer_kv.kv.view(torch.uint8)[block, kind, :, offset] = rounded.codes
        layer_kv.scales[block, kind, :, offset] = rounded.numbers.squeeze(-1)


def pages(layer_kv: LayerKV, kind: int) -> tuple[Tensor, Tensor]:
    """Of a cache in pages, of keys (kind 0) or values (1): codes [num_blocks, KV, block_size, bytes] uint8, and
    numbers [num_blocks, KV, scales and middles, block_size]."""
    spec, mode = layer_kv.spec, layer_kv.shape.mode
    assert mode is not None
    bytes_of = [spec.head_dim * code.bits // 8 for code in mode]
    bytes_of += [code.num_numbers(spec.head_dim) * code.number.itemsize for code in mode]
    parts = layer_kv.kv.split([spec.block_size * num_bytes for num_bytes in bytes_of], dim=-1)
    codes = parts[kind].unflatten(-1, (spec.block_size, -1))
    return codes, parts[2 + kind].view(mode[kind].number).unflatten(-1, (-1, spec.block_size))


def spoil(layer_kv: LayerKV) -> None:
    """NaN in every slot; integers, which have none, get it from their scales."""
    layer_kv.kv.view(torch.uint8).fill_(0x7F if layer_kv.shape.storage == FP8 else 0xFF)
    if layer_kv.scales is not None:
        layer_kv.scales.fill_(torch.nan)
    if layer_kv.origin_scales is not None:
        layer_kv.origin_scales.fill_(torch.nan)
    if layer_kv.origins is not None:
        layer_kv.origins.view(torch.uint8).fill_(0x7F)


def check(world: World, query_lens: list[int], window: int | None = None, chunk: int | None = None) -> None:
    world.store_past(query_lens)
    out = world.step(query_lens, window, chunk=chunk)
    torch.testing.assert_close(
        out.double(), world.want(query_lens, window, chunk), rtol=0, atol=ATOL[world.shape.dtype]
    )
