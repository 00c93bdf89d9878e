"""The kit for attention backends: ragged batches over a scattered cache, against attention written out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from blade.contracts import Attention, DualChunkAttention, Ops, SlotAttention
from blade.engine.trees import ancestors, depths
from blade.errors import ConfigError
from blade.testing.require import require
from blade.testing.tolerance import require_close, tolerance
from blade.types import Batch, DualChunks, KVSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_HEADS = [(4, 4, 16), (9, 3, 64), (8, 1, 32), (4, 2, 128)]  # (num_heads, num_kv_heads, head_dim)
_REACHES = ((None, None), (1, None), (20, None), (None, 24))  # window, chunk
_DUAL_CHUNKS = (DualChunks(40, 55), DualChunks(13, 25))
_MAX_CONTEXT = 640
_TREE_SPANS = [(33, 45), (32, 33), (118, 150), (0, 40)]  # the first and the third are trees
_TREES = {0: [-1, 0, -1, 2, 0, 1, 5, 4, -1, 8, 6], 2: [i // 3 - 1 for i in range(31)]}
_STORAGE_TOLERANCE = {"int8": 0.02}  # of its largest value; others may be coarser
_MOST_STORAGES = 3  # for one shape: of many each is tried with some
_STALE = float("nan")  # what unused slots hold: the KV another sequence left there may be anything


@dataclass
class _Case:
    """Raw q, k, v of whole sequences, and which blocks they live in. Sequences 0 and 1 share their first blocks."""

    spec: KVSpec
    spans: list[tuple[int, int]]  # per sequence: the step computes tokens [start, stop)
    shared: int  # tokens
    tables: list[list[int]]
    num_blocks: int
    q: list[Tensor]  # [L, H, D] each
    k: list[Tensor]  # [L, KV, D]
    v: list[Tensor]
    cos_sin: Tensor  # [max_context, rotary_dim] float32
    trees: dict[int, list[int]] = field(default_factory=dict)  # Draft.parents of the step's tokens after the first

    def positions(self, seq: int) -> Tensor:
        """Of all its tokens, [L] int64."""
        import torch

        start, stop = self.spans[seq]
        end = [start + depth for depth in depths(self.trees[seq])] if seq in self.trees else range(start, stop)
        return torch.tensor([*range(start), *end])

    def rotated(self, raw: Seq[Tensor]) -> list[Tensor]:
        return [rotate(x, self.cos_sin[self.positions(i)]) for i, x in enumerate(raw)]

    def hidden(self, seq: int) -> Tensor:
        """Which of its L tokens each of the step's cannot see, whatever the positions, [Q, L] bool."""
        import torch

        start, stop = self.spans[seq]
        keys = torch.arange(stop)
        if seq not in self.trees:
            return keys > torch.arange(start, stop)[:, None]
        bits = torch.tensor(ancestors(self.trees[seq]))[:, None]
        return (keys >= start) & ~(bits >> (keys - start).clamp(min=0) & 1).bool()


def check_attention(factory: Callable[[Ops], Attention], ops: Ops, dtypes: Iterable[torch.dtype] | None = None) -> None:
    """Prefill, chunks, decodes and mixes of them; head ratios, windows, chunks of positions where the attention is
    `chunked`, dual chunks and chosen keys where it has them, drafts that are trees where it knows `trees`; partial
    rotary; shared and permuted blocks; in the dtype and in every storage that the attention names, which has to make a
    cache smaller."""
    import torch

    attention = factory(ops)
    steps = [
        [(0, 37), (0, 1), (0, 16)],  # prompts
        [(32, 33), (40, 41), (16, 17), (0, 1)],  # decodes
        [(32, 60), (33, 34), (15, 18), (0, 40), (100, 101)],  # all at once
        [(600, 601), (520, 550)],  # far behind
    ]
    for dtype in sorted(dtypes or {torch.float32, ops.default_dtype()}, key=str):
        for seed, (num_heads, num_kv_heads, head_dim) in enumerate(_HEADS):
            block_size = (16, 8)[seed % 2]
            name = str(dtype).removeprefix("torch.")
            plain = KVSpec(2, num_heads, num_kv_heads, head_dim, name, block_size)
            for spec in _storages(attention, plain, seed):
                for spans in steps if spec is plain else steps[2:]:
                    case = _make_case(spec, spans, head_dim // (1 + seed % 2), dtype, seed)
                    _check_case(attention, case, ops)
                    _check_dual_chunks(attention, case, ops, _DUAL_CHUNKS[seed % 2])
                    _check_slots(attention, case, ops)
                if getattr(attention, "trees", False):
                    case = _make_case(spec, _TREE_SPANS, head_dim // (1 + seed % 2), dtype, seed)
                    _check_case(attention, replace(case, trees=_TREES), ops)
                    _check_dual_chunks(attention, replace(case, trees=_TREES), ops, _DUAL_CHUNKS[seed % 2])


def _storages(attention: Attention, plain: KVSpec, turn: int) -> list[KVSpec]:
    """The spec in its dtype, and in the storages that the attention has for this shape; it may refuse one."""
    specs = [plain]
    names = list(getattr(attention, "kv_storages", ()))
    start = turn * _MOST_STORAGES % (len(names) or 1)
    for storage in (names[start:] + names[:start])[:_MOST_STORAGES]:
        spec = replace(plain, storage=storage)
        try:
            num_bytes = attention.block_bytes(spec)
        except ConfigError:
            continue
        smaller = 0 < num_bytes < attention.block_bytes(plain)
        require(smaller, f"block_bytes() in {storage} must be fewer than in {plain.dtype}")
        specs.append(spec)
    return specs


def _make_case(spec: KVSpec, spans: list[tuple[int, int]], rotary_dim: int, dtype: torch.dtype, seed: int) -> _Case:
    import torch

    generator = torch.Generator().manual_seed(seed)

    def draw(length: int, num_heads: int) -> Tensor:
        return torch.randn(length, num_heads, spec.head_dim, generator=generator).to(dtype)

    q, k, v = ([draw(stop, n) for _, stop in spans] for n in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads))
    shared = min(spans[0][0], spans[1][0]) // spec.block_size * spec.block_size
    k[1][:shared], v[1][:shared] = k[0][:shared], v[0][:shared]
    sizes = [-(-stop // spec.block_size) for _, stop in spans]
    num_blocks = sum(sizes) + 3  # some belong to nobody
    order = torch.randperm(num_blocks, generator=generator).tolist()
    tables = [[order.pop() for _ in range(size)] for size in sizes]
    num_shared = shared // spec.block_size
    tables[1][:num_shared] = tables[0][:num_shared]
    angles = torch.arange(_MAX_CONTEXT)[:, None] * 100.0 ** -torch.linspace(0, 1, rotary_dim // 2)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    return _Case(spec, spans, shared, tables, num_blocks, q, k, v, cos_sin)


def _check_case(attention: Attention, case: _Case, ops: Ops) -> None:
    import torch

    spec = case.spec
    require(attention.block_bytes(spec) > 0, "block_bytes() must be a positive number of bytes")
    kv = attention.allocate(spec, case.num_blocks)
    require(len(kv) == spec.num_layers, f"allocate() made {len(kv)} entries for {spec.num_layers} layers")
    _spoil(attention, case, kv, ops)
    past = [(case.shared if i == 1 else 0, start) for i, (start, _) in enumerate(case.spans)]
    if any(stop > start for start, stop in past):
        _store(attention, case, past, _batch(case, past, ops), kv[1], ops)
    _spoil(attention, case, kv[:1], ops)  # another layer's slots are not this one's
    batch = _batch(case, case.spans, ops)
    q, k, v = _store(attention, case, case.spans, batch, kv[1], ops)
    expected_q = torch.cat([x[a:b] for x, (a, b) in zip(case.rotated(case.q), case.spans, strict=True)])
    expected_k = torch.cat([x[a:b] for x, (a, b) in zip(case.rotated(case.k), case.spans, strict=True)])
    dtype = case.q[0].dtype
    if spec.storage is None:  # else attention may have q and k as it wants them
        require_close("rotated q", q, expected_q, dtype)
        require_close("rotated k", k, expected_k, dtype)
    for window, chunk in _REACHES:
        if chunk is not None and not getattr(attention, "chunked", False):
            continue
        scale, chunks = spec.head_dim**-0.5, () if chunk is None else (chunk,)
        out = attention.attend(q.clone(), k, v, batch, kv[1], scale, window, *chunks)
        what = f"attention with {f'window {window}' if chunk is None else f'chunks of {chunk}'}"
        what += f" in {spec.storage}" if spec.storage else ""
        what += " of trees" if case.trees else ""
        require_close(what, out, _attend(case, scale, window, chunk), dtype, _limit(spec, dtype))


def _limit(spec: KVSpec, dtype: torch.dtype) -> float:
    """How many times the tolerance of the dtype attention may differ."""
    most = _STORAGE_TOLERANCE.get(spec.storage, 0.3) if spec.storage else 0
    return max(4 * tolerance(dtype), most) / tolerance(dtype)


def _check_dual_chunks(attention: Attention, case: _Case, ops: Ops, chunks: DualChunks) -> None:
    if not hasattr(attention, "attend_dual_chunks"):
        return
    dual, dtype = cast("DualChunkAttention", attention), case.q[0].dtype
    kv = attention.allocate(case.spec, case.num_blocks)
    _spoil(attention, case, kv, ops)
    scale, cos_sin = case.spec.head_dim**-0.5, ops.to_device(case.cos_sin)
    past = [(case.shared if i == 1 else 0, start) for i, (start, _) in enumerate(case.spans)]
    for spans in (past, case.spans):
        if any(stop > start for start, stop in spans):
            raw = _raw(case, spans, ops)
            out = dual.attend_dual_chunks(*raw, cos_sin, _batch(case, spans, ops), kv[1], scale, chunks)
    what = f"attention in dual {chunks}" + f" in {case.spec.storage}" * bool(case.spec.storage)
    require_close(what, out, _attend_dual_chunks(case, scale, chunks), dtype, _limit(case.spec, dtype))


def _check_slots(attention: Attention, case: _Case, ops: Ops) -> None:
    import torch

    if not hasattr(attention, "attend_slots"):
        return
    case = replace(case, spec=replace(case.spec, selected=True))
    chooser, dtype, scale = cast("SlotAttention", attention), case.q[0].dtype, case.spec.head_dim**-0.5
    kv = attention.allocate(case.spec, case.num_blocks)
    _spoil(attention, case, kv, ops)
    past = [(case.shared if i == 1 else 0, start) for i, (start, _) in enumerate(case.spans)]
    if any(stop > start for start, stop in past):
        _store(attention, case, past, _batch(case, past, ops), kv[1], ops)
    batch = _batch(case, case.spans, ops)
    q, _, _ = _store(attention, case, case.spans, batch, kv[1], ops)
    generator, unseen, lists = torch.Generator().manual_seed(len(q)), [], []
    for seq, table in enumerate(case.tables):
        seen = ~case.hidden(seq)
        seen &= torch.rand(seen.shape, generator=generator) < 0.4
        seen[:, 0] |= ~seen.any(dim=1)
        unseen.append(~seen)
        size = case.spec.block_size
        lists += [[table[i // size] * size + i % size for i in row.nonzero().flatten().tolist()] for row in seen]
    width = max(map(len, lists)) + 2
    slots = torch.tensor([own + [-1] * (width - len(own)) for own in lists], dtype=torch.int32)
    out = chooser.attend_slots(q, batch, kv[1], scale, ops.to_device(slots))
    what = "attention to chosen keys" + f" in {case.spec.storage}" * bool(case.spec.storage)
    require_close(what, out, _attend(case, scale, None, None, unseen), dtype, _limit(case.spec, dtype))


def _spoil(attention: Attention, case: _Case, kv: Any, ops: Ops) -> None:
    """Fill every slot of these layers with what must never be seen again."""
    import torch

    spec = case.spec
    whole = [[block] for block in range(case.num_blocks)]
    spans = [(0, spec.block_size)] * case.num_blocks
    batch = make_batch(whole, spans, spec.block_size, ops)
    num_tokens = case.num_blocks * spec.block_size

    def stale(num_heads: int) -> Tensor:
        return ops.to_device(torch.full((num_tokens, num_heads, spec.head_dim), _STALE, dtype=case.q[0].dtype))

    for layer_kv in kv:
        k, v = stale(spec.num_kv_heads), stale(spec.num_kv_heads)
        attention.rope_and_store(stale(spec.num_heads), k, v, ops.to_device(case.cos_sin), batch, layer_kv)


def _store(
    attention: Attention, case: _Case, spans: list[tuple[int, int]], batch: Batch, layer_kv: Any, ops: Ops
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate and store tokens [start, stop) of each sequence; returns q, k (rotated) and v of these tokens."""
    q, k, v = _raw(case, spans, ops)
    q, k = attention.rope_and_store(q, k, v, ops.to_device(case.cos_sin), batch, layer_kv)
    return q, k, v


def _raw(case: _Case, spans: list[tuple[int, int]], ops: Ops) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of tokens [start, stop) of each sequence, not rotated."""
    import torch

    q, k, v = (
        ops.to_device(torch.cat([x[start:stop] for x, (start, stop) in zip(raw, spans, strict=True)]))
        for raw in (case.q, case.k, case.v)
    )
    return q, k, v


def _batch(case: _Case, spans: list[tuple[int, int]], ops: Ops) -> Batch:
    import torch

    busy = [i for i, (start, stop) in enumerate(spans) if stop > start]
    batch = make_batch([case.tables[i] for i in busy], [spans[i] for i in busy], case.spec.block_size, ops)
    if not case.trees or spans is not case.spans:
        return batch
    positions = torch.cat([case.positions(i)[start:] for i, (start, _) in enumerate(spans)])
    bits = [ancestors(case.trees[i]) if i in case.trees else [0] * (b - a) for i, (a, b) in enumerate(spans)]
    seen = torch.tensor([bit for part in bits for bit in part])
    return replace(batch, positions=ops.to_device(positions), ancestors=ops.to_device(seen))


def make_batch(tables: list[list[int]], spans: list[tuple[int, int]], block_size: int, ops: Ops) -> Batch:
    """The batch in which sequence b, living in the blocks tables[b], computes its tokens [start, stop) = spans[b]."""
    import torch

    def on_device(values: list[int] | list[list[int]], dtype: torch.dtype) -> Tensor:
        return ops.to_device(torch.tensor(values, dtype=dtype))

    places = [(b, i) for b, (start, stop) in enumerate(spans) for i in range(start, stop)]
    query_lens, kv_lens = [stop - start for start, stop in spans], [stop for _, stop in spans]
    ends = [sum(query_lens[: b + 1]) for b in range(len(spans))]
    width = max(map(len, tables))
    return Batch(
        input_ids=on_device([0] * len(places), torch.int64),
        positions=on_device([i for _, i in places], torch.int64),
        slots=on_device([tables[b][i // block_size] * block_size + i % block_size for b, i in places], torch.int64),
        cu_seqlens=on_device([0, *ends], torch.int32),
        context_lens=on_device(kv_lens, torch.int32),
        block_tables=on_device([table + [0] * (width - len(table)) for table in tables], torch.int32),
        logits_rows=on_device([end - 1 for end in ends], torch.int64),
        query_lens=query_lens,
        kv_lens=kv_lens,
    )


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [L, H, D] by cos_sin [L, rotary_dim], in float32; halves of the first rotary_dim channels pair up."""
    import torch

    cos, sin = cos_sin[:, None].chunk(2, dim=-1)  # [L, 1, rotary_dim / 2]
    rotary_dim = cos_sin.shape[1]
    first, second = x[..., :rotary_dim].float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., rotary_dim:].float()], dim=-1)


def _attend(
    case: _Case, scale: float, window: int | None, chunk: int | None, unseen: Seq[Tensor] | None = None
) -> Tensor:
    """Softmax attention of the step's tokens, one sequence after the other, in float32: [T, H * D]. `unseen`: further
    keys that they do not see, [Q, K] bool each."""
    import torch

    outs = []
    rotated = [[x.to(case.q[0].dtype).float() for x in case.rotated(raw)] for raw in (case.q, case.k)]
    for seq, (q, k, raw_v, (start, _)) in enumerate(zip(*rotated, case.v, case.spans, strict=True)):
        groups = case.spec.num_heads // case.spec.num_kv_heads
        q, k = q[start:], k.repeat_interleave(groups, dim=1)
        v = raw_v.float().repeat_interleave(groups, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        keys = case.positions(seq)
        queries = keys[start:, None]
        hidden = case.hidden(seq) | (queries - keys >= (window or len(keys)))  # [Q, K]
        if unseen is not None:
            hidden |= unseen[seq]
        if chunk is not None:
            hidden |= keys // chunk != queries // chunk
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
    return torch.cat(outs)


def _attend_dual_chunks(case: _Case, scale: float, chunks: DualChunks) -> Tensor:
    """As _attend, every pair of a query and a key turned as DualChunks has it."""
    import torch

    outs, groups, dtype = [], case.spec.num_heads // case.spec.num_kv_heads, case.q[0].dtype
    for seq, (raw_q, raw_k, raw_v, (start, _)) in enumerate(zip(case.q, case.k, case.v, case.spans, strict=True)):
        keys = case.positions(seq)
        queries = keys[start:]
        k = rotate(raw_k, case.cos_sin[keys % chunks.length]).to(dtype).float().repeat_interleave(groups, dim=1)
        behind = queries[:, None] // chunks.length - keys // chunks.length
        scores = torch.full((case.spec.num_heads, len(queries), len(keys)), -torch.inf)
        for distance in range(int(behind.max()) + 1):
            turned = (queries % chunks.length + distance * chunks.length).clamp(max=chunks.farthest)
            q = rotate(raw_q[start:], case.cos_sin[turned]).to(dtype).float()
            scores = torch.where(behind == distance, torch.einsum("qhd,khd->hqk", q, k) * scale, scores)
        weights = scores.masked_fill(case.hidden(seq), -torch.inf).softmax(dim=-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, raw_v.float().repeat_interleave(groups, 1)).flatten(1))
    return torch.cat(outs)
