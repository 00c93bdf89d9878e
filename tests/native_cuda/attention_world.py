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
from blade_native.cuda.attention_kernels import STORAGE, AttentionKernels, Shape
from blade_native.kv_codes import hadamard

NAMES = {dtype: name for name, dtype in STORAGE.items()}
BF16, F16, F32, INT8, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn
ATOL = {F32: 2e-6, BF16: 0.02, F16: 0.003}  # of results of order 1
NUM_SMS = 2


def cos_sin(length: int, rotary_dim: int) -> Tensor:
    angles = torch.outer(torch.arange(length).float(), 100.0 ** -torch.linspace(0, 1, rotary_dim // 2))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def attention(kernels: AttentionKernels, num_sms: int = NUM_SMS) -> CudaAttention:
    return CudaAttention(PagedAttention(torch.device("cpu")), kernels, num_sms)


def kv_spec(shape: Shape, num_layers: int, heads: tuple[int, int], block_size: int) -> KVSpec:
    dtype = str(shape.dtype).removeprefix("torch.")
    return KVSpec(num_layers, *heads, shape.head_dim, dtype, block_size, NAMES.get(shape.storage))


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
            k, v = keys_as_stored(k, self.shape.storage), stored(v, self.shape.storage)
            parts.append(attended(q[len(q) - n :], k, v, n, self.scale, window, chunk, self.tree(seq)))
        return torch.cat(parts)


def encoded(x: Tensor, storage: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """x [L, KV, D] in the cache's dtype, and int8's scales [L, KV]."""
    if storage is not INT8:
        return x.to(storage), None
    codes, scales, _ = kv_codes.round_heads(x, kv_codes.INT8)
    return codes, scales.squeeze(-1)


def stored(x: Tensor, storage: torch.dtype) -> Tensor:
    """x [L, KV, D] as it comes back from the cache."""
    codes, scale = encoded(x, storage)
    return codes.float() if scale is None else codes.float() * scale[..., None]


def keys_as_stored(k: Tensor, storage: torch.dtype) -> Tensor:
    """Of a whole sequence, k [L, KV, D], but for what all keys have in common."""
    if storage.itemsize > 1:
        return stored(k, storage)
    k = hadamard(k)
    return hadamard(stored(k - stored(k[:1], storage), storage))


def related(layer_kv: LayerKV, k: Tensor, first_slot: Tensor) -> Tensor:
    """The keys of a sequence, from its first one on, as they are rounded; puts their origin into its place."""
    if layer_kv.origins is None:
        return k
    k, block, storage = hadamard(k), int(first_slot) // layer_kv.spec.block_size, layer_kv.shape.storage
    codes, scale = encoded(k[0], storage)
    layer_kv.origins.view(torch.uint8)[block] = codes.contiguous().view(torch.uint8)
    if scale is not None and layer_kv.origin_scales is not None:
        layer_kv.origin_scales[block] = scale
    return k - stored(k[:1], storage)


def put(layer_kv: LayerKV, kind: int, x: Tensor, slots: Tensor) -> None:
    """The store of keys (kind 0) or values (1) x [L, KV, D], in torch."""
    block, offset = slots // layer_kv.spec.block_size, slots % layer_kv.spec.block_size
    codes, scale = encoded(x, layer_kv.shape.storage)
    layer_kv.kv.view(torch.uint8)[block, kind, :, offset] = codes.contiguous().view(torch.uint8)
    if scale is not None and layer_kv.scales is not None:
        layer_kv.scales[block, kind, :, offset] = scale


def spoil(layer_kv: LayerKV) -> None:
    """NaN in every slot; int8, which has none, gets it from its scales."""
    layer_kv.kv.view(torch.uint8).fill_(0x7F if layer_kv.shape.storage.itemsize == 1 else 0xFF)
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
