"""The modes of a KV cache in pages: codes are those of the torch twin, attention over them is dense attention's."""

from __future__ import annotations

import itertools

import pytest
import torch
from native_cpu.batches import ragged

from blade_native.attention import PagedAttention
from blade_native.cuda import attention as attention_module
from blade_native.cuda.attention_kernels import TREES, AttentionKernels, Shape
from blade_native.cuda.launch import Launcher
from blade_native.kv_cache import RoundedKV
from blade_native.kv_codes import hadamard

from .attention_world import ATOL, BF16, F16, F32, World, attention, check, kv_spec, pages, spoil

CORES = [
    Shape(BF16, "int4_affine", 128),
    Shape(F16, "int4", 80),
    Shape(BF16, "int8_affine", 64),
    Shape(F16, "fp8_e5m2", 96),
    Shape(F16, "mix_i8i4", 64),
    Shape(BF16, "mix_f843i4", 256),
]
SIMT = [Shape(F32, "int4_affine", 96), Shape(F32, "mix_f852i4", 80), Shape(F32, "int8_affine", 64)]
OF_TREES = CORES[2:3]


@pytest.fixture(scope="module")
def kernels(launcher: Launcher) -> AttentionKernels:
    kernels = AttentionKernels(launcher)
    kernels.add(CORES + SIMT)
    kernels.add(OF_TREES, TREES)
    return kernels


@pytest.mark.parametrize("shape", CORES, ids=str)
def test_ragged_batch(kernels: AttentionKernels, shape: Shape) -> None:
    """Decodes, a whole prompt, a chunk and a verification together, lengths around block, tile and chunk edges."""
    kv_lens = [1, 16, 17, 33, 256, 257, 150, 20]
    check(World(attention(kernels), shape, (6, 2), kv_lens), [1, 1, 1, 33, 1, 5, 40, 0])


@pytest.mark.parametrize("shape", SIMT, ids=str)
def test_ragged_batch_without_tensor_cores(kernels: AttentionKernels, shape: Shape) -> None:
    check(World(attention(kernels), shape, (7, 1), [1, 17, 257, 20]), [1, 6, 1, 0])


@pytest.mark.parametrize(("shape", "block_size"), [*itertools.product(CORES[:2], [32, 64]), (SIMT[0], 64)], ids=str)
def test_larger_blocks_and_a_window(kernels: AttentionKernels, shape: Shape, block_size: int) -> None:
    check(World(attention(kernels), shape, (4, 2), [1, 50, 140], block_size), [1, 1, 40], window=30)


@pytest.mark.parametrize("shape", OF_TREES, ids=str)
def test_trees(kernels: AttentionKernels, shape: Shape) -> None:
    trees = {1: [-1, 0, -1, 2, 3], 2: [*range(-1, 15), -1, *range(16, 46)]}
    check(World(attention(kernels), shape, (6, 2), [30, 270, 70], trees=trees), [1, 6, 48])


@pytest.mark.parametrize("shape", CORES + SIMT, ids=str)
def test_pages_are_those_of_the_torch_twin(kernels: AttentionKernels, shape: Shape) -> None:
    """Of two sequences, with heads that are zero, tiny, and not finite. A sum's last bit may tell a code from its
    neighbour."""
    w = World(attention(kernels), shape, (2, 2), [40, 9], rotary_dim=32)
    for xs in (w.k, w.v):
        xs[0][3], xs[0][5] = 0, xs[0][5] * 1e-30
        xs[0][7, 0, 4], xs[1][2, 1, 0] = torch.inf, torch.nan
    spoil(w.layer_kv)
    q, k, v = (torch.cat(xs) for xs in (w.q, w.k, w.v))
    twin = PagedAttention(torch.device("cpu"))
    (twin_kv,) = twin.allocate(w.spec, int(w.whole.block_tables.max()) + 1)
    assert isinstance(twin_kv, RoundedKV)
    twin_q, _ = twin.rope_and_store(q, k, v, w.cos_sin, w.whole, twin_kv)
    found_q, _ = w.attention.rope_and_store(q, k, v, w.cos_sin, w.whole, w.layer_kv)
    torch.testing.assert_close(found_q, hadamard(twin_q).to(shape.dtype), rtol=0.01, atol=ATOL[shape.dtype])
    blocks, offsets = w.whole.slots // 16, w.whole.slots % 16
    for kind, heads in enumerate((twin_kv.keys, twin_kv.values)):
        codes, numbers = pages(w.layer_kv, kind)
        codes, numbers = codes[blocks, :, offsets], numbers[blocks, :, :, offsets]
        torch.testing.assert_close(
            numbers,
            heads.numbers[blocks, offsets],
            rtol=1e-5 if numbers.dtype is F32 else 0.008,
            atol=1e-6,
            equal_nan=True,
        )
        assert (codes == heads.codes[blocks, offsets]).float().mean() > 0.99
        assert numbers.isnan().any()
    first = w.whole.block_tables[:, 0].long()
    torch.testing.assert_close(w.layer_kv.origin_scales[first], twin_kv.origins.numbers[first].squeeze(-1))


@pytest.mark.parametrize("shape", CORES + SIMT, ids=str)
def test_results_are_those_of_the_torch_twin(kernels: AttentionKernels, shape: Shape) -> None:
    """But for a code here and there, whose number lies where a sum's last bit decides."""
    query_lens, kv_lens = [1, 20, 3], [40, 20, 35]
    w = World(attention(kernels), shape, (4, 2), kv_lens, rotary_dim=32)
    found = []
    for served in (PagedAttention(torch.device("cpu")), w.attention):
        (layer_kv,) = served.allocate(w.spec, int(w.whole.block_tables.max()) + 1)
        served.rope_and_store(*(torch.cat(xs) for xs in (w.q, w.k, w.v)), w.cos_sin, w.owed(kv_lens), layer_kv)
        q, k, v = (w.last(xs, query_lens) for xs in (w.q, w.k, w.v))
        batch = w.owed(query_lens)
        q, k = served.rope_and_store(q, k, v, w.cos_sin, batch, layer_kv)
        found.append(served.attend(q, k, v, batch, layer_kv, w.scale, 30))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=max(ATOL[shape.dtype], 1e-3))


@pytest.mark.parametrize("shape", [CORES[0], CORES[2], SIMT[0]], ids=str)
def test_a_row_does_not_depend_on_its_batch(kernels: AttentionKernels, shape: Shape) -> None:
    kv_lens, owed = [300, 40], [1, 40]
    w = World(attention(kernels), shape, (4, 1), kv_lens)
    w.store_past(owed)
    together = w.step(owed)
    alone = ragged([1], [300], 16)
    alone.block_tables, alone.slots = w.whole.block_tables[:1], w.whole.slots[299:300]
    w.q, w.k, w.v = w.q[:1], w.k[:1], w.v[:1]
    assert torch.equal(w.step([1], batch=alone), together[:1])


def test_a_captured_decode_is_replayed(kernels: AttentionKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """With padding, a sequence of no tokens, whose slot is -1."""
    kept, partials = [], attention_module._partials  # as a graph's memory pool keeps them
    monkeypatch.setattr(attention_module, "_partials", lambda *args: kept.append(partials(*args)) or kept[-1])
    w = World(attention(kernels), CORES[0], (4, 1), [300, 30, 1])
    w.store_past([1, 1, 1])
    w.kv_lens, batch = w.kv_lens[:2], w.owed([1, 1, 1])
    w.q, w.k, w.v = (xs[:2] for xs in (w.q, w.k, w.v))
    q, k, v = (torch.cat([x[-1:] for x in xs] + [xs[0][:1] * torch.nan]) for xs in (w.q, w.k, w.v))
    kernels.launcher.cupy.capture = launches = []
    try:
        w.attention.rope_and_store(q, k, v, w.cos_sin, batch, w.layer_kv)
        out = w.attention.attend(q, k, v, batch, w.layer_kv, w.scale, None)
    finally:
        kernels.launcher.cupy.capture = None
    assert [launch.kernel.name.partition("<")[0] for launch in launches] == [
        *("rope_and_store", "paged_decode", "merge_chunks", "hadamard")
    ]
    batch.context_lens[2], batch.slots[2], batch.positions[2] = 0, -1, 0
    for launch in launches:
        launch.run()
    torch.testing.assert_close(out[:2].double(), w.want([1, 1]), rtol=0, atol=0.02)
    assert not out[2].any()


@pytest.mark.parametrize("shape", [CORES[0], CORES[2], SIMT[0]], ids=str)
def test_nan_of_a_sequence_stays_with_it_and_shows(kernels: AttentionKernels, shape: Shape) -> None:
    w = World(attention(kernels), shape, (2, 1), [20, 30])
    w.k[0][5] = torch.nan
    w.store_past([1, 1])
    first, second = w.step([1, 1])
    assert first.isnan().all()
    assert second.isfinite().all()


@pytest.mark.parametrize("shape", CORES + SIMT, ids=str)
def test_bytes_are_those_that_are_announced(kernels: AttentionKernels, shape: Shape) -> None:
    spec, served = kv_spec(shape, 3, (8, 2), 32), attention(kernels)
    parts = [(x.kv, x.origins, x.origin_scales) for x in served.allocate(spec, 5)]
    assert sum(x.nbytes for layer in parts for x in layer) == 5 * served.block_bytes(spec)
    assert served.block_bytes(spec) == PagedAttention(torch.device("cpu")).block_bytes(spec)
