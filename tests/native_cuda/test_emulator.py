"""The emulator itself: collectives, barriers, atomics, poison, order, reports."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from blade_native.cuda.launch import Launcher, import_cupy
from blade_native.emulator import emulated
from blade_native.emulator.kernel_double import EmulatorError

if TYPE_CHECKING:
    from blade_native.cuda.launch import Module

SOURCE = Path(__file__).parent / "kernels/probes.cu"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
our_traps = pytest.mark.skipif(
    bool(os.environ.get("BLADE_EMULATOR_SANITIZE")), reason="the sanitizers report and end the process themselves"
)
RESULTS = ((320, torch.int32), (5, torch.int32), (7 * 32, torch.float32))
NAMES = ["collectives", "barriers", "unwritten", "order", "divide", "deadlock", "conversions"]


@pytest.fixture(scope="module")
def probes(launcher: Launcher) -> Module:
    return launcher.load(SOURCE, NAMES)


def ints(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32)


def test_collectives_do_what_the_manual_says(probes: Module) -> None:
    x, out = torch.arange(32, dtype=torch.int32), ints(320)
    probes.kernel("collectives")((1,), (32,), out=out, x=x)
    rows = out.view(10, 32).tolist()
    lanes = range(32)
    assert rows[0] == [(lane + 1) % 32 for lane in lanes]
    assert rows[1] == [lane - 4 if lane % 8 >= 4 else lane for lane in lanes]
    assert rows[2] == [lane + 4 if lane % 8 < 4 else lane for lane in lanes]
    assert rows[3] == [lane ^ 16 for lane in lanes]
    assert rows[4] == [sum(1 << lane for lane in range(0, 31, 3))] * 32
    assert rows[5] == [3] * 32
    assert rows[6] == [5] * 30 + [2] * 2
    assert rows[7] == [sum(lanes)] * 32
    assert rows[8] == [31] * 32
    assert rows[9] == [7 - lane for lane in range(8)] + [0] * 24


def test_barriers_vote_and_atomics_count(probes: Module) -> None:
    out = ints(5)
    probes.kernel("barriers")((3,), (64,), out=out, x=torch.arange(64, dtype=torch.int32))
    total = 3 * sum(range(64))
    assert out.tolist() == [total, 63, 3, 1 + 2 + 4 * 32, total]


def test_unwritten_shared_memory_is_poison_in_every_block(probes: Module) -> None:
    out = ints(128)
    probes.kernel("unwritten", shared_bytes=128)((2,), (32,), out=out, x=None)
    assert (out == -1).all()


def test_a_seed_permutes_blocks_and_threads_and_repeats(probes: Module) -> None:
    def order(seed: int) -> list[int]:
        out = ints(1 + 4 * 64)
        emulated(seed=seed).load(SOURCE, NAMES).kernel("order")((4,), (64,), out=out, x=None)
        return out[1:].tolist()

    assert order(0) == list(range(256))
    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(256))
    assert {i // 64 for i in order(1)[:64]} != set(range(4))  # one block at a time, still


@our_traps
def test_a_division_by_zero_is_reported_with_its_place(probes: Module) -> None:
    with pytest.raises(
        EmulatorError, match=r"block \(0,0,0\) thread \(0,0,0\): integer division by zero at probes.cu:"
    ):
        probes.kernel("divide")((1,), (32,), out=ints(32), x=torch.arange(32, dtype=torch.int32))


def test_a_deadlock_names_who_waits_where(probes: Module) -> None:
    with pytest.raises(EmulatorError) as caught:
        probes.kernel("deadlock")((1,), (64,), out=ints(64), x=None)
    assert "__syncthreads at probes.cu:" in str(caught.value)


@our_traps
def test_the_emulator_works_after_a_report(probes: Module) -> None:
    with pytest.raises(EmulatorError):
        probes.kernel("divide")((1,), (32,), out=ints(32), x=ints(32))
    out = ints(32)
    probes.kernel("divide")((1,), (32,), out=out, x=torch.full((32,), 3, dtype=torch.int32))
    assert (out == 1).all()


def test_conversions_round_as_torch_does(probes: Module) -> None:
    x = torch.tensor([0.0, 1.0, -2.5, 0.3, 100.7, 1e-3, 447.0, -449.0, 126.5, 300.0])
    out = torch.empty(7, len(x))
    probes.kernel("conversions")((1,), (32,), out=out, x=x, n=len(x))
    assert torch.equal(out[0], x)
    assert torch.equal(out[1], x.half().float())
    assert torch.equal(out[2], x.bfloat16().float())
    assert torch.equal(out[3], x.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    assert torch.equal(out[4], x.to(torch.float8_e5m2).float())
    assert torch.equal(out[5], x.round().clamp(-127, 127))
    assert torch.allclose(out[6], torch.exp2(x))


@needs_cuda
def test_a_device_agrees_with_the_emulator(launcher: Launcher) -> None:
    device = Launcher(import_cupy(), torch.device("cuda"))
    x, floats = torch.arange(32, dtype=torch.int32), torch.linspace(-500, 500, 32)
    found = []
    for each in (launcher, device):
        probes = each.load(SOURCE, ["collectives", "barriers", "conversions"])
        ints_x, floats_x = x.to(each.device), floats.to(each.device)
        lanes, block, converted = (torch.zeros(n, dtype=d, device=each.device) for n, d in RESULTS)
        probes.kernel("collectives")((1,), (32,), out=lanes, x=ints_x)
        probes.kernel("barriers")((3,), (32,), out=block, x=ints_x)
        probes.kernel("conversions")((1,), (32,), out=converted, x=floats_x, n=32)
        found.append([lanes.cpu(), block.cpu(), converted.cpu()])
    for emulated_result, device_result in zip(*found, strict=True):
        torch.testing.assert_close(emulated_result, device_result)
