"""Native CPU kernels beside torch's, on the shapes of Qwen2.5-0.5B: ``python benchmarks/kernels.py [--quick]``.

All contenders of a row run in turns within one process, so that a busy machine slows them alike. Weights rotate through
copies larger than the last-level cache: decoding never finds them there.
Ends in one JSON line: by op, rows and contender the microseconds per call as [median, best] of the turns; of our linears
also GB/s of weights and GFLOP/s at their best; and the best read bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from blade import KVSpec
from blade.types import Batch
from blade_native.simd.attention import SimdAttention
from blade_native.simd.library import load
from blade_native.simd.linear import pack_dense, quantize
from blade_native.simd.memory import allocate
from blade_native.simd.ops import SimdOps
from torch.nn import functional as F

LINEARS = {"qkv": (1152, 896), "o": (896, 896), "gate_up": (9728, 896), "down": (896, 4864), "lm_head": (151936, 896)}
ROWS = (1, 4, 16, 64, 512)
COLD_BYTES = 96 << 20
Call = Callable[[int], object]  # takes the number of the turn


def measure(contenders: dict[str, Call], seconds: float) -> dict[str, list[float]]:
    """[median, best] microseconds per call, the contenders taking turns for about `seconds`."""
    for call in contenders.values():
        call(0)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < 3:
        turn += 1
        for name, call in contenders.items():
            start = time.perf_counter()
            call(turn)
            times[name].append((time.perf_counter() - start) * 1e6)
    return {name: [round(statistics.median(values), 1), round(min(values), 1)] for name, values in times.items()}


def rotate(calls: list[Callable[[], object]]) -> Call:
    return lambda turn: calls[turn % len(calls)]()


def linears(ops: SimdOps, name: str, rows: tuple[int, ...], seconds: float) -> list[dict[str, object]]:
    n, k = LINEARS[name]
    copies = max(1, COLD_BYTES // (n * k * 2))
    weights = [(torch.randn(n, k) / k**0.5).bfloat16() for _ in range(copies)]
    threads = ops.threads
    packed = {
        "bf16": [pack_dense(ops.library, w, None, threads) for w in weights],
        "int8": [quantize(ops.library, w, None, 8, threads) for w in weights],
        "int4": [quantize(ops.library, w, None, 4, threads) for w in weights],
    }
    onednn = [torch.ops.mkldnn._reorder_linear_weight(w, 16) for w in weights] if n < 100_000 else []
    results = []
    for m in rows:
        x = torch.randn(m, k).bfloat16()
        contenders = {kind: rotate([lambda p=p: p(x) for p in linears]) for kind, linears in packed.items()}
        if n < 100_000 or m == 1:
            contenders["F.linear"] = rotate([lambda w=w: F.linear(x, w) for w in weights])
        if onednn:
            pointwise = torch.ops.mkldnn._linear_pointwise
            contenders["prepacked"] = rotate([lambda w=w: pointwise(x, w, None, "none", [], "") for w in onednn])
        us = measure(contenders, seconds)
        sizes = {kind: linears[0].weights.numel() for kind, linears in packed.items()}
        results.append(
            {
                "op": name,
                "m": m,
                "us": us,
                "gb_s": {kind: round(size / us[kind][1] / 1e3, 1) for kind, size in sizes.items()},
                "gflop_s": {kind: round(2e-3 * m * n * k / us[kind][1]) for kind in sizes},
            }
        )
    return results


def decode_batch(num_seqs: int, context: int, block_size: int) -> Batch:
    blocks = -(-context // block_size)
    tables = torch.arange(num_seqs * blocks, dtype=torch.int32).view(num_seqs, blocks)
    last = context - 1
    return Batch(
        input_ids=torch.zeros(num_seqs, dtype=torch.int64),
        positions=torch.full((num_seqs,), last),
        slots=tables[:, last // block_size].long() * block_size + last % block_size,
        cu_seqlens=torch.arange(num_seqs + 1, dtype=torch.int32),
        context_lens=torch.full((num_seqs,), context, dtype=torch.int32),
        block_tables=tables,
        logits_rows=torch.arange(num_seqs),
        query_lens=[1] * num_seqs,
        kv_lens=[context] * num_seqs,
    )


def prefill_batch(context: int, block_size: int) -> Batch:
    blocks = -(-context // block_size)
    return Batch(
        input_ids=torch.zeros(context, dtype=torch.int64),
        positions=torch.arange(context),
        slots=torch.arange(context),
        cu_seqlens=torch.tensor([0, context], dtype=torch.int32),
        context_lens=torch.tensor([context], dtype=torch.int32),
        block_tables=torch.arange(blocks, dtype=torch.int32)[None],
        logits_rows=torch.tensor([context - 1]),
        query_lens=[context],
        kv_lens=[context],
    )


def attention(ops: SimdOps, seconds: float) -> list[dict[str, object]]:
    from blade_native.attention import PagedAttention

    heads, kv_heads, dim = 14, 2, 64
    spec = KVSpec(1, heads, kv_heads, dim, "bfloat16")
    paged = PagedAttention(ops.device)
    simd = SimdAttention(paged, ops.library, ops.threads)
    cos_sin = torch.randn(4096, dim)
    cases = {
        "decode b1 ctx256": decode_batch(1, 256, 16),
        "decode b1 ctx4096": decode_batch(1, 4096, 16),
        "decode b16 ctx256": decode_batch(16, 256, 16),
        "prefill 1024": prefill_batch(1024, 16),
    }
    results = []
    for name, batch in cases.items():
        q = torch.randn(len(batch.positions), heads, dim).bfloat16()
        k, v = torch.randn(2, len(batch.positions), kv_heads, dim).bfloat16()
        attend, rope = {}, {}
        for contender, backend in {"native": simd, "torch": paged}.items():
            (kv,) = backend.allocate(spec, 300)
            attend[contender] = lambda _, a=backend, kv=kv: a.attend(q, k, v, batch, kv, 0.125, None)
            rope[contender] = lambda _, a=backend, kv=kv: a.rope_and_store(q, k, v, cos_sin, batch, kv)
        for op, contenders in {"rope_and_store": rope, "attend": attend}.items():
            us = measure(contenders, seconds)
            results.append({"op": op, "case": name, "us": us})
    return results


def row_ops(ops: SimdOps, seconds: float) -> list[dict[str, object]]:
    base = ops.base
    results = []
    for m in (1, 16, 1024):
        x, residual, w = torch.randn(m, 896).bfloat16(), torch.zeros(m, 896).bfloat16(), torch.ones(896).bfloat16()
        gate_up = torch.randn(m, 9728).bfloat16()
        cases: dict[str, Callable[[object], object]] = {
            "rms_norm": lambda o, x=x, w=w: o.rms_norm(x, w, 1e-6),
            "add_rms_norm": lambda o, x=x, r=residual, w=w: o.add_rms_norm(x, r.zero_(), w, 1e-6),
            "silu_mul": lambda o, g=gate_up: o.silu_mul(g),
        }
        for name, case in cases.items():
            us = measure({"native": lambda _, c=case: c(ops), "torch": lambda _, c=case: c(base)}, seconds / 4)
            results.append({"op": name, "m": m, "us": us})
    logits = torch.randn(16, 151936)
    for name, native, other in (
        ("argmax", lambda _: ops.argmax(logits), lambda _: logits.argmax(-1)),
        ("top_k 64", lambda _: ops.top_k(logits, 64), lambda _: logits.topk(64)),
    ):
        us = measure({"native": native, "torch": other}, seconds / 4)
        results.append({"op": name, "m": 16, "us": us})
    return results


def read_bandwidth(ops: SimdOps, seconds: float) -> float:
    """GB/s of reading 256 MiB on huge pages."""
    data = allocate(256 << 20).zero_()
    us = measure({"read": lambda _: ops.library.read(data.data_ptr(), data.numel(), ops.threads)}, seconds)
    return round(data.numel() / us["read"][1] / 1e3, 1)


@torch.inference_mode()
def main() -> None:
    from blade_native.cpu import CpuOps

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="*", default=[*LINEARS, "attention", "rows"], help="what to measure")
    parser.add_argument("--rows", nargs="*", type=int, default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=0.3, help="per row of the table")
    args = parser.parse_args()
    ops = SimdOps(CpuOps(), load())
    bandwidth = [read_bandwidth(ops, args.seconds)]
    results: list[dict[str, object]] = []
    for name in args.ops:
        if name == "attention":
            results += attention(ops, args.seconds)
        elif name == "rows":
            results += row_ops(ops, args.seconds)
        else:
            results += linears(ops, name, tuple(m for m in args.rows if name != "lm_head" or m <= 16), args.seconds)
        bandwidth.append(read_bandwidth(ops, args.seconds))
    for row in results:
        print(*(f"{key} {value}" for key, value in row.items()), sep="  ")
    summary = {"isa": ops.library.level, "threads": ops.threads, "read_gb_s": max(bandwidth)}
    print(json.dumps({**summary, "results": results}))


if __name__ == "__main__":
    main()
