"""How far bfloat16 is from float32 on real weights: Kullback-Leibler divergence of the next-token distributions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from greedy import prepare

from blade import SamplingParams, Sequence, Step
from blade.engine.batch import build_batch

HERE = Path(__file__).parent
MEAN_KL = 1e-3  # nats; a quarter of it is measured


def log_probabilities(model_file: Path, dtype: str, ids: list[int]) -> torch.Tensor:
    """[T, V]: after every token of the prompt."""
    assembly, model = prepare(model_file, dtype)
    seq = Sequence(0, ids, SamplingParams(max_tokens=1), blocks=list(range(-(-len(ids) // 16))))
    batch = build_batch(Step([seq], [len(ids)]), 16, assembly.ops.to_device)
    batch.logits_rows = torch.arange(len(ids))
    with torch.inference_mode():
        kv = assembly.attention.allocate(assembly.kv_spec, len(seq.blocks))
        return torch.log_softmax(model.forward(batch, kv), dim=-1)


@pytest.mark.demo
def test_bfloat16_stays_close_to_float32(smollm2_gguf: Path) -> None:
    ids = json.loads((HERE / "smollm2.json").read_text())[13]["prompt"]
    exact, rounded = (log_probabilities(smollm2_gguf, dtype, ids) for dtype in ("float32", "bfloat16"))
    divergence = (exact.exp() * (exact - rounded)).sum(dim=-1)
    print(f"mean {divergence.mean():.1e}, max {divergence.max():.1e}, {len(ids)} tokens")
    assert 0 < float(divergence.mean()) < MEAN_KL
    assert float((exact.argmax(dim=-1) == rounded.argmax(dim=-1)).float().mean()) > 0.9
