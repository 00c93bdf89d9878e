"""What a form of the weights, or of the KV cache, costs in quality: ``python benchmarks/quality.py --model MODEL``.

A fixed text goes through the model once for each form. Measured are the next-token distributions after each of its
tokens (teacher forced), against those of the float32 form: the Kullback-Leibler divergence in nats, how often the
likeliest token is the same, and the perplexity of the text. --prompts has each form continue prompts greedily too, and
counts those that come out as they do in bfloat16. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from blade import Config, EngineConfig, ModelOptions, SamplingParams, Sequence, Step
from blade.assembly import Assembly, choose, load_model
from blade.contracts import Model
from blade.engine.batch import build_batch
from blade.plugins import load
from blade.quantization import choose_form
from blade.text.tokenizer import load_tokenizer
from blade_native.attention import PagedAttention
from blade_native.kv_codes import MODES
from blade_native.reference import TorchOps

FORMS: dict[str, tuple[str, str | None, str]] = {  # dtype, weights, KV cache
    "f32": ("float32", "none", "none"),
    "bf16": ("bfloat16", "none", "none"),
    "int8": ("bfloat16", "int8", "none"),
    "int4": ("bfloat16", "int4", "none"),
    "file": ("bfloat16", None, "none"),  # as the file has them: GGUF's blocks
}
USUAL = (*FORMS, "f32-kv-int8", "bf16-kv-int8")
FORMS |= {f"f32-kv-{mode}": ("float32", "none", mode) for mode in MODES}
FORMS |= {f"bf16-kv-{mode}": ("bfloat16", "none", mode) for mode in MODES}
TEXT = Path(__file__).with_name("quality.txt")
BLOCK_SIZE = 16  # tokens
CHUNK = 256  # tokens in one step
NUM_GREEDY = 64  # tokens that a prompt is continued by


class WeightsOnly(TorchOps):
    """float32 activations on whatever the weights were rounded to."""

    quantized_dtypes = (torch.float32,)


class Runner:
    """A model with KV for some sequences; steps it by hand, so that all logits can be had."""

    def __init__(self, model: str, form: str, plugins: list[str], weights_only: bool) -> None:
        self.form = form
        dtype, quantize, self.storage = FORMS[form]
        options = ModelOptions(model=model, dtype="float32" if weights_only else dtype, quantize=quantize)  # type: ignore[arg-type]
        self.assembly = choose(Config(plugins=tuple(plugins), model=options, engine=EngineConfig()), load(plugins))
        if weights_only:
            self.assembly = _weights_only(self.assembly)
        started = time.perf_counter()
        self.model: Model = load_model(self.assembly)
        self.load_seconds = time.perf_counter() - started
        self.kv: Any = None

    def sequences(self, prompts: list[list[int]], room: int = 0) -> list[Sequence]:
        """One for each prompt, with blocks for it and `room` tokens more."""
        seqs, num_blocks = [], 0
        for i, prompt in enumerate(prompts):
            blocks = -(-(len(prompt) + room) // BLOCK_SIZE)
            seqs.append(Sequence(i, prompt, SamplingParams(max_tokens=room + 1)))
            seqs[-1].blocks = list(range(num_blocks, num_blocks + blocks))
            num_blocks += blocks
        storage = None if self.storage == "none" else self.storage
        spec = replace(self.assembly.kv_spec, block_size=BLOCK_SIZE, storage=storage)
        self.kv = self.assembly.attention.allocate(spec, num_blocks)
        return seqs

    @torch.inference_mode()
    def step(self, seqs: list[Sequence], num_tokens: list[int], every: bool = False) -> torch.Tensor:
        """Logits after the last token of each sequence, or after all."""
        batch = build_batch(Step(seqs, num_tokens), BLOCK_SIZE, self.assembly.ops.to_device)
        if every:
            batch.logits_rows = torch.arange(sum(num_tokens))
        logits = self.model.forward(batch, self.kv)
        for seq, num in zip(seqs, num_tokens, strict=True):
            seq.computed += num
        return logits

    def log_probs(self, ids: list[int]) -> list[torch.Tensor]:
        """log softmax after each token, [<= CHUNK, V] each."""
        (seq,) = self.sequences([ids])
        parts = []
        while seq.num_owed:
            parts.append(torch.log_softmax(self.step([seq], [min(CHUNK, seq.num_owed)], every=True), dim=-1))
        return parts

    def greedy(self, prompts: list[list[int]]) -> list[list[int]]:
        seqs = self.sequences(prompts, NUM_GREEDY)
        for _ in range(NUM_GREEDY):
            chosen = self.step(seqs, [seq.num_owed for seq in seqs]).argmax(dim=-1)
            for seq, token in zip(seqs, chosen.tolist(), strict=True):
                seq.output_ids.append(token)
        return [seq.output_ids for seq in seqs]


def _weights_only(assembly: Assembly) -> Assembly:
    ops = WeightsOnly()
    form = choose_form(assembly.checkpoint, assembly.config.model.quantize, ops, torch.float32, assembly.plugins)
    return replace(assembly, ops=ops, attention=PagedAttention(ops.device), form=form, dtype=torch.float32)


def compare(exact: list[torch.Tensor], found: list[torch.Tensor], ids: list[int]) -> dict[str, float]:
    """Of the distributions after each of the tokens `ids`."""
    divergences, agreed, nats = [], 0, 0.0
    for i, (a, b) in enumerate(zip(exact, found, strict=True)):
        target = torch.tensor(ids[i * CHUNK + 1 : (i + 1) * CHUNK + 1])
        divergences.append((a.exp() * (a - b)).sum(dim=-1))
        agreed += int((a.argmax(dim=-1) == b.argmax(dim=-1)).sum())
        nats -= float(b[: len(target)].gather(1, target.unsqueeze(1)).sum())  # no target for the last token
    divergence = torch.cat(divergences)
    return {
        "kl_mean": float(divergence.mean()),
        "kl_max": float(divergence.max()),
        "top1": agreed / len(ids),
        "perplexity": math.exp(nats / (len(ids) - 1)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a .gguf file")
    parser.add_argument("--forms", default=",".join(USUAL), help=f"f32 has to be the first; of {', '.join(FORMS)}")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--num-tokens", type=int, default=1280, help="of the text, at most")
    parser.add_argument("--prompts", type=Path, help='JSON, [{"prompt": [ids]}, ...]; tests/oracle has some')
    parser.add_argument("--weights-only", action="store_true", help="activations in float32, on torch: slow")
    parser.add_argument("--plugin", action="append", default=[])
    args = parser.parse_args()
    forms = args.forms.split(",")
    if forms[0] != "f32" or not FORMS.keys() >= set(forms):
        parser.error(f"--forms takes f32 first, then any of {', '.join(FORMS)}")
    prompts = [case["prompt"] for case in json.loads(args.prompts.read_text())] if args.prompts else []

    results: dict[str, dict[str, Any]] = {}
    exact: list[torch.Tensor] = []
    texts: dict[str, list[list[int]]] = {}
    ids: list[int] = []
    runner: Runner | None = None
    weights = [FORMS[form][:2] for form in forms]
    for form in sorted(forms, key=lambda form: weights.index(FORMS[form][:2])):
        if runner is None or FORMS[form][:2] != FORMS[runner.form][:2]:
            runner = None
            gc.collect()
            runner = Runner(args.model, form, args.plugin, args.weights_only)
        runner.form, runner.storage = form, FORMS[form][2]
        checkpoint = runner.assembly.checkpoint
        if not ids:
            tokenizer = load_tokenizer(checkpoint.path, checkpoint.gguf_metadata)
            ids = tokenizer.encode(args.text.read_text())[: args.num_tokens]
        found = runner.log_probs(ids)
        exact = exact or found
        results[form] = measured(runner, compare(exact, found, ids))
        if prompts:
            texts[form] = runner.greedy(prompts)
        print(form, results[form], file=sys.stderr, flush=True)
    for form, texts_of_form in texts.items() if "bf16" in texts else ():
        results[form]["greedy_as_bf16"] = sum(a == b for a, b in zip(texts_of_form, texts["bf16"], strict=True))
    print(json.dumps({"model": args.model, "num_tokens": len(ids), "num_prompts": len(prompts), "forms": results}))


def measured(runner: Runner, quality: dict[str, float]) -> dict[str, Any]:
    assembly = runner.assembly
    cost = {"label": assembly.form.label, "ops": assembly.ops.name, "load_seconds": round(runner.load_seconds, 2)}
    rounded = {name: float(f"{value:.4g}") for name, value in quality.items()}
    return cost | {"weight_bytes": assembly.weight_bytes} | rounded


if __name__ == "__main__":
    main()
