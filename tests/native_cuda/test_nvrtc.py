"""Every kernel compiles for a device, within the limits declared beside it; and the tools that say so can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from blade_native.cuda.launch import SOURCES
from blade_native.emulator import sass
from blade_native.emulator.declared import Check, DeclarationError, Limits, checks, expand
from blade_native.emulator.devices import DEVICES
from blade_native.emulator.nvrtc import check
from blade_native.emulator.ptxas import Usage, parse_log

KERNELS = Path(__file__).parent / "kernels"


@pytest.mark.parametrize("path", sorted(SOURCES.glob("*.cu")), ids=lambda path: path.name)
def test_kernels_keep_their_limits(path: Path) -> None:
    rows = check(path, ["sm_90"], quick=True)
    assert rows, f"{path.name} declares no `// check:`"
    assert {str(row): row.violations() for row in rows if row.violations()} == {}


def test_an_exceeded_limit_is_named(tmp_path: Path) -> None:
    source = tmp_path / "greedy.cu"
    text = (KERNELS / "matmul.cu").read_text()
    source.write_text(text.replace("registers 40", "registers 16").replace("shared 3072", "shared 120000"))
    found = {row.device.arch: row.violations() for row in check(source, ["sm_80", "sm_86"], quick=True)}
    assert any("registers, not 16" in violation for violation in found["sm_80"])
    assert "1 blocks on an SM, not 16" in found["sm_80"]
    assert "0 blocks on an SM, not 16" in found["sm_86"]


def test_the_main_loop_is_found_in_machine_code() -> None:
    row = check(KERNELS / "matmul.cu", ["sm_90"], quick=True, with_sass=True)[0]
    if sass.nvdisasm() is None:
        pytest.skip("nvdisasm is not installed")
    loop = sass.main_loop(row.instructions)
    assert loop is not None
    assert loop.global_bytes % 512 == 0  # cp.async of 16 bytes a lane
    assert loop.cycles(row.device)["tensor"] > 0
    limit, pipe = loop.limit(row.device)
    assert limit == pytest.approx(loop.global_bytes / loop.cycles(row.device)[pipe] * 1.755 * 132)


LISTING = """
.text.f:
.L_x_1:
        /*0000*/                   LDG.E R0, [R2.64] ;
.L_x_2:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0030*/                   FADD R4, R4, R5 ;
        /*0040*/               @P0 BRA `(.L_x_3) ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
"""


def test_the_main_loop_is_an_innermost_one() -> None:
    loop = sass.main_loop(sass.parse(LISTING)["f"])
    assert loop is not None
    assert [one.opcode for one in loop.body] == ["LDG.E.128", "BRA"]
    assert loop.global_bytes == 512
    assert sass.main_loop(sass.parse(LISTING.replace("LDG", "LDS"))["f"]) is None


def test_ptxas_reports_are_read() -> None:
    log = (
        "ptxas info    : Function properties for _Z1f\n"
        "ptxas         .     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 1088 bytes smem, 384 bytes cmem[0]\n"
    )
    usage = parse_log(log)["_Z1f"]
    assert usage == Usage(40, 16, 8, 1088)
    assert usage.violations(Limits(64, registers=40), DEVICES["sm_90"]) == [
        "spills 16 bytes",
        "8 bytes of local memory, not 0",
    ]


def test_declarations_expand_and_override() -> None:
    assert expand("f<{a, b}, {1, 2}>") == ["f<a, 1>", "f<a, 2>", "f<b, 1>", "f<b, 2>"]
    one, other = checks("// check: f<{a, b}> | threads 64 | blocks 4 | blocks@86,89 2 | arch 86,90\n")
    assert one == Check(
        "f<a>", True, Limits(64, blocks=4), (("sm_86", "blocks", 2), ("sm_89", "blocks", 2)), ("sm_86", "sm_90")
    )
    assert not other.first
    assert one.on("sm_80") is None
    assert one.on("sm_86") == Limits(64, blocks=2)
    assert one.on("sm_90") == Limits(64, blocks=4)


@pytest.mark.parametrize("line", ["f | registers 4", "f | threads 64 | colour 3", "f | threads many"])
def test_a_declaration_that_cannot_be_read_is_refused(line: str) -> None:
    with pytest.raises(DeclarationError):
        checks(f"// check: {line}\n")


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [(128, 32, 0, 16), (128, 144, 0, 3), (128, 32, 96 << 10, 2), (1024, 64, 0, 1), (128, 32, 228 << 10, 0)],
)
def test_occupancy_follows_the_scarcest_resource(threads: int, registers: int, shared: int, blocks: int) -> None:
    assert DEVICES["sm_90"].blocks(threads, registers, shared) == blocks
