"""Which instantiations of the attention kernels serve a shape, compiled and ready to launch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from blade_native.cuda.launch import CUDA_NAMES, Kernel, Launcher, Module
from blade_native.kv_codes import MODES, Kept, transforms_values

HEAD_DIMS = (64, 80, 96, 128, 256)
NUMBERS = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}  # of KVSpec.storage; the other modes lie in pages
CHUNK, MAX_CHUNKS = 256, 32  # these four as in attention.cuh
SPLIT_ROWS, DECODE_ROWS = 64, 16
SIMT_ROWS = (1, 4)
STORE_WARPS = SIMT_WARPS = MERGE_WARPS = HADAMARD_WARPS = 4
PREFILL_WARPS = 4
PLAIN, TREES, DUAL = "", "_trees", "_dual"  # steps, by the suffix of their kernels: usual ones, see TreeArgs, DualArgs


@dataclass(frozen=True)
class Shape:
    """What the kernels are instantiated for. `storage` is KVSpec's."""

    dtype: torch.dtype
    storage: str | None
    head_dim: int

    @property
    def types(self) -> str:
        kept = self.numbers
        return f"{CUDA_NAMES[self.dtype]}, {CUDA_NAMES[kept] if kept else f'kv_{self.storage}'}, {self.head_dim}"

    @property
    def numbers(self) -> torch.dtype | None:
        """What the cache is a tensor of; None: it consists of pages, see kv_storage.cuh."""
        return NUMBERS.get(self.storage) if self.storage else self.dtype

    @property
    def mode(self) -> tuple[Kept, Kept] | None:
        """How keys and values lie in pages."""
        return None if self.storage is None or self.numbers else MODES[self.storage]

    @property
    def related(self) -> bool:
        """Whether keys are kept relative to an origin."""
        return self.storage is not None

    @property
    def origins(self) -> torch.dtype:
        """What these are rounded to."""
        return self.numbers or torch.int8

    @property
    def transforms_values(self) -> bool:
        return self.mode is not None and transforms_values(self.mode[1])

    @property
    def tensor_cores(self) -> bool:
        return self.dtype is not torch.float32

    @property
    def decode_ring(self) -> tuple[int, int]:
        """(WARPS, STAGES) of DecodeRing in paged_decode.cu."""
        return 2 if self.head_dim > 128 else 4, 2

    @property
    def prefill_ring(self) -> tuple[int, int, int]:
        """(WARPS, KEYS, STAGES) of PrefillRing in paged_prefill.cu."""
        keys = 16 if self.head_dim > 128 else 32 if self.storage else 64
        return PREFILL_WARPS, keys, 2 if keys == 64 else 3

    def stage_bytes(self, keys: int) -> int:
        """KeyStage<S, D, KEYS>::BYTES of kv_storage.cuh."""
        if self.mode:
            return sum(self._stage_bytes(keys, kept.bits, self._number_bytes(kept)) for kept in self.mode)
        return 2 * self._stage_bytes(keys, 8 * self.origins.itemsize, 4 if self.storage == "int8" else 0)

    def _stage_bytes(self, keys: int, bits: int, number_bytes: int) -> int:
        return keys * ((-(-self.head_dim * bits // 128) | 1) * 16 + number_bytes)

    def _number_bytes(self, kept: Kept) -> int:
        return kept.num_numbers(self.head_dim) * int(kept.number.itemsize)

    def shared_bytes(self, warps: int, ring_bytes: int) -> int:
        """Rings and, in their place later, results of 16 rows a warp; beside them q where it is parked."""
        results = warps * 16 * ((self.head_dim + 8) * 4 + 8)
        parked = warps * self.head_dim * 32 if self.head_dim > 128 else 0
        return max(ring_bytes, results) + parked

    @property
    def decode_shared_bytes(self) -> int:
        warps, stages = self.decode_ring
        return self.shared_bytes(warps, warps * stages * self.stage_bytes(16))

    @property
    def prefill_shared_bytes(self) -> int:
        warps, keys, stages = self.prefill_ring
        return self.shared_bytes(warps, stages * self.stage_bytes(keys))

    def expressions(self, steps: str = PLAIN) -> dict[str, list[str]]:
        """Source -> the kernels this shape takes from it; but for usual steps, those that others do not share."""
        if self.tensor_cores:
            named = {f"paged_{kind}.cu": [f"paged_{kind}{steps}<{self.types}>"] for kind in ("decode", "prefill")}
        else:
            named = {"paged_simt.cu": [f"paged_simt{steps}<{self.types}, {rows}>" for rows in SIMT_ROWS]}
        if steps != TREES:
            named["kv_store.cu"] = [f"rope_and_store{steps}<{self.types}>"]
        if steps == PLAIN:
            named["paged_merge.cu"] = [f"merge_chunks<{self.types}>"]
        if steps == PLAIN and self.transforms_values:
            named["hadamard.cu"] = [f"hadamard<{CUDA_NAMES[self.dtype]}, {self.head_dim}>"]
        return named


class Attending:
    """The kernels that such steps of one shape store (but those with trees) and attend with."""

    def __init__(self, shape: Shape, modules: dict[str, Module], steps: str) -> None:
        def named(source: str, shared_bytes: int = 0) -> list[Kernel]:
            names = shape.expressions(steps).get(source, [])
            return [modules[source].kernel(name, shared_bytes) for name in names]

        self.store = next(iter(named("kv_store.cu")), None)
        self.decode = next(iter(named("paged_decode.cu", shape.decode_shared_bytes)), None)
        self.prefill = next(iter(named("paged_prefill.cu", shape.prefill_shared_bytes)), None)
        self.simt = dict(zip(SIMT_ROWS, named("paged_simt.cu"), strict=False))


class ShapeKernels:
    """The kernels of one shape, but for those that only steps with trees or dual chunks need."""

    def __init__(self, shape: Shape, modules: dict[str, Module]) -> None:
        def named(source: str) -> Kernel:
            (name,) = shape.expressions()[source]
            return modules[source].kernel(name)

        self.store, self.merge = named("kv_store.cu"), named("paged_merge.cu")
        self.hadamard = named("hadamard.cu") if shape.transforms_values else None
        self.attending = Attending(shape, modules, PLAIN)


class AttentionKernels:
    """Kernels by shape. Those of one `add` share a compilation per source."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self._modules: dict[tuple[Shape, str], dict[str, Module]] = {}
        self._ready: dict[Shape, ShapeKernels] = {}
        self._others: dict[tuple[Shape, str], Attending] = {}

    def add(self, shapes: Iterable[Shape], steps: str = PLAIN) -> None:
        """Announce shapes, which are compiled when they are first asked for (by the emulator's double at once)."""
        new = [(shape, steps) for shape in dict.fromkeys(shapes) if (shape, steps) not in self._modules]
        wanted: dict[str, list[str]] = {}
        for shape, _ in new:
            for source, names in shape.expressions(steps).items():
                wanted.setdefault(source, []).extend(names)
        modules = {source: self.launcher.load(source, names) for source, names in wanted.items()}
        self._modules.update(dict.fromkeys(new, modules))

    def get(self, shape: Shape) -> ShapeKernels:
        """Compiles where that has not been done: call it while loading."""
        if shape not in self._ready:
            self.add([shape])
            self._ready[shape] = ShapeKernels(shape, self._modules[shape, PLAIN])
        return self._ready[shape]

    def others(self, shape: Shape, steps: str) -> Attending:
        """As `get`, for steps with trees or dual chunks."""
        if (shape, steps) not in self._others:
            self.add([shape], steps)
            self._others[shape, steps] = Attending(shape, self._modules[shape, steps], steps)
        return self._others[shape, steps]
