"""Drafts that are trees in the attention kernels: which keys a row sees, and that nobody else notices."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from drafters.generation import PROMPTS, generate, ids
from safetensors.torch import load_file, save_file

import blade_native.cuda
from blade import Config, EngineConfig, ModelOptions
from blade.assembly import choose, load_model
from blade.plugins import load
from blade_native.attention import PagedAttention
from blade_native.cuda import attention_kernels, launch
from blade_native.cuda.attention import CudaAttention
from blade_native.cuda.attention_kernels import AttentionKernels, Shape
from blade_native.cuda.launch import Launcher
from blade_native.reference import TorchOps

from .attention_world import ATOL, BF16, F16, F32, FP8, INT8, World, attention, check, kv_spec

PLAIN, SIMT = Shape(BF16, None, 64), Shape(F32, None, 64)
SHAPES = [PLAIN, Shape(F16, INT8, 128), Shape(BF16, FP8, 256), SIMT]
CASES = [*zip(SHAPES, [(7, 1), (3, 1), (2, 2), (3, 1)], [16, 32, 64, 16], strict=True)]  # heads, block size
# A decode, a prompt, a tree over keys that are cut into chunks, one of 64 tokens, a short one, a plain verification.
KV_LENS, QUERY_LENS = [30, 20, 270, 90, 20, 25], [1, 20, 5, 64, 2, 3]


def parents(num_ids: int, seed: int) -> list[int]:
    """A tree of so many ids, with paths in it."""
    draw = random.Random(seed)
    return [draw.choice([i - 1, draw.randrange(-1, i)]) for i in range(num_ids)]


TREES = {i: parents(QUERY_LENS[i] - 1, i) for i in (2, 3, 4)}


@pytest.fixture(scope="module")
def kernels(launcher: Launcher) -> AttentionKernels:
    kernels = AttentionKernels(launcher)
    kernels.add(SHAPES, attention_kernels.TREES)
    kernels.add(SHAPES)
    return kernels


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_sees_its_own_path(kernels: AttentionKernels, case: tuple[Shape, tuple[int, int], int]) -> None:
    shape, heads, block_size = case
    check(World(attention(kernels), shape, heads, KV_LENS, block_size, trees=TREES), QUERY_LENS)


@pytest.mark.parametrize(
    ("shape", "window", "chunk"),
    [(PLAIN, 1, None), (PLAIN, 5, None), (PLAIN, 20, None), (PLAIN, None, 10), (SIMT, 5, None), (SIMT, None, 10)],
    ids=str,
)
def test_windows_and_chunks_go_by_positions(
    kernels: AttentionKernels, shape: Shape, window: int | None, chunk: int | None
) -> None:
    kv_lens, query_lens = [45, 18, 40], [40, 2, 4]
    trees = {0: parents(39, 1), 2: parents(3, 2)}
    check(World(attention(kernels), shape, (4, 1), kv_lens, trees=trees), query_lens, window, chunk)


@pytest.mark.parametrize("shape", [PLAIN, SIMT], ids=str)
def test_results_are_those_of_the_torch_twin(kernels: AttentionKernels, shape: Shape) -> None:
    """Of a sequence that has plain tokens before its tree, too."""
    w = World(attention(kernels), shape, (4, 2), [40, 33], trees={0: parents(19, 3), 1: parents(8, 4)})
    owed = [20, 9]
    w.store_past(owed)
    batch = w.owed(owed)
    assert batch.ancestors is not None
    batch.ancestors[20:23], batch.positions[20:23] = 0, torch.arange(24, 27)
    twin = PagedAttention(torch.device("cpu"))
    (twin_kv,) = twin.allocate(w.spec, int(w.whole.block_tables.max()) + 1)
    past = w.whole
    twin.rope_and_store(*(torch.cat(xs) for xs in (w.q, w.k, w.v)), w.cos_sin, past, twin_kv)
    q, k, v = (w.last(xs, owed) for xs in (w.q, w.k, w.v))
    twin_q, twin_k = twin.rope_and_store(q, k, v, w.cos_sin, batch, twin_kv)
    want = twin.attend(twin_q, twin_k, v, batch, twin_kv, w.scale, 30)
    torch.testing.assert_close(w.step(owed, 30, batch), want, rtol=0, atol=ATOL[shape.dtype])


@pytest.mark.parametrize("shape", [PLAIN, SIMT], ids=str)
def test_plain_sequences_do_not_notice(kernels: AttentionKernels, shape: Shape) -> None:
    """Bit for bit, those of a tree that is a chain included."""
    w = World(attention(kernels), shape, (8, 1), KV_LENS)
    w.store_past(QUERY_LENS)
    plain = w.step(QUERY_LENS).split(QUERY_LENS)
    w.trees = {2: TREES[2], 3: [*range(-1, 62)], 4: [-1]}
    with_trees = w.step(QUERY_LENS).split(QUERY_LENS)
    for seq in (0, 1, 3, 4, 5):
        assert torch.equal(with_trees[seq], plain[seq])
    assert not torch.equal(with_trees[2], plain[2])


def test_only_steps_with_trees_have_their_kernels(kernels: AttentionKernels, launcher: Launcher) -> None:
    w = World(attention(kernels), PLAIN, (8, 1), [300, 40])
    w.store_past([2, 20])
    launches = launcher.cupy.launches = []
    w.step([2, 20])
    w.trees = {1: parents(19, 5)}
    w.step([2, 20])
    assert [launch.kernel.name.partition("<")[0] for launch in launches] == [
        *("rope_and_store", "paged_decode", "paged_prefill", "merge_chunks"),
        *("rope_and_store", "paged_decode_trees", "paged_prefill_trees", "merge_chunks"),
    ]


def test_kernels_for_trees_are_there_at_start_where_the_spec_says_so(kernels: AttentionKernels) -> None:
    kernels._others.clear()
    for trees in (False, True):
        attention(kernels).allocate(replace(kv_spec(PLAIN, 1, (8, 1), 16), trees=trees), 1)
        assert list(kernels._others) == [(PLAIN, attention_kernels.TREES)] * trees


def test_ancestors_that_are_not_are_refused(kernels: AttentionKernels) -> None:
    w = World(attention(kernels), PLAIN, (8, 1), [9], trees={0: parents(8, 6)})
    batch = w.owed([9])
    assert batch.ancestors is not None
    with pytest.raises(ValueError, match="ancestors has shape"):
        w.step([9], batch=replace(batch, ancestors=batch.ancestors[1:]))
    with pytest.raises(TypeError, match="ancestors is "):
        w.step([9], batch=replace(batch, ancestors=batch.ancestors.int()))


def widened(folder: Path, to: Path) -> Path:
    """The checkpoint with half as many heads, of 64 channels."""
    tensors = load_file(folder / "model.safetensors")
    for name, x in tensors.items():
        if "self_attn" in name:
            tensors[name] = torch.cat((x, -x.flip(0, 1)), dim=1 if "o_proj" in name else 0)
    save_file(tensors, to / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    (to / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (to / name).write_text((folder / name).read_text())
    return to


@pytest.mark.emulator
def test_lookahead_does_not_change_the_text(
    kernels: AttentionKernels, launcher: Launcher, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole engine on the CUDA op set, with the CPU for a device."""
    monkeypatch.setattr(TorchOps, "require_capability", lambda *capability: None, raising=False)
    monkeypatch.setattr(blade_native.cuda, "TorchCudaOps", TorchOps)
    monkeypatch.setattr(launch, "import_cupy", lambda: launcher.cupy)
    monkeypatch.setattr(attention_kernels, "AttentionKernels", lambda launcher: kernels)
    options = ModelOptions(model=str(widened(tiny_llama, tmp_path)), dtype="float32", max_model_len=128)
    config = Config(model=options, engine=EngineConfig(device="cuda", drafter=("lookahead",)))
    assembly = choose(config, load())
    assert isinstance(assembly.attention, CudaAttention)
    assert assembly.kv_spec.trees
    model, params = load_model(assembly), {"temperature": 0, "max_tokens": 14}
    said = []
    for drafter in ((), ("lookahead",)):
        found, stats = generate(assembly, model, None, params, PROMPTS[:2], drafter=drafter, adaptive_drafts=False)
        said.append(ids(found))
    assert said[1] == said[0]
    assert stats.draft_tokens_accepted > 0
    assert any("paged_simt_trees" in launch.kernel.name for launch in launcher.cupy.launches)
