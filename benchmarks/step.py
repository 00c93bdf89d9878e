"""Where the time of a decode step goes: ``python benchmarks/step.py --plugin llama --num-seqs 1``.

Runs the engine's own runner, without HTTP, on sequences of random tokens. Of each step it takes the whole time and the
time inside the replay of the captured pass, the difference being Python: the batch, dispatch and the sampler. Then it
runs the captured kernels one by one, timing each, which tells the share of every kernel (the sum is a little above the
replay's time, by the cost of the calls); on a CUDA device it asks the profiler. Ends in one JSON line, milliseconds as
medians over the steps.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from blade import CaptureOptions, SamplingParams, Sequence, Step
from blade.assembly import Assembly, choose, load_model
from blade.config import Config, EngineConfig, ModelOptions
from blade.engine.runner import ModelRunner
from blade.plugins import load
from blade_native.cuda.graphs import GraphedForward
from blade_native.simd.capture import CapturedForward, Program

BLOCK_SIZE = 16


def make_runner(args: argparse.Namespace) -> tuple[Assembly, ModelRunner]:
    plugins = (args.plugin,) if args.plugin else ()
    options = {"quantize": args.quantize} if args.quantize else {}
    model = ModelOptions(model=str(args.model) if args.model else None, max_model_len=args.context + 1024, **options)
    config = Config(plugins=plugins, model=model, engine=EngineConfig(threads=args.threads, block_size=BLOCK_SIZE))
    assembly = choose(config, load(plugins))
    num_blocks = args.num_seqs * (-(-(args.context + args.steps + 8) // BLOCK_SIZE)) + 1
    kv = assembly.attention.allocate(assembly.kv_spec, num_blocks)
    capture = CaptureOptions(True, (args.num_seqs,), BLOCK_SIZE, args.context + 1024)
    return assembly, ModelRunner(load_model(assembly), kv, assembly.ops, capture)


def make_sequences(args: argparse.Namespace, runner: ModelRunner) -> list[Sequence]:
    """Prompts of `context` tokens, computed."""
    rng, params = random.Random(0), SamplingParams(max_tokens=args.steps + 8, temperature=0.0)
    seqs = []
    width = -(-(args.context + args.steps + 8) // BLOCK_SIZE)
    for i in range(args.num_seqs):
        seq = Sequence(id=i, prompt_ids=[rng.randrange(5, 1000) for _ in range(args.context)], params=params)
        seq.blocks = list(range(1 + i * width, 1 + (i + 1) * width))
        advance([seq], runner.run(Step([seq], [args.context])))
        seqs.append(seq)
    return seqs


def advance(seqs: list[Sequence], results: list[Any]) -> None:
    for seq, sampled in zip(seqs, results, strict=True):
        seq.computed = seq.num_tokens
        seq.output_ids.append(sampled[0].token_id)


def time_steps(seqs: list[Sequence], runner: ModelRunner, num_steps: int) -> tuple[list[float], list[float], Replayed]:
    """Seconds of each step, and of its replay; and what was replayed."""
    for _ in range(4):
        advance(seqs, runner.run(Step(seqs, [1] * len(seqs))))
    replayed = find(runner.forward, len(seqs))
    whole = []
    for _ in range(num_steps):
        start = time.perf_counter()
        results = runner.run(Step(seqs, [1] * len(seqs)))
        whole.append(time.perf_counter() - start)
        advance(seqs, results)
    return whole, replayed.seconds(), replayed


class Replayed(Protocol):
    """The captured pass of a step. It times itself from when it is made on."""

    def seconds(self) -> list[float]: ...

    def kernels(self, turns: int) -> dict[str, float]:
        """Median milliseconds of all calls of each kernel."""
        ...


def find(forward: Any, num_seqs: int) -> Replayed:
    if isinstance(forward, CapturedForward):
        return OnCpu(forward.captures[(num_seqs,) * 3].program)
    assert isinstance(forward, GraphedForward), "the op set does not capture"
    return OnCuda(forward, num_seqs)


class OnCpu:
    def __init__(self, program: Program) -> None:
        self.program, self.run, self.times = program, program.run, list[float]()
        program.run = self.timed  # type: ignore[method-assign]

    def timed(self) -> None:
        start = time.perf_counter()
        self.run()
        self.times.append(time.perf_counter() - start)

    def seconds(self) -> list[float]:
        return self.times

    def kernels(self, turns: int) -> dict[str, float]:
        """Run one by one."""
        sums: dict[str, list[float]] = {}
        for _ in range(turns):
            turn: Counter[str] = Counter()
            for i, (kernel, _) in enumerate(self.program.tape):
                start = time.perf_counter()
                self.program.run_one(i)
                turn[kernel.name] += (time.perf_counter() - start) * 1e3
            for name, ms in turn.items():
                sums.setdefault(name, []).append(ms)
        return {name: round(statistics.median(values), 3) for name, values in sums.items()}


class OnCuda:
    def __init__(self, forward: GraphedForward, num_seqs: int) -> None:
        self.events = list[tuple[torch.cuda.Event, torch.cuda.Event]]()
        recorded = forward.recorded[num_seqs]
        self.run = recorded.replay
        forward.recorded[num_seqs] = replace(recorded, replay=self.timed)

    def timed(self) -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.run()
        end.record()
        self.events.append((start, end))

    def seconds(self) -> list[float]:
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in self.events]

    def kernels(self, turns: int) -> dict[str, float]:
        """Means, of kernels that run in a graph as they do in a step."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(turns):
                self.run()
            torch.cuda.synchronize()
        sums: Counter[str] = Counter()
        for event in profile.key_averages():
            sums[re.sub(r"^void |[<(].*", "", event.key)[-48:]] += event.device_time_total / turns / 1e3
        return {name: round(ms, 4) for name, ms in sums.most_common(24)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plugin", help="whose demo model to run")
    parser.add_argument("--model", type=Path, help="or: a folder or a .gguf file")
    parser.add_argument("--quantize", help="as blade serve --quantize")
    parser.add_argument("--num-seqs", type=int, default=1, help="sequences that decode together")
    parser.add_argument("--context", type=int, default=256, help="tokens each of them has")
    parser.add_argument("--steps", type=int, default=50, help="steps to time")
    parser.add_argument("--threads", type=int, help="threads of the kernels")
    args = parser.parse_args()
    assembly, runner = make_runner(args)
    whole, inside, replayed = time_steps(make_sequences(args, runner), runner, args.steps)
    python = [a - b for a, b in zip(whole, inside, strict=True)]
    kernels = replayed.kernels(9)
    step_ms, python_ms = statistics.median(whole) * 1e3, statistics.median(python) * 1e3
    for name, ms in sorted(kernels.items(), key=lambda item: -item[1]):
        print(f"{name:48} {ms:8.3f} ms")
    summary = {
        "model": assembly.model_name,
        "ops": assembly.ops.name,
        "num_seqs": args.num_seqs,
        "context": args.context,
        "step_ms": round(step_ms, 3),
        "replay_ms": round(statistics.median(inside) * 1e3, 3),
        "python_ms": round(python_ms, 3),
        "python_share": round(python_ms / step_ms, 4),
        "best_step_ms": round(min(whole) * 1e3, 3),
        "kernels_ms": kernels,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
