"""One launcher on the emulator for the whole session: modules are compiled once, and cached between sessions.

With BLADE_CUDA_TESTS=device the same tests run the kernels on a CUDA device, but for those of the emulator itself.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from blade_native.cuda.launch import Launcher


ON_DEVICE = os.environ.get("BLADE_CUDA_TESTS") == "device"
OF_THE_EMULATOR = (
    "test_emulator",
    "test_double",
    "test_faults",
    "test_faults_ops",
    "test_attention_faults",
    "test_attention_mode_faults",
    "test_attention_dual_chunk_faults",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items if ON_DEVICE else ():
        if item.path.stem in OF_THE_EMULATOR or item.get_closest_marker("emulator"):
            item.add_marker(pytest.mark.skip(reason="of the emulator itself, not of a device"))


@pytest.fixture(scope="session")
def launcher() -> Launcher:
    from blade_native.emulator import bridged, emulated

    return bridged() if ON_DEVICE else emulated()
