"""How the CUDA op set is chosen, and what it does with what its kernels do not cover."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import blade_native.cuda
from blade import CaptureOptions, ConfigError, Float8Weight, GroupedWeight
from blade.nn import dequantize
from blade.testing import FakeModel
from blade_native import cuda_ops, paged_attention
from blade_native.attention import PagedAttention
from blade_native.cuda import CudaOps, launch
from blade_native.cuda.attention import CudaAttention
from blade_native.cuda.experts import PackedExperts
from blade_native.cuda.linear import PackedLinear
from blade_native.cuda.torch_ops import TorchCudaOps
from blade_native.reference import TorchLinear, TorchOps

from .test_linear import make_weight

if TYPE_CHECKING:
    from blade_native.cuda.launch import Launcher

pytestmark = pytest.mark.timeout(600)  # whoever comes first waits for the compiler


class Base(TorchOps):
    """Stands in for a device."""

    name = "cuda, torch kernels"

    def default_dtype(self) -> torch.dtype:
        return torch.bfloat16

    def require_capability(self, major: int, minor: int) -> None: ...


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch, launcher: Launcher) -> None:
    """The CPU passes for a device, the emulator for CuPy."""
    monkeypatch.setattr(blade_native.cuda, "TorchCudaOps", Base)
    monkeypatch.setattr(launch, "import_cupy", lambda: launcher.cupy)


@pytest.mark.emulator
@pytest.mark.usefixtures("on_a_device")
def test_kernels_are_chosen() -> None:
    ops = cuda_ops(None)
    assert isinstance(ops, CudaOps)
    assert ops.default_dtype() == torch.bfloat16
    assert ops.available_memory() > 0
    assert isinstance(paged_attention(ops), CudaAttention)


@pytest.mark.emulator
@pytest.mark.usefixtures("on_a_device")
def test_without_cupy_torch_serves_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> None:
        raise ConfigError("CuPy is not installed.")

    monkeypatch.setattr(launch, "import_cupy", missing)
    ops = cuda_ops(None)
    assert type(ops) is Base
    assert type(paged_attention(ops)) is PagedAttention
    assert "CuPy is not installed. Serving on torch" in caplog.text


@pytest.mark.emulator
@pytest.mark.usefixtures("on_a_device")
def test_where_nothing_compiles_torch_serves_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Launcher, path: str, expressions: object) -> None:
        raise RuntimeError(f"{path}: no headers")

    monkeypatch.setattr(launch.Launcher, "load", refuse)
    assert type(cuda_ops(None)) is Base
    assert "rows.cu: no headers Serving on torch" in caplog.text


def test_an_old_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ConfigError, match=r"capability 7\.5, our kernels need 8\.0"):
        TorchCudaOps().require_capability(8, 0)


@pytest.fixture(scope="module")
def ops(launcher: Launcher) -> CudaOps:
    return CudaOps(Base(), launcher)


def test_quantised_weights(ops: CudaOps) -> None:
    weight = make_weight(4, 128, "SYMMETRIC", n=32, k=128)
    linear = ops.quantized_linear([weight], torch.ones(32, dtype=torch.bfloat16))
    assert isinstance(linear, PackedLinear)
    x = torch.eye(128, dtype=torch.bfloat16)[:8]
    expected = dequantize(weight, torch.float32)[:, :8].T + 1
    torch.testing.assert_close(linear(x, torch.float32), expected, rtol=0, atol=1e-6)
    rows = ops.embedding_of(linear, torch.bfloat16)
    assert rows is not None
    assert torch.equal(rows(torch.tensor([3])), dequantize(weight, torch.bfloat16)[3:4])
    twice = ops.quantized_linear([weight, weight], None)
    assert isinstance(twice, PackedLinear)
    assert len(twice.parts) == 1  # one launch
    torch.testing.assert_close(twice(x, torch.float32), (expected - 1).repeat(1, 2), rtol=0, atol=1e-6)
    mixed = ops.quantized_linear([weight, make_weight(8, 64, "SYMMETRIC", n=32, k=128)], None)
    assert ops.embedding_of(mixed, torch.bfloat16) is None


class Waits(TorchDispatchMode):
    """Counts what would wait for a device: of these ops the default mixture has some per expert."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names += [name] * (name in ("nonzero", "_unique2", "index", "_local_scalar_dense", "bincount"))
        return func(*args, **(kwargs or {}))


def test_a_mixture_of_experts_waits_once_and_is_not_recorded(
    launcher: Launcher, caplog: pytest.LogCaptureFixture
) -> None:
    ops = CudaOps(Base(), launcher)
    draw = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(5, 32, 24, generator=draw), torch.randn(5, 24, 16, generator=draw)
    linears = [[ops.linear(weight, None) for weight in weights] for weights in (gate_up, down)]
    x, weights = torch.randn(7, 24, generator=draw), torch.rand(7, 3, generator=draw)
    ids = torch.rand(7, 4, generator=draw).argsort(1)[:, :3]  # the last expert is never chosen
    experts, default = ops.experts(*linears), TorchOps().experts(*linears)
    with Waits() as waits:
        found = experts(x, ids, weights)
    assert not waits.names
    with Waits() as waits:
        torch.testing.assert_close(found, default(x, ids, weights))
    assert "nonzero" in waits.names
    assert experts(x[:0], ids[:0], weights[:0]).shape == (0, 24)
    alone = [
        default(x * share, one, torch.ones(7, 1))
        for share, one in zip(weights.split(1, 1), ids.split(1, 1), strict=True)
    ]
    torch.testing.assert_close(experts(x, ids, weights, weigh_input=True), sum(alone))
    options = CaptureOptions(batch_sizes=(1,), max_context=16)
    with caplog.at_level(logging.WARNING):
        ops.capture(FakeModel(), [], options)
    assert "which experts are chosen" in caplog.text


def test_plain_experts_wait_for_nothing_and_are_recorded(launcher: Launcher) -> None:
    ops, draw = CudaOps(Base(), launcher), torch.Generator().manual_seed(0)
    matrices = torch.randn(5, 32, 24, generator=draw).bfloat16(), torch.randn(5, 24, 16, generator=draw).bfloat16()
    linears = [[ops.linear(weight, None) for weight in weights] for weights in matrices]
    x, weights = torch.randn(7, 24, generator=draw).bfloat16(), torch.rand(7, 3, generator=draw)
    ids = torch.rand(7, 4, generator=draw).argsort(1)[:, :3]  # the last expert is never chosen
    experts = ops.experts(*linears)
    with Waits() as waits:
        found = experts(x, ids, weights)
    assert not waits.names
    default = TorchOps().experts(*([TorchLinear(weight, None) for weight in part] for part in matrices))
    for weigh_input in (False, True):
        found, expected = experts(x, ids, weights, weigh_input), default(x, ids, weights, weigh_input)
        torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max()) / 50)
    assert experts(x[:0], ids[:0], weights[:0]).shape == (0, 24)
    one = linears[0][3]
    assert torch.equal(one(x), x @ matrices[0][3].T)  # it shares the stack's memory
    assert not ops._waits


@pytest.mark.parametrize(("bits", "group", "kind"), [(4, 32, "MINIMA"), (8, 64, "SYMMETRIC")])
def test_packed_experts_wait_for_nothing_where_tokens_are_few(
    ops: CudaOps, bits: int, group: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(0)

    def weights_of(n: int, k: int) -> list[GroupedWeight]:
        """Of five experts, differing."""
        first = make_weight(bits, group, kind, n=n, k=k)
        return [replace(first, q=first.q.roll(i, 0), scales=first.scales.roll(i, 1)) for i in range(5)]

    gate_up = [list(pair) for pair in zip(weights_of(64, 128), weights_of(64, 128)[::-1], strict=True)]
    linears = [
        [of.quantized_linear(parts, None) for parts in matrices]
        for of in (ops, TorchOps())
        for matrices in (gate_up, [[down] for down in weights_of(128, 64)])
    ]
    x, weights = torch.randn(7, 128, generator=draw).bfloat16(), torch.rand(7, 3, generator=draw)
    ids = torch.rand(7, 4, generator=draw).argsort(1)[:, :3]
    experts, default = ops.experts(*linears[:2]), TorchOps().experts(*linears[2:])
    assert not ops._waits
    for most in (64, 3):
        monkeypatch.setattr(PackedExperts, "MOST_TOKENS", most)
        with Waits() as waits:
            experts(x, ids, weights)
        assert not waits.names
        for weigh_input in (False, True):
            expected = default(x, ids, weights, weigh_input).float()
            error = (experts(x, ids, weights, weigh_input).float() - expected).abs().max() / expected.abs().max()
            assert error < 0.02
    assert experts(x[:0], ids[:0], weights[:0]).shape == (0, 128)


def test_formats_without_a_kernel_become_dense(ops: CudaOps) -> None:
    weight = make_weight(4, 32, "ZEROS", k=96)
    linear = ops.quantized_linear([weight], None)
    assert isinstance(linear, TorchLinear)
    assert torch.equal(linear.weight, dequantize(weight, torch.bfloat16))
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(0)).half()
    torch.testing.assert_close(linear(x), x @ dequantize(weight, torch.bfloat16).half().T)
    fp8 = Float8Weight(torch.ones(16, 96).to(torch.float8_e4m3fn), torch.ones(1, 1), (16, 96))
    assert isinstance(ops.quantized_linear([fp8], None), TorchLinear)
    ordered = replace(make_weight(4, 32, "SYMMETRIC", n=32, k=128), order=torch.arange(127, -1, -1))
    assert isinstance(ops.quantized_linear([ordered], None), TorchLinear)


def test_numbers_that_the_kernels_cannot_hold(ops: CudaOps, caplog: pytest.LogCaptureFixture) -> None:
    weight = make_weight(4, 128, "SYMMETRIC", codes=True, n=32, k=128)
    assert weight.block_scales is not None
    weight.block_scales.fill_(6e4)
    assert isinstance(ops.quantized_linear([weight], None), TorchLinear)
    assert "A linear becomes dense: scales: a group's value is beyond float16." in caplog.text
    nan = torch.full((16, 128), float("nan")).to(torch.float8_e4m3fn)
    assert isinstance(ops.quantized_linear([Float8Weight(nan, torch.ones(1, 1), (16, 128))], None), TorchLinear)
    with pytest.raises(ValueError, match="scales have shape"):
        ops.quantized_linear([Float8Weight(nan, torch.ones(3, 1), (16, 128))], None)


def test_a_format_that_does_not_compile_becomes_dense(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ops = CudaOps(Base(), launcher)
    tried = []

    def refuse(chosen: object, dtype: torch.dtype) -> None:
        tried.append(chosen)
        raise RuntimeError("ptxas is unwell")

    monkeypatch.setattr(ops._linears, "get", refuse)
    for _ in range(2):
        assert isinstance(ops.quantized_linear([make_weight(8, 64, "SYMMETRIC")], None), TorchLinear)
    assert len(tried) == 1
    assert "ptxas is unwell" in caplog.text
    fp8 = Float8Weight(torch.ones(16, 64).to(torch.float8_e4m3fn), torch.ones(1, 1), (16, 64))
    assert isinstance(ops.quantized_linear([fp8], None), TorchLinear)
