"""Runs a checkpoint step by step, its prompts in blocks scattered over the cache."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

import blade_llama
import blade_qwen
from blade import CaptureOptions, KVSpec
from blade.engine.state_cache import with_index_keys, with_states
from blade.nn import Loader
from blade.nn.shape_check import ShapeCheck
from blade.plugins import Plugins
from blade.testing.attention import make_batch
from blade_native import cpu_ops, paged_attention

if TYPE_CHECKING:
    from checkpoints import Reference
    from torch import Tensor

    from blade.contracts import Ops, Quantization

Span = tuple[int, int]  # tokens [start, stop) of a prompt
ARCHITECTURES = Plugins({"llama": blade_llama, "qwen": blade_qwen}).registry("register_models")


class Stepper:
    """One model and the KV of all of the reference's prompts."""

    def __init__(
        self,
        reference: Reference,
        dtype: torch.dtype = torch.float32,
        block_size: int = 16,
        ops: Ops | None = None,
        storage: str | None = None,
        captured: bool = False,
        quantization: Quantization | None = None,
    ) -> None:
        """`ops`: those of this machine's CPU, unless others are given. `storage`: of the KV cache. `captured`: steps of
        a shape that came before are replayed, where that can be."""
        self.ops = ops or cpu_ops(None)
        attention = paged_attention(self.ops)
        architecture = ARCHITECTURES.create(reference.config["architectures"][0])
        config = architecture.configure(reference.config)
        seen = getattr(architecture, "weights", lambda config, weights: weights)
        weights = seen(reference.config, reference.weights)
        source = weights, self.ops, attention, dtype, quantization
        architecture.build(replace(config, max_context=1), ShapeCheck(*source))  # which finds nothing wrong
        self.model = architecture.build(config, Loader(*source))
        sizes = [-(-len(prompt) // block_size) for prompt in reference.prompts]
        order = random.Random(0).sample(range(sum(sizes)), sum(sizes))
        self.tables = [[order.pop() for _ in range(size)] for size in sizes]
        self.prompts = reference.prompts
        self.block_size = block_size
        name = str(dtype).removeprefix("torch.")
        heads = config.num_heads, config.num_kv_heads, config.head_dim
        spec = KVSpec(
            config.num_kv_layers, *heads, name, block_size, storage, selected=config.key_selection is not None
        )
        kv, num_slots = attention.allocate(spec, sum(sizes)), 2 * len(self.prompts)
        kv = with_index_keys(kv, config, block_size, sum(sizes), dtype, self.ops.device)
        self.kv = with_states(kv, config, num_slots, dtype, self.ops.device)
        self.held = [-1] * num_slots  # tokens of prompt slot // 2 that the state in a slot comes after
        longest = max(sizes) * block_size
        options = CaptureOptions(captured, batch_sizes=(1, 4), block_size=block_size, max_context=longest)
        self.forward = self.ops.capture(self.model, self.kv, options)

    @torch.inference_mode()
    def step(self, spans: dict[int, Span], rows: list[int] | None = None) -> Tensor:
        """Logits after each token of the spans, keyed by prompt; or after those tokens of the batch that `rows` are."""
        batch = make_batch([self.tables[i] for i in spans], list(spans.values()), self.block_size, self.ops)
        ids = [token for i, (start, stop) in spans.items() for token in self.prompts[i][start:stop]]
        rows = list(range(len(ids))) if rows is None else rows
        device = self.ops.device
        batch = replace(
            batch,
            input_ids=torch.tensor(ids, device=device),
            logits_rows=torch.tensor(rows, dtype=torch.int64, device=device),
        )
        if self.model.config.state:
            slots = [self._slots(i, span) for i, span in spans.items()]
            state_in, state_out = torch.tensor(slots, dtype=torch.int32, device=device).T.contiguous()
            batch = replace(batch, state_in=state_in, state_out=state_out)
        return self.forward(batch).cpu()

    def _slots(self, prompt: int, span: Span) -> tuple[int, int]:
        """Where the state before the span is, -1 for none, and where the one after it goes."""
        mine = (2 * prompt, 2 * prompt + 1)
        found = next((slot for slot in mine if span[0] and self.held[slot] == span[0]), -1)
        assert (found >= 0) == (span[0] > 0), "the state is gone"
        after = mine[1] if found == mine[0] else mine[0]
        self.held[after] = span[1]
        return found, after

    def run(self, steps: list[dict[int, Span]]) -> list[Tensor]:
        """All logits of every prompt, once the steps have gone through it."""
        parts: list[list[Tensor]] = [[] for _ in self.prompts]
        for spans in steps:
            logits = self.step(spans).clone().split([stop - start for start, stop in spans.values()])
            for i, part in zip(spans, logits, strict=True):
                parts[i].append(part)
        return [torch.cat(part) for part in parts]


def one_by_one(lengths: list[int], chunk: int) -> list[dict[int, Span]]:
    """Each prompt alone, in chunks."""
    return [
        {i: (start, min(start + chunk, length))}
        for i, length in enumerate(lengths)
        for start in range(0, length, chunk)
    ]


def all_together(lengths: list[int], seed: int) -> list[dict[int, Span]]:
    """Each step takes some of the prompts, in any order, on by one token, a few or many."""
    rng = random.Random(seed)
    computed = [0] * len(lengths)
    steps = []
    while computed != lengths:
        step = {}
        for i in rng.sample(range(len(lengths)), len(lengths)):
            stop = min(lengths[i], computed[i] + rng.choice([0, 1, 1, 4, 19, 40]))
            if stop > computed[i]:
                step[i] = (computed[i], stop)
                computed[i] = stop
        if step:
            steps.append(step)
    return steps
