"""The attention kernels, run by the emulator, against dense attention in float64 over caches poisoned with NaN."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from native_cpu.batches import ragged

from blade import ConfigError, KVSpec
from blade_native.attention import PagedAttention
from blade_native.cuda import attention as attention_module
from blade_native.cuda.attention import CudaAttention
from blade_native.cuda.attention_kernels import AttentionKernels, Shape
from blade_native.cuda.launch import Launcher

from .attention_world import ATOL, BF16, F16, F32, FP8, INT8, World, attention, check, cos_sin, kv_spec

SHAPES = [
    Shape(BF16, None, 64),
    Shape(F16, None, 80),
    Shape(BF16, INT8, 128),
    Shape(F16, FP8, 96),
    Shape(BF16, FP8, 256),
    Shape(F32, None, 64),
    Shape(F32, INT8, 80),
]
CORES, SIMT = SHAPES[:5], SHAPES[5:]
PLAIN = SHAPES[0]


@pytest.fixture(scope="module")
def kernels(launcher: Launcher) -> AttentionKernels:
    kernels = AttentionKernels(launcher)
    kernels.add(SHAPES)
    return kernels


def world(kernels: AttentionKernels, shape: Shape, heads: tuple[int, int], kv_lens: list[int], **more: int) -> World:
    return World(attention(kernels), shape, heads, kv_lens, **more)


def each(shapes: list[Shape], values: list[object], of_plain: list[object]) -> list[object]:
    """Pairs of a shape and a value: all values for every shape, and further ones for the plain shape alone."""
    return [*itertools.product(shapes, values), *itertools.product([PLAIN], of_plain)]


@pytest.mark.parametrize(("shape", "heads"), each(CORES, [(6, 2)], [(7, 1), (20, 1)]), ids=str)
def test_ragged_batch(kernels: AttentionKernels, shape: Shape, heads: tuple[int, int]) -> None:
    """Decodes, a whole prompt, a chunk and a verification together, lengths around block, tile and chunk edges."""
    kv_lens = [1, 16, 17, 33, 256, 257, 150, 20]
    check(world(kernels, shape, heads, kv_lens), [1, 1, 1, 33, 1, 5, 40, 0])


@pytest.mark.parametrize(("shape", "heads"), [*itertools.product(SIMT, [(2, 2), (7, 1)])], ids=str)
def test_ragged_batch_without_tensor_cores(kernels: AttentionKernels, shape: Shape, heads: tuple[int, int]) -> None:
    check(world(kernels, shape, heads, [1, 17, 257, 20]), [1, 6, 1, 0])


@pytest.mark.parametrize(("shape", "window"), each(CORES, [20], [1, 300]), ids=str)
def test_window(kernels: AttentionKernels, shape: Shape, window: int) -> None:
    check(world(kernels, shape, (4, 1), [3, 90, 130, 560]), [3, 1, 30, 1], window)


@pytest.mark.parametrize(("shape", "window"), [*itertools.product(SIMT, [1, 20])], ids=str)
def test_window_without_tensor_cores(kernels: AttentionKernels, shape: Shape, window: int) -> None:
    check(world(kernels, shape, (2, 1), [3, 60]), [3, 2], window)


@pytest.mark.parametrize(("shape", "chunk"), [(PLAIN, 20), (PLAIN, 256), (SIMT[0], 20)], ids=str)
def test_chunks_of_positions(kernels: AttentionKernels, shape: Shape, chunk: int) -> None:
    """Queries at the end of a chunk, at the beginning of one, and of several."""
    check(world(kernels, shape, (4, 1), [3, 90, 130, 257, 60]), [3, 1, 30, 2, 1], chunk=chunk)


@pytest.mark.parametrize(("shape", "block_size"), each([CORES[2]], [64], [32, 64]), ids=str)
def test_larger_blocks(kernels: AttentionKernels, shape: Shape, block_size: int) -> None:
    check(world(kernels, shape, (4, 2), [1, 50, 140], block_size=block_size), [1, 1, 40])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotary_part_of_a_head(kernels: AttentionKernels, shape: Shape) -> None:
    check(world(kernels, shape, (4, 2), [20, 9], rotary_dim=18), [3, 1])


@pytest.mark.parametrize("shape", [PLAIN, SIMT[0]], ids=str)
def test_results_are_those_of_the_torch_twin(kernels: AttentionKernels, shape: Shape) -> None:
    query_lens, window = [1, 20, 3], 30
    w = world(kernels, shape, (4, 2), [40, 20, 35], rotary_dim=32)
    whole, scale = [40, 20, 35], w.scale
    twin = PagedAttention(torch.device("cpu"))
    (twin_kv,) = twin.allocate(w.spec, int(w.whole.block_tables.max()) + 1)
    q, k, v = (torch.cat(xs) for xs in (w.q, w.k, w.v))
    twin.rope_and_store(q, k, v, w.cos_sin, w.owed(whole), twin_kv)
    w.store_past(query_lens)
    batch = w.owed(query_lens)
    q, k, v = (w.last(xs, query_lens) for xs in (w.q, w.k, w.v))
    twin_q, twin_k = twin.rope_and_store(q, k, v, w.cos_sin, batch, twin_kv)
    want = twin.attend(twin_q, twin_k, v, batch, twin_kv, scale, window)
    q, k = w.attention.rope_and_store(q, k, v, w.cos_sin, batch, w.layer_kv)
    torch.testing.assert_close((q, k), (twin_q, twin_k))
    out = w.attention.attend(q, k, v, batch, w.layer_kv, scale, window)
    torch.testing.assert_close(out, want, rtol=0, atol=ATOL[shape.dtype])


@pytest.mark.parametrize("owed", [1, 8, 17])
def test_long_context_is_split(kernels: AttentionKernels, owed: int) -> None:
    """Beyond MAX_CHUNKS chunks of 256, where chunks double; for one row, for the most that are split, for too many."""
    check(world(kernels, PLAIN, (8, 1), [8300 if owed < 17 else 700]), [owed])


@pytest.mark.parametrize("shape", [PLAIN, CORES[2]], ids=str)
def test_a_row_depends_neither_on_its_batch_nor_on_the_device(kernels: AttentionKernels, shape: Shape) -> None:
    kv_lens, owed = [600, 270, 40, 500], [1, 3, 40, 9]
    together = world(kernels, shape, (6, 1), kv_lens)
    together.store_past(owed)
    parts = together.step(owed).split(owed)
    together.attention = attention(kernels, num_sms=132)
    torch.testing.assert_close(together.step(owed).split(owed), parts, rtol=0, atol=0)
    whole = together.owed(owed)
    for i, part in enumerate(parts):
        alone = ragged([owed[i]], [kv_lens[i]], 16)
        alone.block_tables, alone.slots = whole.block_tables[i : i + 1], whole.slots.split(owed)[i]
        one = together.q[i], together.k[i], together.v[i]
        together.q, together.k, together.v, every = [one[0]], [one[1]], [one[2]], (together.q, together.k, together.v)
        torch.testing.assert_close(together.step([owed[i]], batch=alone), part, rtol=0, atol=0)
        together.q, together.k, together.v = every


def test_slices_of_one_projection(kernels: AttentionKernels) -> None:
    w = world(kernels, PLAIN, (4, 2), [40])
    want = w.step([40])
    fused = torch.cat([x[0].flatten(1) for x in (w.q, w.k, w.v)], dim=1)
    q, k, v = (x.unflatten(1, (-1, 64)) for x in fused.split((256, 128, 128), dim=1))
    batch = w.owed([40])
    q, k = w.attention.rope_and_store(q, k, v, w.cos_sin, batch, w.layer_kv)
    torch.testing.assert_close(w.attention.attend(q, k, v, batch, w.layer_kv, w.scale, None), want, rtol=0, atol=0)
    assert q.data_ptr() == fused.data_ptr()  # rotated in place


@pytest.mark.parametrize("shape", [PLAIN, Shape(BF16, INT8, 128)], ids=str)
def test_captured_decodes_replay_with_other_lengths(
    kernels: AttentionKernels, shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of fixed buffers is captured for the longest context; a replay of it finds other lengths in them, and
    padding: a sequence of no tokens, whose slot is -1."""
    # A graph's memory pool keeps what is allocated under capture; so does this.
    kept, partials = [], attention_module._partials
    monkeypatch.setattr(attention_module, "_partials", lambda *args: kept.append(partials(*args)) or kept[-1])
    w = world(kernels, shape, (4, 1), [600, 30, 290, 1])
    w.store_past([1, 1, 1, 1])
    w.kv_lens, batch = w.kv_lens[:3], w.owed([1, 1, 1, 1])
    batch.kv_lens = [1000] * 4
    batch.block_tables = torch.nn.functional.pad(batch.block_tables, (0, 63 - batch.block_tables.shape[1]))
    w.q, w.k, w.v = (xs[:3] for xs in (w.q, w.k, w.v))
    q, k, v = (torch.cat([x[-1:] for x in xs] + [xs[0][:1] * torch.nan]) for xs in (w.q, w.k, w.v))
    lens, slots = batch.context_lens.clone(), batch.slots.clone()
    batch.context_lens.fill_(1000)  # what it is captured with
    w.attention.attend(q.clone(), k, v, batch, w.layer_kv, w.scale, None)
    cupy = kernels.launcher.cupy
    cupy.capture = launches = []
    try:
        w.attention.rope_and_store(q, k, v, w.cos_sin, batch, w.layer_kv)
        out = w.attention.attend(q, k, v, batch, w.layer_kv, w.scale, None)
    finally:
        cupy.capture = None
    assert [launch.kernel.name.partition("<")[0] for launch in launches] == [
        "rope_and_store",
        "paged_decode",
        "merge_chunks",
    ]
    batch.context_lens.copy_(lens)
    batch.slots.copy_(slots)
    batch.context_lens[3], batch.slots[3], batch.positions[3] = 0, -1, 0
    for launch in launches:
        launch.run()
    torch.testing.assert_close(out[:3].double(), w.want([1, 1, 1]), rtol=0, atol=0.02)
    assert not out[3].any()


def test_decodes_bring_nothing_from_the_host(kernels: AttentionKernels) -> None:
    """So that they can be captured; with one KV head for 20 query heads too, which the prefill kernel serves."""
    for heads in ((4, 1), (20, 1)):
        w = world(kernels, PLAIN, heads, [600, 30])
        w.store_past([1, 1])
        w.step([1, 1])
        plan = w.attention._plan
        assert plan is not None
        assert plan.items is plan.partial_starts is None


def test_nan_of_a_sequence_stays_with_it_and_shows(kernels: AttentionKernels) -> None:
    for shape in (PLAIN, Shape(BF16, INT8, 128), Shape(F32, None, 64)):
        w = world(kernels, shape, (2, 1), [20, 30])
        w.k[0][5] = torch.nan
        w.store_past([1, 1])
        first, second = w.step([1, 1])
        assert first.isnan().all()
        assert second.isfinite().all()


def test_other_shapes_are_served_by_torch(kernels: AttentionKernels) -> None:
    attention = CudaAttention(PagedAttention(torch.device("cpu")), kernels, num_sms=1)
    tiny = KVSpec(2, 4, 2, 8, "float32", 16)
    assert attention.block_bytes(tiny) == 2 * 2 * 16 * 2 * 8 * 4
    (layer_kv, _) = attention.allocate(tiny, 3)
    batch = ragged([20], [20], 16)
    q, k, v = torch.randn(20, 4, 8), *torch.randn(2, 20, 2, 8)
    q, k = attention.rope_and_store(q, k, v, cos_sin(21, 8), batch, layer_kv)
    assert attention.attend(q, k, v, batch, layer_kv, 8**-0.5, None).shape == (20, 32)
    assert attention.block_bytes(replace(tiny, storage="int8")) == 2 * (2 * 16 + 1) * 2 * (8 + 4)
    assert attention.block_bytes(replace(tiny, storage="fp8_e4m3")) < attention.block_bytes(tiny) / 2
    with pytest.raises(ConfigError, match="in int3 here"):
        attention.allocate(replace(tiny, storage="int3"), 3)


def test_bytes_of_a_block(kernels: AttentionKernels) -> None:
    rows = 3 * 2 * 2 * 32
    for shape, row_bytes in (
        (Shape(BF16, None, 128), 256),
        (Shape(BF16, INT8, 128), 132),
        (Shape(BF16, FP8, 128), 128),
    ):
        origin_bytes = 0 if row_bytes == 256 else 3 * 2 * row_bytes
        assert attention(kernels).block_bytes(kv_spec(shape, 3, (8, 2), 32)) == rows * row_bytes + origin_bytes
    kv = attention(kernels).allocate(kv_spec(Shape(BF16, INT8, 128), 3, (8, 2), 32), 5)
    assert sum(x.kv.nbytes + x.scales.nbytes for x in kv) == 5 * rows * 132
    assert sum(x.origins.nbytes + x.origin_scales.nbytes for x in kv) == 5 * 3 * 2 * 132


def test_wrong_input_is_refused(kernels: AttentionKernels) -> None:
    w = world(kernels, PLAIN, (4, 2), [3])
    batch, (q,), (k,), (v,) = w.owed([3]), w.q, w.k, w.v
    with pytest.raises(TypeError, match="q is "):
        w.attention.attend(q.float(), k, v, batch, w.layer_kv, 1.0, None)
    with pytest.raises(ValueError, match="k has shape"):
        w.attention.rope_and_store(q, q, v, w.cos_sin, batch, w.layer_kv)
    with pytest.raises(ValueError, match="side by side"):
        w.attention.attend(q.transpose(0, 1).contiguous().transpose(0, 1), k, v, batch, w.layer_kv, 1.0, None)
    shifted = torch.zeros(q.numel() + 1, dtype=BF16)[1:].view(q.shape)
    with pytest.raises(ValueError, match="16 bytes"):
        w.attention.attend(shifted, k, v, batch, w.layer_kv, 1.0, None)
    with pytest.raises(ValueError, match="rotary_dim 66"):
        w.attention.rope_and_store(q, k, v, cos_sin(4, 66), batch, w.layer_kv)
    with pytest.raises(ValueError, match="positive"):
        w.attention.attend(q, k, v, batch, w.layer_kv, 0.0, None)


def test_chosen_keys(kernels: AttentionKernels) -> None:
    """In torch, over what the kernels stored; rounded caches are the torch attention's."""
    shape, kv_lens, query_lens = PLAIN, [40, 17, 1, 150], [3, 1, 1, 20]
    there = world(kernels, shape, (6, 2), kv_lens)
    there.store_past(query_lens)
    expected = there.step(query_lens)
    batch = there.owed(query_lens)
    q, k, v = (there.last(xs, query_lens) for xs in (there.q, there.k, there.v))
    q, k = there.attention.rope_and_store(q, k, v, there.cos_sin, batch, there.layer_kv)
    ends = [end for length, n in zip(kv_lens, query_lens, strict=True) for end in range(length - n, length)]
    owners = [i for i, n in enumerate(query_lens) for _ in range(n)]
    slots = torch.full((len(ends), 151), -1, dtype=torch.int32)
    for row, (seq, end) in enumerate(zip(owners, ends, strict=True)):
        slots[row, : end + 1] = there.whole.slots.split(kv_lens)[seq][: end + 1]
    found = there.attention.attend_slots(q, batch, there.layer_kv, there.scale, slots)
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL[shape.dtype])
    rounded = replace(kv_spec(Shape(BF16, INT8, 128), 1, (6, 2), 16), selected=True)
    assert not isinstance(there.attention.allocate(rounded, 2)[0], attention_module.LayerKV)
    assert isinstance(there.attention.allocate(replace(rounded, storage=None), 2)[0], attention_module.LayerKV)
