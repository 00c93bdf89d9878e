"""What the machine is said to give."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from blade_native.simd import limits
from blade_native.simd.limits import BLOCK, read_bandwidth


@pytest.mark.parametrize(
    ("num_bytes", "read"),
    [(None, 4 * BLOCK), (10 * BLOCK, 4 * BLOCK), (2 * BLOCK + 1, 2 * BLOCK), (1, BLOCK)],
)
def test_as_many_bytes_are_read_as_will_be_but_no_more_than_caches_do_not_hold(
    num_bytes: int | None, read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "uncached_bytes", lambda: 4 * BLOCK)
    sizes: list[int] = []
    library: Any = SimpleNamespace(read=lambda address, size, threads: sizes.append(size) or 0)
    assert read_bandwidth(library, 1, 0.001, num_bytes) > 0
    assert set(sizes) == {read}
