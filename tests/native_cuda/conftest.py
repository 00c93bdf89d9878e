"""One launcher on the emulator for the whole session: modules are compiled once, and cached between sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from blade_native.cuda.launch import Launcher


@pytest.fixture(scope="session")
def launcher() -> Launcher:
    from blade_native.emulator import emulated

    return emulated()
