"""Hatch build hook: compile the CPU kernels into the wheel, or into the tree of an editable install.

Needs only a C++ compiler, and not even that: without one the package is built all the same, says so, and its torch ops
serve at run time.
"""

from __future__ import annotations

import importlib.util
import re
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

REMEDY = "blade will run its slower torch ops. With g++ installed: python -m blade_native.simd.build"


class KernelBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it collects the files of a wheel ("standard") or an editable install."""
        if self.target_name != "wheel":
            return
        build = _load(Path(self.root, "native/blade_native/simd/build.py"))
        cxx = build.compiler()
        if cxx is None:
            self.app.display_warning(f"No C++ compiler: the CPU kernels are left out. {REMEDY}")
            return
        try:
            build.build(cxx)
        except build.CompileError as error:
            self.app.display_warning(f"The CPU kernels did not compile: {REMEDY}\n{error}")
            return
        build_data["artifacts"].append("native/blade_native/cpu/lib/*.so")
        build_data["pure_python"] = False
        # The libraries are called through ctypes: they depend on the platform, not on the Python.
        build_data["tag"] = "py3-none-" + re.sub(r"[-.]", "_", sysconfig.get_platform())


def _load(path: Path) -> ModuleType:
    """The module in a file of a package that is not installed yet."""
    spec = importlib.util.spec_from_file_location("blade_kernels_build", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
