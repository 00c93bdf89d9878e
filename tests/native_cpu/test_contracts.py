"""The kernels of every level keep the contracts that all devices keep."""

from __future__ import annotations

import pytest
import torch

from blade.testing import check_attention, check_ops
from blade_native import paged_attention
from blade_native.simd.ops import SimdOps

DTYPES = [torch.float32, torch.bfloat16]


def test_ops_keep_their_contract(ops: SimdOps) -> None:
    check_ops(ops, DTYPES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_keeps_its_contract(ops: SimdOps, dtype: torch.dtype) -> None:
    check_attention(paged_attention, ops, [dtype])
