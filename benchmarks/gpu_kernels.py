"""The CUDA kernels beside torch's and beside what the memory allows: ``python benchmarks/gpu_kernels.py``.

A row gives microseconds per call as the median of the turns, of calls that follow each other in a CUDA graph as they
do in a step, and GB/s of the bytes that a call has to move at least, as measured and as a part of what a copy on the
device reaches in the same run. "launch" is what a call costs where there is no graph: mostly Python. Weights and caches
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
    batches: tuple[int, ...] = (1, 8, 16, 32, 64)
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


def dense_case(ops: Ops, n: int, k: int, rows: int, copies: int) -> Case:
    x = random(ops, rows, k)
    linears = [ops.linear(random(ops, n, k), None) for _ in range(copies)]
    return Case(f"linear {n}x{k} {rows} rows", n * k * DTYPE.itemsize, {"own": [partial(each, x) for each in linears]})


def linear_cases(ops: Ops, base: Ops, size: Size, rows: int) -> Iterator[Case]:
    for n, k in ((size.hidden, size.hidden), (2 * size.intermediate, size.hidden), (size.hidden, size.intermediate)):
        yield dense_case(ops, n, k, rows, size.num_copies(n * k * DTYPE.itemsize))
    n, k = 2 * size.intermediate, size.hidden
    x, dense = random(ops, rows, k), base.linear(random(ops, n, k), None)
    for bits, group, minima in ((4, 128, False), (4, 32, True), (8, 64, False)):  # GPTQ's; --quantize int4 and int8
        scales = torch.full((n, k // group), 0.01, dtype=torch.float16, device=ops.device)
        q = torch.randint(2**bits, (n, k), dtype=torch.uint8, device=ops.device)
        grouped = GroupedWeight(bits, group, q, scales, -scales if minima else None)
        num_bytes = n * k * bits // 8 + scales.nbytes * (2 if minima else 1)
        linears = [ops.quantized_linear([grouped], None) for _ in range(size.num_copies(num_bytes))]
        contenders: dict[str, list[Call]] = {
            "own": [partial(linear, x) for linear in linears],
            "dense": [partial(dense, x)],
        }
        kind = f"W{bits}A16 groups of {group}{' with minima' if minima else ''}"
        yield Case(f"{kind} {n}x{k} {rows} rows", num_bytes, contenders)


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


def microseconds(calls: list[Call], turns: int) -> float | None:
    """Median over `turns` of a call in a graph of them; None where a call waits for the device, which no graph can."""
    num = max(20, len(calls))
    graph = torch.cuda.CUDAGraph()
    for call in calls:
        call()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            for i in range(num):
                calls[i % len(calls)]()
    except Exception:  # torch and the driver refuse with classes of their own
        return None
    graph.replay()
    return statistics.median(elapsed(graph.replay) for _ in range(turns)) / num


def launch_microseconds(calls: list[Call], turns: int) -> float:
    """Median over `turns`, each the mean of ten calls back to back."""

    def ten() -> None:
        for i in range(10):
            calls[i % len(calls)]()

    ten()
    return statistics.median(elapsed(ten) for _ in range(turns)) / 10


def elapsed(run: Callable[[], object]) -> float:
    """Microseconds between events before and after on the stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def copy_bandwidth(turns: int) -> float:
    """GB/s, read and written, of a copy larger than any cache."""
    x = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
    y = torch.empty_like(x)
    y.copy_(x)
    return 2 * x.nbytes / statistics.median(elapsed(lambda: y.copy_(x)) for _ in range(turns)) / 1e3


def measure(size: Size, turns: int) -> None:
    ops = cuda_ops(None)
    name, bandwidth = torch.cuda.get_device_name(), copy_bandwidth(turns)
    print(f"{name}, {bandwidth:.0f} GB/s, {ops.name}")
    results = []
    for case in cases(ops, TorchOps(ops.device), size):
        us = {key: microseconds(calls, turns) for key, calls in case.contenders.items()}
        own, launch = us.pop("own"), launch_microseconds(case.contenders["own"], turns)
        gb_s = case.num_bytes / (own or launch) / 1e3
        others = ", ".join(f"{key} {value:.1f}" for key, value in us.items() if value)
        print(
            f"{case.name:54} {own or launch:8.1f} us ({others}) {gb_s:6.0f} GB/s {gb_s / bandwidth:6.1%}, "
            f"launch {launch:.0f} us",
            flush=True,
        )
        results.append({"case": case.name, "us": own, "launch_us": launch, "others_us": us, "gb_s": round(gb_s, 1)})
    print(json.dumps({"device": name, "copy_gb_s": round(bandwidth, 1), "results": results}))


def dry_run() -> None:
    base = TorchOps()
    for case in cases(CudaOps(base, emulated()), base, SMALL):
        for calls in case.contenders.values():
            calls[0]()
        print(f"{case.name:54} runs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    if given.dry_run:
        dry_run()
    elif torch.cuda.is_available():
        measure(Size(), given.turns)
    else:
        print("There is no CUDA device here: no figure has been taken.")


if __name__ == "__main__":
    main()
