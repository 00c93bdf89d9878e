"""What a kernel may use on each compute capability, and the figures that static rooflines are made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A data sheet: shared memory in bytes, bandwidth in GB/s, clock in GHz. Every SM has 65536 registers and four
    schedulers that issue one warp instruction per cycle each."""

    arch: str
    name: str
    shared_per_sm: int
    shared_per_block: int
    warps_per_sm: int
    blocks_per_sm: int
    bandwidth: float
    num_sms: int
    clock: float
    mma_cycles: float  # of an SM for one mma.sync m16n8k16 of 16-bit elements with float sums

    @property
    def fma_warps(self) -> int:
        """Warp instructions of float arithmetic that an SM starts per cycle."""
        return 2 if self.arch == "sm_80" else 4

    def blocks(self, threads: int, registers: int, shared_bytes: int) -> int:
        """How many blocks of so many threads, registers a thread and bytes of shared memory one SM holds."""
        warps = -(-threads // 32)
        warp_registers = -(-registers * 32 // 256) * 256  # allocated in units of 256 a warp
        limits = [self.blocks_per_sm, self.warps_per_sm // warps, 65536 // max(warp_registers, 1) // warps]
        if shared_bytes > self.shared_per_block:
            return 0
        return min(*limits, self.shared_per_sm // (shared_bytes + 1024))  # 1 KiB of each block is the system's


KIB = 1024
DEVICES = {
    device.arch: device
    for device in (
        Device("sm_80", "A100 80GB", 164 * KIB, 163 * KIB, 64, 32, 2039, 108, 1.41, 2),
        Device("sm_86", "RTX 3090", 100 * KIB, 99 * KIB, 48, 16, 936, 82, 1.70, 8),
        Device("sm_89", "RTX 4090", 100 * KIB, 99 * KIB, 48, 24, 1008, 128, 2.52, 8),
        Device("sm_90", "H100 SXM", 228 * KIB, 227 * KIB, 64, 32, 3350, 132, 1.755, 1.6),
        Device("sm_100", "B200", 228 * KIB, 227 * KIB, 64, 32, 8000, 148, 1.9, 2),
        Device("sm_120", "RTX 5090", 100 * KIB, 99 * KIB, 48, 24, 1792, 170, 2.4, 8),
    )
}
