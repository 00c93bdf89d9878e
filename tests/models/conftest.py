"""References are made once; importing transformers alone takes seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from checkpoints import CASES, make_reference

if TYPE_CHECKING:
    from checkpoints import Reference


@pytest.fixture(scope="session", params=CASES)
def reference(request: pytest.FixtureRequest) -> Reference:
    return make_reference(request.param)


@pytest.fixture(scope="session")
def qwen3_reference() -> Reference:
    return make_reference("qwen3")
