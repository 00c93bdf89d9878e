"""One model in several weight formats, side by side: ``python benchmarks/formats.py BF16_DIR GPTQ_DIR AWQ_DIR ...``.

Each checkpoint is served by an engine without HTTP, in a process of its own; the processes take turns, so that a
machine that slows down slows all. Measured are output tokens per second of one and of sixteen greedy requests, what the
weights take in memory and the peak of the process, and how close the next-token distributions over a fixed text are to
the first checkpoint's. A quantised form made at load is asked for as DIR@int8. Ends in one JSON line; ratios are to the
first checkpoint.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

TEXT = Path(__file__).with_name("quality.txt")
NUM_PROMPT, NUM_OUTPUT = 32, 64  # tokens
BATCHES = (1, 16)
NUM_TEXT = 512  # tokens of the text

counter = itertools.count(1)


class Served:
    """In the process of one checkpoint."""

    def __init__(self, name: str, threads: int | None) -> None:
        from blade import Config, EngineConfig, ModelOptions
        from blade.assembly import build_engine, choose, load_model
        from blade.plugins import load

        model, _, quantize = name.partition("@")
        options = ModelOptions(model=model, quantize=quantize or None, max_model_len=1024)
        engine = EngineConfig(threads=threads, kv_cache_memory=512 << 20, prefix_cache=False)
        started = time.perf_counter()
        self.assembly = choose(Config(model=options, engine=engine), load())
        self.model = load_model(self.assembly)
        self.seconds = time.perf_counter() - started
        self.engine = build_engine(self.assembly, self.model, self.assembly.plan_memory())
        self.loop = asyncio.new_event_loop()
        self.engine.start(self.loop)

    def facts(self) -> dict[str, Any]:
        return {
            "weights": self.assembly.form.label,
            "weight_bytes": self.assembly.weight_bytes,
            "load_s": round(self.seconds, 2),
            "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }

    def speed(self, batch: int) -> float:
        """Output tokens per second, prompts included."""
        from blade import SamplingParams, Sequence

        params = SamplingParams(max_tokens=NUM_OUTPUT, temperature=0)
        prompts = [[5 + (i * 37 + j * 11) % 1000 for j in range(NUM_PROMPT)] for i in range(batch)]
        seqs = [Sequence(next(counter), prompt, params) for prompt in prompts]

        async def run() -> None:
            async for _ in self.engine.submit(seqs):
                pass

        started = time.perf_counter()
        self.loop.run_until_complete(run())
        return batch * NUM_OUTPUT / (time.perf_counter() - started)

    def decode(self, of: list[int]) -> float:
        """`of` a batch and a number of steps: output tokens per second of these, after the first tokens have come."""
        from blade import SamplingParams, Sequence

        batch, num_steps = of
        params = SamplingParams(max_tokens=num_steps + 2, temperature=0)
        seqs = [Sequence(next(counter), [5 + i + j for j in range(8)], params) for i in range(batch)]
        arrivals: list[tuple[float, int]] = []  # seconds, tokens; several steps may arrive as one

        async def run() -> None:
            async for outputs in self.engine.submit(seqs):
                if any(output.error for output in outputs):
                    raise SystemExit(f"a sequence has failed: {outputs}")
                arrivals.append((time.perf_counter(), sum(len(output.sampled) for output in outputs)))

        self.loop.run_until_complete(run())
        started = next(i for i in range(len(arrivals)) if sum(n for _, n in arrivals[: i + 1]) >= 2 * batch)
        tokens = sum(num for _, num in arrivals[started + 1 :])
        return tokens / (arrivals[-1][0] - arrivals[started][0])

    def log_probs(self, path: str) -> float:
        """Write the distributions over the text to a file; the perplexity."""
        import torch

        from blade import SamplingParams, Sequence, Step
        from blade.engine.batch import build_batch
        from blade.text.tokenizer import load_tokenizer

        assembly = self.assembly
        tokenizer = load_tokenizer(assembly.checkpoint.path, assembly.checkpoint.gguf_metadata)
        ids = tokenizer.encode(TEXT.read_text())[:NUM_TEXT]
        block_size = assembly.kv_spec.block_size
        seq = Sequence(next(counter), ids, SamplingParams(max_tokens=1))
        seq.blocks = list(range(-(-len(ids) // block_size)))
        kv = assembly.attention.allocate(assembly.kv_spec, len(seq.blocks))
        batch = build_batch(Step([seq], [len(ids)]), block_size, assembly.ops.to_device)
        batch.logits_rows = torch.arange(len(ids))
        with torch.inference_mode():
            found = torch.log_softmax(self.model.forward(batch, kv), dim=-1)
        torch.save(found.half(), path)
        return math.exp(-float(found[:-1].gather(1, torch.tensor(ids[1:])[:, None]).mean()))


def serve(name: str, threads: int | None) -> None:
    """Answers a JSON line with a JSON line, until there are no more."""
    served = Served(name, threads)
    for line in sys.stdin:
        method, argument = json.loads(line)
        answer = getattr(served, method)(*([] if argument is None else [argument]))
        print(json.dumps(answer), flush=True)


class Contender:
    """The process of one checkpoint, seen from outside."""

    def __init__(self, name: str, threads: int | None) -> None:
        command = [sys.executable, __file__, "--serve", name, *(["--threads", str(threads)] if threads else [])]
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, method: str, argument: Any = None) -> Any:
        to, back = self._pipes()
        to.write(json.dumps([method, argument]) + "\n")
        to.flush()
        if not (answer := back.readline()):
            raise SystemExit(f"{self.name} cannot be measured, see above.")
        return json.loads(answer)

    def close(self) -> None:
        self._pipes()[0].close()
        self.process.wait()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        return self.process.stdin, self.process.stdout


def divergence(exact: str, found: str) -> float:
    """Mean Kullback-Leibler divergence in nats."""
    import torch

    a, b = (torch.load(path, weights_only=True).float() for path in (exact, found))
    return float((a.exp() * (a - b)).sum(-1).mean())


def measure(contenders: list[Contender], rounds: int, folder: Path) -> list[dict[str, Any]]:
    speeds: dict[tuple[str, int], list[float]] = {}
    for batch in BATCHES:
        for contender in contenders:
            contender.ask("speed", batch)  # captures its steps
        for _ in range(rounds):
            for contender in contenders:
                speeds.setdefault((contender.name, batch), []).append(contender.ask("speed", batch))
    results = []
    for i, contender in enumerate(contenders):
        row: dict[str, Any] = {"checkpoint": contender.name} | contender.ask("facts")
        row["perplexity"] = contender.ask("log_probs", str(folder / f"{i}.pt"))
        row["kl"] = divergence(str(folder / "0.pt"), str(folder / f"{i}.pt"))
        for batch in BATCHES:
            row[f"batch_{batch}"] = statistics.median(speeds[contender.name, batch])
            row[f"batch_{batch}_ratio"] = statistics.median(
                mine / first
                for mine, first in zip(speeds[contender.name, batch], speeds[contenders[0].name, batch], strict=True)
            )
        results.append(row)
    return results


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", help="folders or .gguf files; DIR@int8 quantises at load")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.threads)
        return
    contenders = [Contender(name, args.threads) for name in args.checkpoints]
    with tempfile.TemporaryDirectory() as folder:
        results = measure(contenders, args.rounds, Path(folder))
    for contender in contenders:
        contender.close()
    for row in results:
        print(
            f"{Path(row['checkpoint']).name:32} {row['weights'][:36]:36} {row['weight_bytes'] / 2**20:7.0f} MiB "
            f"{row['batch_1']:7.1f} ({row['batch_1_ratio']:.2f}) {row['batch_16']:7.1f} ({row['batch_16_ratio']:.2f}) "
            f"tokens/s, KL {row['kl']:.4f}, perplexity {row['perplexity']:.2f}"
        )
    print(json.dumps({"results": results}))


if __name__ == "__main__":
    main()
