"""In a tree of drafts each token gets what it would get on its path alone, to the last bit."""

from __future__ import annotations

import pytest
import torch

from blade import KVSpec
from blade.engine.trees import ancestors, depths
from blade_native.simd.library import Library

from .batches import ragged, spec
from .test_attention import KINDS, OTHERS, World, world

FORKS = [-1, 0, 1, -1, 3, 3, 0, -1, 5, 8, 8, 2]
COMB = [*range(-1, 19), -1, 0, 20, 21, 19, *range(24, 49)]  # a long chain, branches that leave it, and how it goes on


def check_tree(library: Library, shape: KVSpec, base: int, parents: list[int], *reach: int | None) -> None:
    """`base`: tokens before the root. `reach`: a window, and chunks."""
    num, seen = len(parents) + 1, ancestors(parents)
    w = world(library, shape, [base + num, 37])
    batch = ragged([num, 3], w.kv_lens, shape.block_size)
    w.store_all(batch)
    batch.positions[:num] = base + torch.tensor(depths(parents))
    batch.ancestors = torch.tensor([*seen, 0, 0, 0])
    out = w.step([num, 3], batch, *reach)
    assert torch.equal(out[num:], path(w, 1, list(range(37)), 3, *reach))  # what is no tree
    for place, bits in list(enumerate(seen))[:: 1 + num // 20]:
        tokens = [*range(base), *(base + i for i in range(num) if bits >> i & 1)]
        assert torch.equal(out[place], path(w, 0, tokens, 1, *reach)[0]), f"place {place}"


def path(w: World, seq: int, tokens: list[int], num_owed: int, *reach: int | None) -> torch.Tensor:
    """What the last of these tokens of a sequence get where there are no others."""
    one = World(w.attention, w.spec, [len(tokens)])
    one.q, one.k, one.v = ([xs[seq][tokens]] for xs in (w.q, w.k, w.v))
    batch = ragged([num_owed], one.kv_lens, w.spec.block_size)
    one.store_all(batch)
    return one.step([num_owed], batch, *reach)


@pytest.mark.parametrize("base", [1, 125])
@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_a_tree_is_its_paths(library: Library, kind: str, base: int) -> None:
    check_tree(library, spec(6, 2, 64, kind), base, FORKS)


@pytest.mark.parametrize("kind", KINDS)
def test_long_paths_far_behind_and_few_heads(library: Library, kind: str) -> None:
    """Paths that fill several chunks, and a context that is split over threads."""
    check_tree(library, spec(9, 1, 80, kind, 32), 600, COMB)


@pytest.mark.parametrize("reach", [(7, None), (None, 20), (64, None)])
@pytest.mark.parametrize("kind", KINDS)
def test_windows_and_chunks_go_by_the_path(library: Library, kind: str, reach: tuple[int | None, int | None]) -> None:
    check_tree(library, spec(4, 2, 32, kind), 114, COMB, *reach)
