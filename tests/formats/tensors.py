"""Weights made by hand, of formats whose tools are not at hand or write only one of their variants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """[R, C] of `bits` each -> [R, C bits / 32] int32, number by number and bit by bit."""
    rows = []
    for row in numbers.tolist():
        whole = sum(number << (bits * i) for i, number in enumerate(row))
        size = len(row) * bits // 8
        rows.append(list(whole.to_bytes(size, "little")))
    return torch.tensor(rows, dtype=torch.uint8).view(torch.int32)


def gptq(bits: int, group: int, n: int = 64, k: int = 128, less_one: int = 1, zero: int | None = None) -> Any:
    """(tensors under "a", W [N, K] float32) of GPTQ, symmetric if `zero` is given."""
    q = torch.randint(2**bits, (n, k), generator=seeded())
    num_groups = -(-k // group)
    zeros = (
        torch.randint(1, 2**bits, (n, num_groups), generator=seeded(1))
        if zero is None
        else torch.full((n, num_groups), zero)
    )
    scales = torch.rand(n, num_groups, generator=seeded(2)).half()
    spread = torch.arange(k) // group
    tensors = {
        "a.qweight": pack(q, bits).T.contiguous(),
        "a.qzeros": pack(zeros.T - less_one, bits),
        "a.scales": scales.T.contiguous(),
    }
    return tensors, (q - zeros[:, spread]) * scales.float()[:, spread]


def fp8(n: int, k: int, block: tuple[int, int]) -> Any:
    """(weight, scales, W): 8-bit floats with a scale per block."""
    q = torch.randn(n, k, generator=seeded()).to(torch.float8_e4m3fn)
    shape = -(-n // block[0]), -(-k // block[1])
    scales = torch.rand(shape, generator=seeded(1))
    rows, columns = torch.arange(n) // block[0], torch.arange(k) // block[1]
    return q, scales, q.float() * scales[rows][:, columns]
