"""The CUDA kernels beside torch's and beside what the memory allows: ``python benchmarks/gpu_kernels.py``.

A row gives microseconds per call as the median of the turns, and GB/s of the bytes that a call has to move at least, as
measured and as a part of the device's bandwidth by its data sheet (`--bandwidth` gives another). Weights and caches
rotate through copies larger than the L2 cache. Where there is no device nothing is measured, and the program says so.
``--dry-run`` runs every case once through the emulator, in small, to see that the program works.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from blade import Batch, GroupedWeight, KVSpec
from blade.contracts import Ops
from blade_native import cuda_ops, paged_attention
from blade_native.attention import PagedAttention
from blade_native.cuda import CudaOps
from blade_native.emulator import emulated
from blade_native.emulator.devices import DEVICES
from blade_native.reference import TorchOps

DTYPE = torch.bfloat16
COLD_BYTES = 256 << 20  # more than any L2
Call = Callable[[], object]


@dataclass
class Case:
    """One row: contenders as copies of a call that take turns, and the bytes a call has to move at least."""

    name: str
    num_bytes: int
    contenders: dict[str, list[Call]]


@dataclass(frozen=True)
class Size:
    """Shapes of a model: Qwen2.5-7B's, or small ones for the dry run."""

    hidden: int = 3584
    intermediate: int = 18944
    heads: tuple[int, int] = (28, 4)
    head_dim: int = 128
    vocab: int = 152064
    batches: tuple[int, ...] = (1, 16, 64)
    contexts: tuple[int, ...] = (1024, 8192)
    copies: bool = True

    def num_copies(self, num_bytes: int) -> int:
        return max(1, COLD_BYTES // num_bytes) if self.copies else 1


SMALL = Size(256, 512, (8, 2), 64, 4096, (2,), (40,), copies=False)


def random(ops: Ops, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=ops.device).to(DTYPE)


def row_cases(ops: Ops, base: Ops, size: Size, rows: int) -> Iterator[Case]:
    n, width = size.hidden, 2 * size.intermediate
    weight = random(ops, n)

    def case(name: str, num_bytes: int, call: Callable[[Ops, int], object], copies: int) -> Case:
        both = {"own": ops, "torch": base}
        return Case(
            f"{name} {rows} rows",
            num_bytes,
            {key: [lambda o=o, i=i: call(o, i) for i in range(copies)] for key, o in both.items()},
        )

    copies = min(64, size.num_copies(rows * n * 4))
    xs = [random(ops, rows, n) for _ in range(copies)]
    residuals = [random(ops, rows, n) for _ in range(copies)]
    yield case("rms_norm", rows * n * 4, lambda o, i: o.rms_norm(xs[i], weight, 1e-6), copies)
    yield case("add_rms_norm", rows * n * 8, lambda o, i: o.add_rms_norm(xs[i], residuals[i], weight, 1e-6), copies)
    gates = [random(ops, rows, width) for _ in range(copies)]
    yield case("silu_mul", rows * width * 3, lambda o, i: o.silu_mul(gates[i]), copies)
    logits = torch.randn(rows, size.vocab, device=ops.device)
    yield case("argmax", rows * size.vocab * 4, lambda o, _: o.argmax(logits), 1)
    yield case("logprobs 20", rows * size.vocab * 8, lambda o, _: o.logprobs(logits, 20), 1)


def linear_cases(ops: Ops, base: Ops, size: Size, rows: int) -> Iterator[Case]:
    n, k, group = size.intermediate, size.hidden, 128
    x = random(ops, rows, k)
    for bits in (4, 8):
        num_bytes = n * k * bits // 8 + n * k // group * 2
        grouped = GroupedWeight(
            bits=bits,
            group=group,
            q=torch.randint(2**bits, (n, k), dtype=torch.uint8),
            scales=torch.full((n, k // group), 0.01, dtype=torch.float16),
        )
        linears = [ops.quantized_linear([grouped], None) for _ in range(size.num_copies(num_bytes))]
        dense = base.linear(random(ops, n, k), None)
        contenders: dict[str, list[Call]] = {
            "own": [partial(linear, x) for linear in linears],
            "dense": [partial(dense, x)],
        }
        yield Case(f"W{bits}A16 {n}x{k} {rows} rows", num_bytes, contenders)


def attention_cases(ops: Ops, size: Size, num_seqs: int, context: int) -> Iterator[Case]:
    heads, kv_heads = size.heads
    batch = decode_batch(num_seqs, context, ops.device)
    spec = KVSpec(1, heads, kv_heads, size.head_dim, "bfloat16")
    num_bytes = 2 * num_seqs * context * kv_heads * size.head_dim * DTYPE.itemsize
    q, k, v = (random(ops, num_seqs, h, size.head_dim) for h in (heads, kv_heads, kv_heads))
    contenders = {}
    for name, backend in {"own": paged_attention(ops), "torch": PagedAttention(ops.device)}.items():
        copies = min(8, size.num_copies(num_bytes))
        caches = [backend.allocate(spec, batch.block_tables.numel())[0] for _ in range(copies)]
        contenders[name] = [
            lambda b=backend, c=cache: b.attend(q, k, v, batch, c, size.head_dim**-0.5, None) for cache in caches
        ]
    yield Case(f"decode {num_seqs} x {context} tokens", num_bytes, contenders)


def decode_batch(num_seqs: int, context: int, device: torch.device, block_size: int = 16) -> Batch:
    blocks = -(-context // block_size)
    tables = torch.arange(num_seqs * blocks, dtype=torch.int32, device=device).view(num_seqs, blocks)
    last = context - 1
    return Batch(
        input_ids=torch.zeros(num_seqs, dtype=torch.int64, device=device),
        positions=torch.full((num_seqs,), last, device=device),
        slots=tables[:, last // block_size].long() * block_size + last % block_size,
        cu_seqlens=torch.arange(num_seqs + 1, dtype=torch.int32, device=device),
        context_lens=torch.full((num_seqs,), context, dtype=torch.int32, device=device),
        block_tables=tables,
        logits_rows=torch.arange(num_seqs, device=device),
        query_lens=[1] * num_seqs,
        kv_lens=[context] * num_seqs,
    )


def cases(ops: Ops, base: Ops, size: Size) -> Iterator[Case]:
    for rows in size.batches:
        yield from row_cases(ops, base, size, rows)
        yield from linear_cases(ops, base, size, rows)
        for context in size.contexts:
            yield from attention_cases(ops, size, rows, context)


def microseconds(calls: list[Call], turns: int) -> float:
    """Median over `turns`, each the mean of ten calls back to back, between events on the stream."""
    for call in calls[:3]:
        call()
    times, n = [], 0
    for _ in range(turns):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            calls[n % len(calls)]()
            n += 1
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 100)
    return statistics.median(times)


def measure(size: Size, bandwidth: float | None, turns: int) -> None:
    ops = cuda_ops(None)
    major, minor = torch.cuda.get_device_capability()
    sheet = DEVICES.get(f"sm_{major}{minor}")
    bandwidth = bandwidth or (sheet.bandwidth if sheet else None)
    name = torch.cuda.get_device_name()
    print(f"{name}, {bandwidth or 'unknown'} GB/s, {ops.name}")
    results = []
    for case in cases(ops, TorchOps(ops.device), size):
        us = {key: microseconds(calls, turns) for key, calls in case.contenders.items()}
        gb_s = case.num_bytes / us["own"] / 1e3
        part = f"{gb_s / bandwidth:6.1%}" if bandwidth else ""
        others = ", ".join(f"{key} {value:.1f}" for key, value in us.items() if key != "own")
        print(f"{case.name:32} {us['own']:9.1f} us ({others}) {gb_s:8.0f} GB/s {part}", flush=True)
        results.append({"case": case.name, "us": us, "gb_s": gb_s})
    print(json.dumps({"device": name, "bandwidth": bandwidth, "results": results}))


def dry_run() -> None:
    base = TorchOps()
    for case in cases(CudaOps(base, emulated()), base, SMALL):
        for calls in case.contenders.values():
            calls[0]()
        print(f"{case.name:32} runs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, help="of the device's memory in GB/s, where the data sheet is wrong")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    if given.dry_run:
        dry_run()
    elif torch.cuda.is_available():
        measure(Size(), given.bandwidth, given.turns)
    else:
        print("There is no CUDA device here: no figure has been taken.")


if __name__ == "__main__":
    main()
