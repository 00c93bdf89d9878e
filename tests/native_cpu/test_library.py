"""Which library is loaded, what is said when there is none, and the pool that the kernels run on."""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from blade import ConfigError
from blade_native.simd import build
from blade_native.simd.library import (
    CPagedKV,
    CRounding,
    CStep,
    Library,
    Unavailable,
    check_status,
    load,
    runnable_levels,
)
from blade_native.simd.limits import peak_flops
from blade_native.simd.linear import pack_dense
from blade_native.simd.memory import HUGE_PAGE, REGION, Regions, allocate
from blade_native.simd.ops import SimdOps


def test_the_best_level_is_loaded_unless_one_is_named(library: Library) -> None:
    assert load({}).level == runnable_levels()[0]
    assert load({"BLADE_CPU_ISA": "portable"}).level == "portable"


def test_a_level_that_cannot_run_is_refused_before_it_is_loaded(library: Library) -> None:
    with pytest.raises(ConfigError, match=r"BLADE_CPU_ISA=sse9 cannot run here\. This machine runs: .*portable"):
        load({"BLADE_CPU_ISA": "sse9"})


def test_missing_and_stale_libraries_are_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "LIBRARIES", tmp_path)
    with pytest.raises(Unavailable, match=r"not been compiled.*python -m blade_native\.simd\.build"):
        load({})
    build.library_path("portable").write_bytes(b"built from other sources")
    with pytest.raises(Unavailable, match="older than their sources"):
        load({})


def test_kernels_of_a_lesser_machine_run_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, library: Library
) -> None:
    portable = build.library_path("portable")
    if runnable_levels() == ["portable"]:
        pytest.skip("this machine runs portable kernels alone")
    monkeypatch.setattr(build, "LIBRARIES", tmp_path)
    build.library_path("portable").symlink_to(portable)
    assert load({}).level == "portable"
    assert "compiled on a machine without" in caplog.text


def test_where_there_is_no_room_for_scratch_python_is_told(library: Library) -> None:
    """And the process goes on."""
    absurd, kv, step = 1 << 50, CPagedKV(), CStep()
    rounding = CRounding(bits=4, group=32, n=1, k=absurd, block=128)
    with pytest.raises(MemoryError):
        check_status(library.round(ctypes.byref(rounding), 2))
    with pytest.raises(MemoryError):
        library.attend_slots(ctypes.addressof(kv), None, 0, 1.0, None, absurd, 1, None, 2)
    with pytest.raises(MemoryError):
        library.keep_index_keys(0, ctypes.addressof(step), None, 0, absurd, None, 0.0, None, 0, 4, 16, None, 2)
    with pytest.raises(MemoryError):
        library.draw(None, 1, absurd, *[None] * 7, 2)
    with pytest.raises(MemoryError):
        library.logprobs(None, 1, absurd, 5, None, None, None, 2)


def test_which_levels_are_compiled() -> None:
    if (cxx := build.compiler()) is None:
        pytest.skip("there is no C++ compiler")
    assert build.wanted_levels(cxx, {}) == list(dict.fromkeys([build.best_level(cxx), "portable"]))
    assert build.wanted_levels(cxx, {"BLADE_CPU_LEVELS": "all"}) == list(build.levels())
    with pytest.raises(build.CompileError, match=r"\$BLADE_CPU_LEVELS has 'sse9'; there are all, .*portable"):
        build.wanted_levels(cxx, {"BLADE_CPU_LEVELS": "sse9"})


def test_the_sources_are_sound_for_the_best_level_too() -> None:
    if (cxx := build.compiler()) is None:
        pytest.skip("there is no C++ compiler")
    level, flags = next(iter(build.levels().items()))
    if build.is_current(level):
        pytest.skip(f"{level} is compiled")
    commands = [
        [cxx, *build.FLAGS, *flags, '-DBLADE_SOURCE_HASH=""', "-fsyntax-only", str(source)]
        for source in build.SOURCES.glob("*.cpp")
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build.run, commands))  # raises CompileError


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "LIBRARIES", tmp_path)
    with pytest.raises(build.CompileError, match=r"false .*\.cpp"):
        build.build("false")
    assert not list(tmp_path.iterdir())


def test_large_buffers_are_aligned_zeroed_and_outlive_their_mapping() -> None:
    buffer = allocate(3 * HUGE_PAGE + 5)
    assert buffer.data_ptr() % HUGE_PAGE == 0
    assert buffer.numel() == 3 * HUGE_PAGE + 5
    assert not buffer.any()
    tail = buffer[-5:].fill_(7)
    del buffer
    assert tail.tolist() == [7] * 5


def test_small_buffers_lie_side_by_side_and_never_overlap() -> None:
    regions = Regions()
    buffers = [regions.allocate(size) for size in (100, 64, REGION // 3, REGION // 3, REGION // 3, REGION)]
    assert buffers[1].data_ptr() == buffers[0].data_ptr() + 128
    for i, buffer in enumerate(buffers):
        assert not buffer.any()
        buffer.fill_(i + 1)
    assert all((buffer == i + 1).all() for i, buffer in enumerate(buffers))


@pytest.mark.parametrize("rows", [3, 14, 40])
@pytest.mark.parametrize("threads", [1, 2, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(
    library: Library, dtype: torch.dtype, threads: int, rows: int
) -> None:
    weight, x = torch.randn(1000, 512).to(dtype), torch.randn(rows, 512).to(dtype)
    want = pack_dense(library, weight, None, 1)(x)
    torch.testing.assert_close(want, x @ weight.T, rtol=1e-2, atol=0.5)
    torch.testing.assert_close(pack_dense(library, weight, None, threads)(x), want, rtol=0, atol=0)


def test_callers_on_several_threads_do_not_disturb_each_other(ops: SimdOps) -> None:
    weight, x = torch.randn(96, 512), torch.randn(30, 512)
    linear = ops.linear(weight, None)
    want, wrong = linear(x), []

    def call() -> None:
        wrong.extend(i for i in range(200) if not torch.equal(linear(x), want))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.parametrize(("bits", "products"), [(32, 1), (16, 2), (8, 4)])
def test_the_peak_counts_what_is_multiplied(library: Library, bits: int, products: int) -> None:
    zeros, ones = allocate(8192).zero_(), allocate(8192).fill_(1)
    count = library.multiply(zeros.data_ptr(), bits, 10, 2)
    assert count > 0
    assert count % (10 * 2 * products) == 0
    assert library.multiply(zeros.data_ptr(), bits, 30, 2) == 3 * count
    assert library.multiply(ones.data_ptr(), bits, 10, 2) == -1  # what it says was multiplied is looked at
    assert peak_flops(library, bits, 2, seconds=0.001) > 0
