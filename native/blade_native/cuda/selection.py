"""Host side of select.cu and delta_net.cu."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blade_native.cuda.launch import CUDA_NAMES
from blade_native.cuda.rows import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

    from blade_native.cuda.launch import Launcher

BLOCK, TILE, MAX_K = 256, 4096, 1024
DELTA_BLOCK, DELTA_COLUMNS = 128, 32
KEY_DIMS = (64, 128, 256)
PASSES = [(first, last) for first in (True, False) for last in (True, False)]


class SelectKernels:
    """Over rows of logits [R, V] float32, contiguous within a row."""

    def __init__(self, launcher: Launcher) -> None:
        module = launcher.load("select.cu", ["tile_peaks", "merge_peaks", *map(top_k, PASSES)])
        self._tile_peaks = module.kernel("tile_peaks")
        self._merge_peaks = module.kernel("merge_peaks")
        self._passes = {key: module.kernel(top_k(key)) for key in PASSES}

    def covers(self, logits: Tensor) -> bool:
        return logits.dtype == torch.float32 and logits.dim() == 2 and logits.stride(1) == 1 and logits.numel() > 0

    def peaks(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As TorchOps.peaks."""
        (num_rows, width), device = logits.shape, logits.device
        tiles = -(-width // TILE)
        keys = torch.empty(num_rows, tiles, dtype=torch.int64, device=device)
        masses = torch.empty(num_rows, tiles, 2, device=device)
        self._tile_peaks(
            (tiles, num_rows), (BLOCK,), logits=logits, keys=keys, masses=masses, stride=logits.stride(0), width=width
        )
        ids = torch.empty(num_rows, dtype=torch.int64, device=device)
        peaks, log_sums = torch.empty(2, num_rows, device=device)
        self._merge_peaks(
            (num_rows,), (BLOCK,), keys=keys, masses=masses, ids=ids, peaks=peaks, log_sums=log_sums, tiles=tiles
        )
        return ids, peaks, log_sums

    def top_k(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As reference.top_k, 1 <= k <= MAX_K and at most V."""
        (num_rows, width), device = logits.shape, logits.device
        values = torch.empty(num_rows, k, device=device)
        ids = torch.empty(num_rows, k, dtype=torch.int64, device=device)
        keys: Tensor | None = None
        while True:
            tiles = -(-width // TILE)
            last = tiles == 1
            found = None if last else torch.empty(num_rows, tiles, k, dtype=torch.int64, device=device)
            self._passes[keys is None, last](
                (tiles, num_rows), (BLOCK,), logits=logits, keys=keys, to=found, values=values, ids=ids,
                stride=logits.stride(0), width=width, k=k,
            )  # fmt: skip
            if last:
                return values, ids
            keys, width = found, tiles * k


def top_k(key: tuple[bool, bool]) -> str:
    first, last = key
    return f"top_k<{str(first).lower()}, {str(last).lower()}>"


class DeltaKernels:
    """The recurrent step of gated delta networks, for the key dims of KEY_DIMS."""

    def __init__(self, launcher: Launcher, dtype: torch.dtype, key_dim: int) -> None:
        name = f"delta_step<{CUDA_NAMES[dtype]}, {key_dim}>"
        self._step = launcher.load("delta_net.cu", [name]).kernel(name)

    @staticmethod
    def covers(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> bool:
        heads = all(x.dtype == q.dtype and x[:1].is_contiguous() for x in (q, k, v))
        dims = q.shape[-1] in KEY_DIMS and v.shape[-1] % DELTA_COLUMNS == 0 and q.shape[1] == k.shape[1]
        return heads and dims and q.dtype in DTYPES and state.dtype == torch.float32 and state.is_contiguous()

    def step(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, slots: Tensor) -> Tensor:
        """As reference.delta_step."""
        num_seqs, num_v_heads, value_dim = v.shape
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        self._step(
            (value_dim // DELTA_COLUMNS, num_v_heads, num_seqs), (DELTA_BLOCK,), out=out, q=q, k=k, v=v,
            g=g.contiguous(), beta=beta.contiguous(), state=state, slots=slots, q_stride=q.stride(0),
            k_stride=k.stride(0), v_stride=v.stride(0), num_k_heads=k.shape[1], num_v_heads=num_v_heads,
        )  # fmt: skip
        return out
