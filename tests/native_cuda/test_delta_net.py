"""The gated delta rule's decode step: the torch twin against transformers, the kernel against the twin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from blade_native.cuda.ops import CudaOps
from blade_native.reference import TorchOps, delta_step

if TYPE_CHECKING:
    from torch import Tensor

    from blade_native.cuda.launch import Launcher

pytestmark = pytest.mark.timeout(600)  # whoever comes first waits for the compiler
NUM_SEQS, NUM_K_HEADS, NUM_V_HEADS, VALUE_DIM, NUM_SLOTS = 3, 2, 4, 64, 5


@pytest.fixture(scope="module")
def ops(launcher: Launcher) -> CudaOps:
    return CudaOps(TorchOps(), launcher)


def make(dtype: torch.dtype, key_dim: int) -> dict[str, Tensor]:
    """The second sequence is padding. q, k and v are slices of one projection, as in a model."""
    generator = torch.Generator().manual_seed(key_dim)
    widths = (NUM_K_HEADS * key_dim, NUM_K_HEADS * key_dim, NUM_V_HEADS * VALUE_DIM)
    q, k, v = torch.randn(NUM_SEQS, sum(widths), generator=generator).to(dtype).split(widths, dim=1)
    return {
        "q": q.unflatten(1, (NUM_K_HEADS, key_dim)),
        "k": k.unflatten(1, (NUM_K_HEADS, key_dim)),
        "v": v.unflatten(1, (NUM_V_HEADS, VALUE_DIM)),
        "g": -2 * torch.rand(NUM_SEQS, NUM_V_HEADS, generator=generator),
        "beta": torch.rand(NUM_SEQS, NUM_V_HEADS, generator=generator),
        "state": torch.randn(NUM_SLOTS, NUM_V_HEADS, key_dim, VALUE_DIM, generator=generator),
        "slots": torch.tensor([4, -1, 1], dtype=torch.int32),
    }


@pytest.mark.parametrize(("dtype", "key_dim"), [(torch.bfloat16, 128), (torch.float32, 64), (torch.float16, 256)])
def test_the_kernel_is_its_twin(ops: CudaOps, dtype: torch.dtype, key_dim: int) -> None:
    given = make(dtype, key_dim)
    state = given["state"].clone()
    before = len(ops.launcher.cupy.launches)
    out = ops.delta_step(**(given | {"state": state}))
    assert len(ops.launcher.cupy.launches) == before + 1
    twin_state = given["state"].clone()
    expected = delta_step(**(given | {"state": twin_state}))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(state, twin_state, rtol=1e-6, atol=1e-6)
    assert not out[1].any()
    assert torch.equal(state[[0, 2, 3]], given["state"][[0, 2, 3]])


def test_the_twin_is_transformers_rule() -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    given, live = make(torch.bfloat16, 128), [0, 2]
    q, k, v, g, beta = (given[name][live].unsqueeze(1) for name in ("q", "k", "v", "g", "beta"))
    q, k = (
        x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k)
    )  # which older releases leave to others
    slots = given["slots"][live].long()
    expected, expected_state = torch_recurrent_gated_delta_rule(
        q, k, v, g, beta, given["state"][slots], output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    out = delta_step(**given)
    torch.testing.assert_close(out[live], expected[:, 0])
    torch.testing.assert_close(given["state"][slots], expected_state)


def test_what_is_not_covered_is_torchs(ops: CudaOps) -> None:
    given = make(torch.bfloat16, 96)
    before = len(ops.launcher.cupy.launches)
    expected = delta_step(**(given | {"state": given["state"].clone()}))
    assert torch.equal(ops.delta_step(**given), expected)
    assert len(ops.launcher.cupy.launches) == before
