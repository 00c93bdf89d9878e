"""The op sets and the paged attention keep their contracts."""

from __future__ import annotations

import pytest
import torch

import blade_llama
import blade_native
import blade_qwen
from blade import ConfigError
from blade.contracts import Ops
from blade.testing import check_attention, check_ops, check_plugin
from blade_native import cpu_ops, cuda_ops, paged_attention
from blade_native.attention import PagedAttention
from blade_native.cpu import CpuOps, PackedLinear, can_pack
from blade_native.reference import TorchLinear, TorchOps
from blade_native.simd import build

DTYPES = [torch.float32, torch.bfloat16]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("module", [blade_native, blade_llama, blade_qwen], ids=lambda module: module.__name__)
def test_plugins_are_well_formed(module) -> None:
    check_plugin(module)


@pytest.mark.parametrize("ops", [TorchOps(), CpuOps(), cpu_ops(None)], ids=["torch", "onednn", "cpu"])
def test_ops_on_the_cpu(ops: Ops) -> None:
    check_ops(ops, DTYPES)


@pytest.mark.parametrize("ops", [CpuOps(), cpu_ops(None)], ids=["torch", "cpu"])
def test_attention_on_the_cpu(ops: Ops) -> None:
    check_attention(paged_attention, ops, [*DTYPES, torch.float16])


@needs_cuda
def test_ops_and_attention_on_cuda() -> None:
    check_ops(cuda_ops(None), DTYPES)
    check_attention(paged_attention, cuda_ops(None), DTYPES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="--device cpu"):
        cuda_ops(None)


def test_linears_are_packed_where_that_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.ones(8, 8)
    kind = PackedLinear if can_pack(torch.float32) else TorchLinear
    assert type(CpuOps().linear(weight, None)) is kind
    assert type(CpuOps().linear(weight.half(), None)) is TorchLinear
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert type(CpuOps().linear(weight, None)) is TorchLinear
    assert CpuOps().default_dtype() == torch.float32


def test_without_compiled_kernels_torch_serves_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "is_current", lambda level: False)
    ops = cpu_ops(None)
    assert type(ops) is CpuOps
    assert type(paged_attention(ops)) is PagedAttention
    assert "blade_native.simd.build" in caplog.text


def test_threads() -> None:
    before = torch.get_num_threads()
    try:
        CpuOps(1)
        assert torch.get_num_threads() == 1
        with pytest.raises(ConfigError, match="at least 1, not 0"):
            CpuOps(0)
    finally:
        torch.set_num_threads(before)
