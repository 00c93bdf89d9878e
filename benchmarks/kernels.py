"""Native CPU kernels beside torch's, on the shapes of Qwen2.5-0.5B: ``python benchmarks/kernels.py``.

All contenders of a row take turns within one process, so that a busy machine slows them alike. A turn is an untimed
call, which wakes the contender's threads, and a timed one. Weights rotate through copies larger than the last-level
cache: decoding never finds them there. Ends in one JSON line: by op, rows and contender the microseconds per call as
[median, best] of the turns; of our linears also GB/s of weights and GFLOP/s in the median, and what share that is of
the read bandwidth and of the arithmetic's peak (floats' or bytes', by the instructions of this level), the best ones
measured in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # torch's idle threads would spin on our cores for milliseconds

import torch

from blade import Batch, Float8Weight, GroupedWeight, KVSpec, QuantizedWeight
from blade.contracts import Attention, Linear, Ops
from blade.nn import DefaultOps
from blade_native.attention import PagedAttention
from blade_native.cpu import CpuOps, can_pack
from blade_native.cpu import PackedLinear as OneDNNLinear
from blade_native.kv_codes import MODES
from blade_native.reference import TorchLinear
from blade_native.simd.attention import SimdAttention
from blade_native.simd.library import load
from blade_native.simd.limits import peak_flops, read_bandwidth, uncached_bytes
from blade_native.simd.ops import SimdOps
from blade_rtn.int4 import nest_int4

LINEARS = {"qkv": (1152, 896), "o": (896, 896), "gate_up": (9728, 896), "down": (896, 4864), "lm_head": (151936, 896)}
KV_BYTES = 128 << 20  # of layers that take turns, so that no cache of a core holds them
ARITHMETIC = {"bf16": "bf16", "fp8": "float32"}  # of what kind a linear's products are; of others bytes
FORMATS = {
    "int8": (8, 64),
    "int4": (4, 32),
    "q8_0": (8, 32),
    "q4_0": (4, 32),
    "q4_k": (4, 32),
    "q5_k": (5, 32),
    "q6_k": (6, 16),
    "awq": (4, 128),
    "gptq_order": (4, 128),
    "nvfp4": (4, 16),
    "mxfp4": (4, 32),
    "nf4": (4, 64),
    "channel8": (8, 128),
    "fp8": (8, 128),
}
FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
NF4 = (-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127)
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
            call(2 * turn)
            start = time.perf_counter()
            call(2 * turn + 1)
            times[name].append((time.perf_counter() - start) * 1e6)
    return {name: [round(statistics.median(values), 1), round(min(values), 1)] for name, values in times.items()}


def rotate(calls: list[Callable[[], object]]) -> Call:
    return lambda turn: calls[turn % len(calls)]()


def quantized(name: str, n: int, k: int) -> QuantizedWeight:
    """Random weights in a format of FORMATS. int4 is nested in bytes, as `--quantize int4` makes it of floats."""
    if name == "int4":
        with torch.inference_mode(False):  # threads of their own round
            return nest_int4(torch.randn(n, k), FORMATS[name][1])
    if name == "fp8":
        q = (torch.randn(n, k) * 64).to(torch.float8_e4m3fn)
        return Float8Weight(q, torch.rand(-(-n // 128), -(-k // 128)) / 1000, (128, 128))
    bits, group = FORMATS[name]
    groups, blocks = k // group, k // (256 if k % 256 == 0 else 128)
    q = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    if name in ("int8", "q8_0", "q4_0"):
        return GroupedWeight(bits, group, q, torch.rand(n, groups).half() / 100)
    scales = torch.rand(n, groups) / 100
    if name == "awq":
        return GroupedWeight(bits, group, q, scales.bfloat16(), zeros=torch.full(scales.shape, 8, dtype=torch.uint8))
    if name == "gptq_order":
        return GroupedWeight(bits, group, q, scales.half(), order=torch.randperm(k))
    if name in ("nvfp4", "mxfp4", "nf4"):
        return GroupedWeight(bits, group, q, scales.bfloat16(), values=NF4 if name == "nf4" else FP4)
    if name == "channel8":
        return GroupedWeight(bits, group, q, scales)
    codes, halves = torch.randint(0, 64, (2, n, groups), dtype=torch.uint8), torch.rand(2, n, blocks).half() / 1000
    if name == "q6_k":
        return GroupedWeight(bits, group, q, codes[0].to(torch.int8), block_scales=halves[0])
    return GroupedWeight(bits, group, q, codes[0], codes[1], None, halves[0], halves[1])


def linears(ops: SimdOps, name: str, rows: list[int], seconds: float, formats: list[str]) -> list[dict[str, Any]]:
    n, k = LINEARS[name]
    weights = [(torch.randn(n, k) / k**0.5).bfloat16() for _ in range(max(1, uncached_bytes() // (n * k * 2)))]
    packed: dict[str, list[Linear]] = {"bf16": [ops.linear(w, None) for w in weights]}
    for kind in formats:
        weight = quantized(kind, n, k)
        packed[kind] = [ops.quantized_linear(weight, None) for _ in weights]
    sizes = {kind: copies[0].weights.numel() for kind, copies in packed.items()}
    packed["F.linear"] = [TorchLinear(w, None) for w in weights]
    if can_pack(torch.bfloat16):
        packed["prepacked"] = [OneDNNLinear(w, None) for w in weights]
    results = []
    for m in rows:
        x = torch.randn(m, k).bfloat16()
        us = measure({kind: rotate([partial(copy, x) for copy in copies]) for kind, copies in packed.items()}, seconds)
        gb_s = {kind: round(size / us[kind][0] / 1e3, 1) for kind, size in sizes.items()}
        gflop_s = {kind: round(2e-3 * m * n * k / us[kind][0]) for kind in sizes}
        results.append({"op": name, "m": m, "us": us, "gb_s": gb_s, "gflop_s": gflop_s})
    return results


def experts(ops: SimdOps, rows: list[int], seconds: float, formats: list[str]) -> list[dict[str, Any]]:
    """A layer of Qwen3-30B-A3B, beside the same linears called expert by expert. Each call chooses other experts."""
    num_experts, k, width, inner = 128, 8, 2048, 768
    contenders, sizes = {}, {}
    for kind in ["bf16", *formats]:
        gate_up, down = (
            [
                ops.linear((torch.randn(n, c) / c**0.5).bfloat16(), None)
                if kind == "bf16"
                else ops.quantized_linear(quantized(kind, n, c), None)
                for _ in range(num_experts)
            ]
            for n, c in ((2 * inner, width), (width, inner))
        )
        contenders[kind] = ops.experts(gate_up, down)
        contenders[f"{kind}, one by one"] = DefaultOps.experts(ops, gate_up, down)
        sizes[kind] = gate_up[0].weights.numel() + down[0].weights.numel()
    results = []
    for m in rows:
        x, weights = torch.randn(m, width).bfloat16(), torch.full((m, k), 1 / k)
        ids = [torch.rand(m, num_experts).topk(k).indices for _ in range(32)]
        chosen = statistics.mean(len(each.unique()) for each in ids)
        calls = {kind: rotate([partial(each, x, i, weights) for i in ids]) for kind, each in contenders.items()}
        us = measure(calls, seconds)
        gb_s = {kind: round(size * chosen / us[kind][0] / 1e3, 1) for kind, size in sizes.items()}
        gflop_s = {kind: round(6e-3 * m * k * width * inner / us[kind][0]) for kind in sizes}
        results.append({"op": "experts", "m": m, "us": us, "gb_s": gb_s, "gflop_s": gflop_s})
    return results


def recurrence(ops: SimdOps, seconds: float) -> list[dict[str, Any]]:
    """A gated delta net layer of Qwen3-Next in steps of one token per sequence and of a prompt."""
    return [row for shape in ((1, 1), (16, 1), (1, 512)) for row in recurrent_step(ops, *shape, seconds)]


def recurrent_step(ops: SimdOps, num_seqs: int, num_tokens: int, seconds: float) -> list[dict[str, Any]]:
    """Of the gated delta rule also GB/s of states read and written, in the median."""
    key_heads, heads, dim = 16, 32, 128
    width, state_bytes = (2 * key_heads + heads) * dim, 2 * num_seqs * heads * dim * dim * 4
    batch = decode_batch(num_seqs, 1, 16) if num_tokens == 1 else prefill_batch(num_tokens, 16)
    batch.state_in = torch.arange(num_seqs, dtype=torch.int32)
    batch.state_out = batch.state_in + num_seqs
    layers = range(max(1, uncached_bytes() // state_bytes))
    states = [torch.randn(2 * num_seqs, heads, dim, dim) for _ in layers]
    held = [torch.zeros(2 * num_seqs, width, 3).bfloat16() for _ in layers]
    mixed = torch.randn(num_seqs * num_tokens, width).bfloat16()
    q, k, v = mixed.view(len(mixed), -1, dim).split_with_sizes((key_heads, key_heads, heads), dim=1)
    a, b = torch.randn(2, len(mixed), heads).bfloat16()
    weight, decay, dt_bias = torch.randn(width, 4).bfloat16(), -torch.rand(heads), torch.randn(heads)
    x, ones = v.contiguous(), torch.ones(dim).bfloat16()
    cases: dict[str, Callable[[Ops, int], object]] = {
        "gated_delta": lambda o, i: o.gated_delta(q, k, v, a, b, decay, dt_bias, batch, states[i]),
        "short_conv": lambda o, i: o.short_conv(mixed, weight, batch, held[i]),
        "gated_rms_norm": lambda o, _: o.gated_rms_norm(x, v, ones, 1e-6),
    }
    results: list[dict[str, Any]] = []
    for name, case in cases.items():
        both = {"native": ops, "torch": ops.base}
        us = measure({n: rotate([partial(case, o, i) for i in layers]) for n, o in both.items()}, seconds)
        row: dict[str, Any] = {"op": name, "case": f"{num_seqs} x {num_tokens}", "us": us}
        if name == "gated_delta":
            row["gb_s"] = round(state_bytes / us["native"][0] / 1e3, 1)
        results.append(row)
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


def attention(ops: SimdOps, seconds: float) -> list[dict[str, Any]]:
    paged = PagedAttention(ops.device)
    backends = {"native": SimdAttention(paged, ops.library, ops.threads), "torch": paged}
    batches = {
        "decode b1 ctx256": decode_batch(1, 256, 16),
        "decode b1 ctx4096": decode_batch(1, 4096, 16),
        "decode b16 ctx256": decode_batch(16, 256, 16),
        "prefill 1024": prefill_batch(1024, 16),
    }
    return [row for name, batch in batches.items() for row in attention_steps(name, batch, backends, seconds)]


def kv_cache(ops: SimdOps, seconds: float) -> list[dict[str, Any]]:
    """Decodes over a cache in bfloat16 and in every mode, of Qwen2.5-0.5B's heads and of Qwen3-0.6B's."""
    native = SimdAttention(PagedAttention(ops.device), ops.library, ops.threads)
    results = []
    for heads, kv_heads, dim in ((14, 2, 64), (16, 8, 128)):
        q, (k, v) = torch.randn(8, heads, dim).bfloat16(), torch.randn(2, 8, kv_heads, dim).bfloat16()
        for num_seqs, context in itertools.product((1, 8), (256, 2048, 8192)):
            batch, num_blocks = decode_batch(num_seqs, context, 16), num_seqs * context // 16
            contenders: dict[str, Call] = {}
            for storage in (None, *MODES):
                spec = KVSpec(1, heads, kv_heads, dim, "bfloat16", storage=storage)
                layers = max(2, KV_BYTES // (num_blocks * native.block_bytes(spec)))
                kv = native.allocate(replace(spec, num_layers=layers), num_blocks)
                for layer in kv:
                    layer.k.fill_(0), layer.v.fill_(0)  # so that there is memory behind it
                calls = [partial(native.attend, q[:num_seqs], k, v, batch, layer, dim**-0.5, None) for layer in kv]
                contenders[storage or "bf16"] = rotate(calls)
            us = measure(contenders, seconds)
            ratios = {name: round(us["bf16"][0] / each[0], 2) for name, each in us.items()}
            case = f"decode {heads}/{kv_heads}/{dim} b{num_seqs} ctx{context}"
            results.append({"op": "attend", "case": case, "us": us, "ratio": ratios})
    return results


def attention_steps(name: str, batch: Batch, backends: dict[str, Attention], seconds: float) -> list[dict[str, Any]]:
    heads, kv_heads, dim = 14, 2, 64
    caches = {
        n: backend.allocate(KVSpec(1, heads, kv_heads, dim, "bfloat16"), 300)[0] for n, backend in backends.items()
    }
    q = torch.randn(len(batch.positions), heads, dim).bfloat16()
    k, v = torch.randn(2, len(batch.positions), kv_heads, dim).bfloat16()
    cos_sin = torch.randn(4096, dim)
    rope = {n: lambda _, n=n: backends[n].rope_and_store(q, k, v, cos_sin, batch, caches[n]) for n in backends}
    attend = {n: lambda _, n=n: backends[n].attend(q, k, v, batch, caches[n], dim**-0.5, None) for n in backends}
    return [
        {"op": op, "case": name, "us": measure(contenders, seconds)}
        for op, contenders in {"rope_and_store": rope, "attend": attend}.items()
    ]


def row_ops(ops: SimdOps, m: int, seconds: float) -> list[dict[str, Any]]:
    x, residual, weight = torch.randn(m, 896).bfloat16(), torch.zeros(m, 896).bfloat16(), torch.ones(896).bfloat16()
    gate_up = torch.randn(m, 9728).bfloat16()
    cases: dict[str, Callable[[Ops], object]] = {
        "rms_norm": lambda o: o.rms_norm(x, weight, 1e-6),
        "add_rms_norm": lambda o: o.add_rms_norm(x, residual.zero_(), weight, 1e-6),
        "silu_mul": lambda o: o.silu_mul(gate_up),
    }
    results = []
    for name, case in cases.items():
        us = measure(
            {n: lambda _, o=o, case=case: case(o) for n, o in {"native": ops, "torch": ops.base}.items()}, seconds
        )
        results.append({"op": name, "m": m, "us": us})
    return results


def selection(ops: SimdOps, seconds: float) -> list[dict[str, Any]]:
    logits = torch.randn(16, 151936)
    cases: dict[str, dict[str, Call]] = {
        "argmax": {"native": lambda _: ops.argmax(logits), "torch": lambda _: logits.argmax(-1)},
        "logprobs 20": {
            n: lambda _, o=o: o.logprobs(logits, 20) for n, o in {"native": ops, "torch": ops.base}.items()
        },
    }
    return [{"op": name, "m": 16, "us": measure(contenders, seconds)} for name, contenders in cases.items()]


class Limits:
    """The best that the machine gave in any of some measurements between the others."""

    def __init__(self, ops: SimdOps, seconds: float) -> None:
        self._ops, self._seconds = ops, seconds
        self.read_gb_s = 0.0
        self.peak_gflop_s = dict.fromkeys(("float32", "bf16", "bytes"), 0)
        self.measure()

    def measure(self) -> None:
        library, threads = self._ops.library, self._ops.threads
        self.read_gb_s = max(self.read_gb_s, round(read_bandwidth(library, threads, self._seconds) / 1e9, 1))
        for (name, best), bits in zip(self.peak_gflop_s.items(), (32, 16, 8), strict=True):
            rate = round(peak_flops(library, bits, threads, self._seconds / 3) / 1e9)
            self.peak_gflop_s[name] = max(best, rate)

    def add_shares(self, row: dict[str, Any]) -> None:
        if "gflop_s" not in row:
            return
        peaks = {kind: self.peak_gflop_s[ARITHMETIC.get(kind, "bytes")] for kind in row["gflop_s"]}
        row["of_read"] = {kind: round(gb_s / self.read_gb_s, 2) for kind, gb_s in row["gb_s"].items()}
        row["of_peak"] = {kind: round(rate / peaks[kind], 2) for kind, rate in row["gflop_s"].items()}


def run(ops: SimdOps, name: str, rows: list[int], seconds: float, formats: list[str]) -> list[dict[str, Any]]:
    if name == "attention":
        return attention(ops, seconds)
    if name == "kv":
        return kv_cache(ops, seconds)
    if name == "experts":
        return experts(ops, rows, seconds, formats)
    if name == "recurrence":
        return recurrence(ops, seconds)
    if name == "rows":
        return [row for m in (1, 16, 1024) for row in row_ops(ops, m, seconds / 4)] + selection(ops, seconds / 4)
    return linears(ops, name, [m for m in rows if name != "lm_head" or m <= 16], seconds, formats)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--ops",
        nargs="*",
        default=[*LINEARS, "attention", "kv", "rows", "experts", "recurrence"],
        help="what to measure",
    )
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 4, 16, 64, 512], help="rows of the linears' input")
    parser.add_argument("--formats", nargs="*", default=["int8", "int4"], choices=[*FORMATS], help="of linears")
    parser.add_argument("--seconds", type=float, default=0.3, help="per row of the table")
    args = parser.parse_args()
    ops = SimdOps(CpuOps(), load())
    limits, results = Limits(ops, args.seconds), []
    for name in args.ops:
        results += run(ops, name, args.rows, args.seconds, args.formats)
        limits.measure()
    for row in results:
        limits.add_shares(row)
        print(*(f"{key} {value}" for key, value in row.items()), sep="  ")
    summary: dict[str, Any] = {"isa": ops.library.level, "threads": ops.threads, "read_gb_s": limits.read_gb_s}
    summary["peak_gflop_s"] = limits.peak_gflop_s
    print(json.dumps({**summary, "results": results}))


if __name__ == "__main__":
    main()
