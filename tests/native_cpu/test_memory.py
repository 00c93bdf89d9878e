"""Memory that is made ready ahead of its use."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
import torch

from blade import CaptureOptions
from blade_native import CpuBackend
from blade_native.simd.library import Library
from blade_native.simd.memory import HUGE_PAGE, LINE, Region, Regions
from blade_native.simd.ops import SimdOps

from .conftest import unavailable

if TYPE_CHECKING:
    from blade.contracts import Model

SIZE = 8 * HUGE_PAGE


def resident() -> int:
    """Bytes of this process's anonymous memory."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return 1024 * int(found[1])


def test_touching_makes_pages_present_and_changes_nothing(library: Library) -> None:
    region = Region(SIZE)
    tensor = region.tensor(0, SIZE)
    tensor[5] = 7
    before = resident()
    library.touch(region.address, SIZE)
    assert resident() > before + SIZE // 2
    assert tensor[5] == 7
    assert int(tensor.count_nonzero()) == 1


def test_a_system_without_huge_pages_has_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999)
    assert int(Region(SIZE, small=HUGE_PAGE).tensor(0, SIZE).count_nonzero()) == 0


def prepared(library: Library, num_bytes: int) -> Regions:
    regions = Regions()
    regions.prepare(num_bytes, library.touch)
    return regions


def test_tensors_lie_side_by_side_and_apart(library: Library) -> None:
    regions = prepared(library, SIZE)
    first, second = regions.allocate(100), regions.allocate(HUGE_PAGE)
    assert second.data_ptr() == first.data_ptr() + 100 + -100 % LINE
    first.fill_(1)
    assert not second.any()
    assert (len(first), first.dtype) == (100, torch.uint8)


def test_what_nobody_took_is_given_back(library: Library) -> None:
    regions = prepared(library, SIZE)
    taken = regions.allocate(HUGE_PAGE).fill_(3)
    library.touch(taken.data_ptr(), SIZE)
    before = resident()
    regions.close()
    regions.close()
    assert resident() < before - SIZE // 2
    assert taken.eq(3).all()
    late = regions.allocate(HUGE_PAGE)  # from elsewhere
    assert not late.any()
    assert not taken.data_ptr() <= late.data_ptr() < taken.data_ptr() + SIZE


def test_more_than_was_prepared_comes_from_elsewhere(library: Library) -> None:
    regions = prepared(library, HUGE_PAGE)
    assert not regions.allocate(SIZE).any()
    assert not regions.allocate(HUGE_PAGE).any()


def test_the_backend_hands_it_to_the_op_set() -> None:
    if reason := unavailable():
        pytest.skip(reason)
    backend = CpuBackend()
    backend.prepare(SIZE)
    ops = backend(1)
    assert isinstance(ops, SimdOps)
    first, second = (ops.linear(torch.ones(32, 32), None) for _ in range(2))
    assert second.weights.data_ptr() == first.weights.data_ptr() + 32 * 32 * 4  # type: ignore[attr-defined]
    available = ops.available_memory()
    assert ops.library.regions.idle_bytes <= available
    third = ops.linear(torch.ones(32, 32), None)  # asking ends nothing: a server asks before it loads
    assert third.weights.data_ptr() == second.weights.data_ptr() + 32 * 32 * 4  # type: ignore[attr-defined]
    ops.capture(cast("Model", None), [], CaptureOptions())
    assert ops.library.regions.idle_bytes == 0
    elsewhere = ops.linear(torch.ones(32, 32), None)
    assert not 0 <= elsewhere.weights.data_ptr() - first.weights.data_ptr() < SIZE  # type: ignore[attr-defined]
    assert elsewhere(torch.ones(1, 32)).equal(second(torch.ones(1, 32)))
