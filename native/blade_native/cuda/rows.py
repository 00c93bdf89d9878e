"""Host side of rows.cu: which thread shares a row with which, and what is covered at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blade_native.cuda.launch import CUDA_NAMES

if TYPE_CHECKING:
    from torch import Tensor

    from blade_native.cuda.launch import Launcher

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TEAMS = (0, 8, 32)  # threads that share a row; 0: those of a block
HELD = 4  # vectors of 16 bytes of a row that a thread holds
BLOCK, MAX_BLOCK = 128, 1024
GATE_BLOCK = 256


class RowKernels:
    """rms_norm, add_rms_norm and silu_mul; `covers_*` says of which tensors."""

    def __init__(self, launcher: Launcher) -> None:
        norms = {(dtype, team): f"rms_norm<{CUDA_NAMES[dtype]}, {team}>" for dtype in DTYPES for team in TEAMS}
        adding = {dtype: f"add_rms_norm<{CUDA_NAMES[dtype]}>" for dtype in DTYPES}
        gates = {dtype: f"silu_mul<{CUDA_NAMES[dtype]}>" for dtype in DTYPES}
        module = launcher.load("rows.cu", [*norms.values(), *adding.values(), *gates.values()])
        self._norms = {key: module.kernel(name) for key, name in norms.items()}
        self._adding = {dtype: module.kernel(name) for dtype, name in adding.items()}
        self._gates = {dtype: module.kernel(name) for dtype, name in gates.items()}

    def covers_norm(self, x: Tensor, weight: Tensor) -> bool:
        """x [..., D]: of three or more axes the first may be strided, as in a slice of a fused projection."""
        width = x.shape[-1]
        return (
            covers(x, width)
            and weight.dtype == x.dtype
            and weight.shape == (width,)
            and covers(weight, width)
            and num_vectors(x, width) <= HELD * MAX_BLOCK
            and x.numel() > 0
            and (x.is_contiguous() or (x.dim() > 1 and x[0].is_contiguous() and x.stride(0) * x.itemsize % 16 == 0))
        )

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        strided = not x.is_contiguous()
        outer = x.shape[0] if strided else x.numel() // width
        vectors = num_vectors(x, width)
        team = next((team for team in TEAMS[1:] if vectors <= HELD * team), 0)
        block = BLOCK if team else block_for(vectors)
        per_block = block // team if team else 1
        inner = x[0].numel() // width if strided else 1
        self._norms[x.dtype, team](
            (-(-outer * inner // per_block),), (block,), y=y, x=x, residual=None, weight=weight,
            stride=x.stride(0) if strided else width, outer=outer, inner=inner, width=width, eps=eps,
        )  # fmt: skip
        return y

    def covers_add(self, x: Tensor, residual: Tensor, weight: Tensor) -> bool:
        same = residual.dtype == x.dtype and residual.shape == x.shape
        contiguous = x.is_contiguous() and residual.is_contiguous()
        return same and contiguous and self.covers_norm(x, weight) and residual.data_ptr() % 16 == 0

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The norm of the sum; the sum is left in residual."""
        width = x.shape[-1]
        y, num_rows = torch.empty_like(x), x.numel() // width
        self._adding[x.dtype](
            (num_rows,), (block_for(num_vectors(x, width)),), y=y, x=x, residual=residual, weight=weight,
            stride=width, outer=num_rows, inner=1, width=width, eps=eps,
        )  # fmt: skip
        return y

    def covers_gate(self, gate_up: Tensor) -> bool:
        width = gate_up.shape[-1] // 2
        return gate_up.is_contiguous() and gate_up.shape[-1] % 2 == 0 and covers(gate_up, width) and gate_up.numel() > 0

    def gate(self, gate_up: Tensor) -> Tensor:
        """[..., 2I] -> [..., I]."""
        width = gate_up.shape[-1] // 2
        y = gate_up.new_empty((*gate_up.shape[:-1], width))
        num_blocks = -(-num_vectors(y, width) // GATE_BLOCK)
        self._gates[y.dtype]((y.numel() // width, num_blocks), (GATE_BLOCK,), y=y, gate_up=gate_up, width=width)
        return y


def covers(x: Tensor, width: int) -> bool:
    """Whether rows of this width can be read 16 bytes at a time."""
    return x.dtype in DTYPES and width * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0


def num_vectors(x: Tensor, width: int) -> int:
    return width * x.itemsize // 16


def block_for(vectors: int) -> int:
    """Threads for a row: two vectors each while there are enough threads."""
    return min(MAX_BLOCK, -(-vectors // 64) * 32)
